# SPDX-License-Identifier: Apache-2.0
"""A look's comparison takes the groups that a task declares into its errors and p-values, and into nothing else."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import pytest

from lightning_lora.forgetting import statistics
from lightning_lora.forgetting.monitor import drop_p
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
    for name in ("acc", "acc_base", "delta", "soft_delta", "flips_lost", "flips_gained", "n_items"):
        assert getattr(grouped, name) == getattr(alone, name), name
    assert alone.delta_se == pytest.approx(math.sqrt(0.25 * 0.75 / 79))
    assert grouped.delta_se == pytest.approx(math.sqrt(0.25 * 0.75 / 7))
    assert grouped.soft_delta_se > 2 * alone.soft_delta_se
    assert (alone.n_groups, alone.p_from, alone.n_independent) == (None, "mcnemar", 80)
    assert alone.p_value == statistics.mcnemar_p(20, 0) < 1e-5
    assert (grouped.n_groups, grouped.p_from, grouped.n_independent) == (8, "grouped z", 8)
    assert grouped.p_value == pytest.approx(2 * NormalDist().cdf(-0.25 / grouped.delta_se))
    assert grouped.p_value > 0.05


def test_a_few_passages_that_agree_are_no_certainty() -> None:
    """Two passages, both lost whole: no spread, and still an error of one passage in two."""
    passages = [f"p{i // 10}" for i in range(20)]
    found = compare(scores([0.0] * 20, passages), scores([1.0] * 20, passages))
    assert (found.delta, found.delta_se) == (-1.0, 0.0)
    assert found.p_value == pytest.approx(2 * NormalDist().cdf(-2.0))
    assert drop_p(found, 0.0) == pytest.approx(NormalDist().cdf(-2.0))
    assert compare(scores([1.0] * 20, passages), scores([1.0] * 20, passages)).p_value == 1.0


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
