# SPDX-License-Identifier: Apache-2.0
"""The item bank: every document of every task, shuffled once, fresh ones for each look."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from lightning_lora.errors import ConfigError


class ItemBank:
    """Which documents a look takes.

    Each task's documents are shuffled once by the seed. A look takes the next ones of every task, tasks in
    proportion to their sizes (at least one item each), so that every look is a small picture of the whole
    bank and no item comes twice before all of its task have come. Then the task is shuffled anew.

    Args:
        sizes: number of documents of each task.
        items_per_look: how many items a look takes over all tasks when it is not told another number.
        seed: of the shuffle.

    Raises:
        ConfigError: if ``items_per_look`` is below 1.
    """

    def __init__(self, sizes: Mapping[str, int], items_per_look: int, seed: int = 0) -> None:
        if items_per_look < 1:
            raise ConfigError(f"`items_per_eval` must be 1 or more: got {items_per_look}.")
        self.sizes = dict(sizes)
        self.items_per_look = items_per_look
        self.seed = seed
        self._taken = dict.fromkeys(self.sizes, 0)  # items of each task so far, over all passes through it

    @property
    def size(self) -> int:
        """Number of documents of all tasks."""
        return sum(self.sizes.values())

    @property
    def used_up(self) -> list[str]:
        """Tasks of which every item has been taken once or more."""
        return [name for name, taken in self._taken.items() if taken >= self.sizes[name]]

    @property
    def fresh(self) -> int:
        """Number of documents that no look has taken."""
        return sum(max(0, n - self._taken[name]) for name, n in self.sizes.items())

    def take(self, items: int | None = None) -> dict[str, list[int]]:
        """The documents of the next look, by task, ascending.

        A look that comes to the end of a task takes what is left of it, and the next begins the task anew.

        Args:
            items: how many over all tasks; None for the number that the bank was given.
        """
        taken = self._ahead(items)
        for name, ids in taken.items():
            self._taken[name] += len(ids)
        return taken

    def sample(self, items: int | None = None) -> dict[str, list[int]]:
        """So many documents, those that no look has taken before the others; none counts as taken by this.

        Args:
            items: how many over all tasks; None for the whole bank.
        """
        if items is None or items >= self.size:
            return {name: list(range(n)) for name, n in self.sizes.items()}
        found = {}
        for name, count in _quotas(self.sizes, items).items():
            start = min(self._taken[name], self.sizes[name])
            order = self._order(name, 0)
            found[name] = sorted((order[start:] + order[:start])[:count])
        return found

    def state_dict(self) -> dict[str, Any]:
        """Which bank it is, and how many items of each task have been taken, in primitives."""
        return {**self._identity(), "taken": dict(self._taken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on where `state_dict` was taken: no item twice.

        Args:
            state: what `state_dict` gave.

        Returns:
            Whether it was of this bank. If not, nothing has changed.
        """
        mine = self._identity()
        if any(state.get(key) != mine[key] for key in mine):
            return False
        self._taken = {name: int(state["taken"][name]) for name in self.sizes}
        return True

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "sizes": dict(self.sizes)}

    def _ahead(self, items: int | None) -> dict[str, list[int]]:
        found = {}
        for name, count in _quotas(self.sizes, self.items_per_look if items is None else items).items():
            turn, start = divmod(self._taken[name], self.sizes[name])
            found[name] = sorted(self._order(name, turn)[start : start + count])
        return found

    def _order(self, name: str, turn: int) -> list[int]:
        """A task's documents in the order of a pass through it."""
        order = list(range(self.sizes[name]))
        random.Random(f"{self.seed}/{name}/{turn}" if turn else f"{self.seed}/{name}").shuffle(order)
        return order


def _quotas(sizes: Mapping[str, int], items: int) -> dict[str, int]:
    """Items of each task in a look: in proportion, whole numbers by largest remainder, at least 1 each."""
    total = sum(sizes.values())
    items = min(items, total)
    exact = {name: items * n / total for name, n in sizes.items()}
    quota = {name: max(1, int(share)) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
    for name in by_remainder[: max(0, items - sum(quota.values()))]:
        quota[name] = min(quota[name] + 1, sizes[name])
    return quota
