# SPDX-License-Identifier: Apache-2.0
"""The item bank: every document of every task, shuffled once, a few of them for each look."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lightning_lora.errors import ConfigError


class ItemBank:
    """Which documents a look takes.

    Each task's documents are shuffled once by the seed. A look takes the next ones of every task, tasks in
    proportion to their sizes (at least one item each), so that every look is a small picture of the whole
    bank and no item comes twice before all have come. After that the same order begins again.

    Args:
        sizes: number of documents of each task.
        items_per_look: how many items a look takes over all tasks.
        seed: of the shuffle.

    Raises:
        ConfigError: if ``items_per_look`` is below 1.
    """

    def __init__(self, sizes: Mapping[str, int], items_per_look: int, seed: int = 0) -> None:
        if items_per_look < 1:
            raise ConfigError(f"`items_per_eval` must be 1 or more: got {items_per_look}.")
        self.sizes = dict(sizes)
        self.seed = seed
        self.quota = _quotas(self.sizes, items_per_look)
        self._order = {name: _shuffled(n, f"{seed}/{name}") for name, n in self.sizes.items()}

    @property
    def fresh_looks(self) -> int:
        """How many looks bring only items that none before them had."""
        return min(n // self.quota[name] for name, n in self.sizes.items())

    def items(self, look: int) -> dict[str, list[int]]:
        """Documents of a look, by task, ascending.

        Args:
            look: number of the look, from 0.
        """
        taken = {}
        for name, order in self._order.items():
            start = look * self.quota[name]
            taken[name] = sorted(order[i % len(order)] for i in range(start, start + self.quota[name]))
        return taken

    def everything(self) -> dict[str, list[int]]:
        """All documents, by task."""
        return {name: list(range(n)) for name, n in self.sizes.items()}

    def describe(self) -> dict[str, Any]:
        """What makes the sequence of looks what it is, in primitives: two equal ones give equal items."""
        return {"seed": self.seed, "sizes": dict(self.sizes), "quota": dict(self.quota)}


def _quotas(sizes: Mapping[str, int], items: int) -> dict[str, int]:
    """Items of each task in a look: in proportion, whole numbers by largest remainder, at least 1 each."""
    total = sum(sizes.values())
    items = min(items, total)
    exact = {name: items * n / total for name, n in sizes.items()}
    quota = {name: max(1, int(share)) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for name in by_remainder[: max(0, items - sum(quota.values()))]:
        quota[name] = min(quota[name] + 1, sizes[name])
    return quota


def _shuffled(n: int, seed: str) -> list[int]:
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return order
