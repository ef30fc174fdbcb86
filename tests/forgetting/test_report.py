# SPDX-License-Identifier: Apache-2.0
"""A look's comparison takes the groups that a task declares into its errors, and into nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lightning_lora.forgetting.report import compare, compare_pooled
from lightning_lora.forgetting.scoring import ItemScore


def scores(rights: list[float], groups: list[str | None]) -> list[ItemScore]:
    return [
        ItemScore(i, (f"doc{i}", "prompt"), (0.0, -1.0), right, 2 * right - 1 + 0.01 * i, (0,), group)
        for i, (right, group) in enumerate(zip(rights, groups, strict=True))
    ]


def test_questions_that_share_a_passage_count_as_their_passages_do() -> None:
    """Ten questions on each of eight passages; two passages are lost whole."""
    passages = [f"p{i // 10}" for i in range(80)]
    lost = [0.0 if i < 20 else 1.0 for i in range(80)]
    alone = compare(scores(lost, [None] * 80), scores([1.0] * 80, [None] * 80))
    grouped = compare(scores(lost, passages), scores([1.0] * 80, passages))
    for name in ("acc", "acc_base", "delta", "soft_delta", "flips_lost", "flips_gained", "n_items", "p_value"):
        assert getattr(grouped, name) == getattr(alone, name), name
    assert alone.delta_se == pytest.approx(math.sqrt(0.25 * 0.75 / 79))
    assert grouped.delta_se == pytest.approx(math.sqrt(0.25 * 0.75 / 7))
    assert grouped.soft_delta_se > 2 * alone.soft_delta_se


def test_one_passage_name_in_two_tasks_is_two_passages_and_items_without_stand_alone() -> None:
    a, b = ["p", "p", "q", "q"], [None, None, None, None]
    model, base = [0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]
    both = compare_pooled([(scores(model, a), scores(base, a)), (scores(model, b), scores(base, b))])
    apart = compare_pooled(
        [(scores(model, a), scores(base, a)), (scores(model, ["r", "s", "t", "u"]), scores(base, b))]
    )
    assert dataclasses.asdict(both) == pytest.approx(dataclasses.asdict(apart))
    twice = compare_pooled([(scores(model, a), scores(base, a))] * 2)
    # Four groups of two items, of which two are lost.
    assert twice.delta_se == pytest.approx(math.sqrt(4 / 3 * 4 * (2 * 0.5) ** 2) / 8)
