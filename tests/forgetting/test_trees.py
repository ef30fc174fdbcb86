# SPDX-License-Identifier: Apache-2.0
"""Trees hold every text once, see what causal attention sees, and fill batches by a budget."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_lora.forgetting.trees import ROOMY, Row, Tree, make_batches, plant, sees


def families(seed: int, n: int = 12) -> list[Row]:
    """Texts of which some begin alike, some are the beginning of another, some stand alone."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> Row:
        return tuple(rng.randrange(2, 50) for _ in range(rng.randint(low, high)))

    rows = set()
    for _ in range(n):
        stem = tokens(1, 30)
        rows.update(stem + tokens(0, 12) for _ in range(rng.randint(1, 5)))
        rows.add(stem)
    return sorted(rows, key=lambda row: rng.random())


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_holds_its_texts_and_sees_what_each_of_them_sees(seed: int) -> None:
    rows = families(seed)
    trees = plant(rows)
    assert sorted(row for tree in trees for row in tree.rows) == sorted(rows)
    assert sum(map(len, trees)) < sum(map(len, rows))
    for batch in make_batches(trees, 500):
        width = max(map(len, batch))
        mask = sees(batch, width)
        assert mask.any(-1).all()  # no row of attention is empty
        for tree, own in zip(batch, mask, strict=True):
            for row, path in zip(tree.rows, tree.paths, strict=True):
                assert tuple(tree.tokens[i] for i in path) == row
                assert [tree.depths[i] for i in path] == list(range(len(row)))
                for depth, place in enumerate(path):
                    assert own[place].nonzero().flatten().tolist() == path[: depth + 1]


def test_what_begins_unlike_or_would_grow_too_long_stands_apart() -> None:
    assert len(plant([(1, 2, 3), (4, 5, 6)])) == 2
    assert len(plant([(1, *range(2, 12)), (1, *range(12, 22))])) == 2  # one token in common of eleven
    stem = tuple(range(100))
    many = plant([(*stem, *[k] * 50) for k in range(20)])
    assert len(many) > 1
    assert all(len(tree) <= ROOMY for tree in many)
    assert all(len(tree) <= 200 for tree in plant([(*stem, *[k] * 50) for k in range(20)], longest=200))
    assert [tree.rows for tree in plant([stem, (*stem, 7)], longest=50)] == [[stem], [(*stem, 7)]]


@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_batches_hold_the_budget_and_do_not_depend_on_order(budget: int) -> None:
    rng = random.Random(0)
    rows = families(9)
    batches = make_batches(plant(rows), budget)
    assert sorted(row for batch in batches for tree in batch for row in tree.rows) == sorted(rows)
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= budget for batch in batches)
    rng.shuffle(rows)
    assert make_batches(plant(rows), budget) == batches


def test_padding_sees_itself_alone() -> None:
    (mask,) = sees([Tree.of((5, 6))], 4)
    assert torch.equal(mask, torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool))
