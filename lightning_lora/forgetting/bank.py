# SPDX-License-Identifier: Apache-2.0
"""The item bank: every document of every task, shuffled once, fresh ones for each look."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from lightning_lora.errors import ConfigError


class ItemBank:
    """Which documents a look takes.

    Each task's documents are shuffled once by the seed. A look takes the next ones of every task, tasks in
    proportion to their sizes (at least one item each), so that every look is a small picture of the whole
    bank and no item comes twice before all of its task have come. Then the task is shuffled anew.

    Where documents belong together (questions on one passage), whole groups are shuffled and taken: the next ones
    until the task's share of the look is reached. The last group may go beyond it, and one that is larger than the
    share comes whole. So a group is in one look, whichever documents it has, and the choice of the next group knows
    nothing but sizes.

    Args:
        sizes: number of documents of each task.
        items_per_look: how many items a look takes over all tasks when it is not told another number.
        seed: of the shuffle.
        groups: for tasks whose documents belong together, the group of each document.

    Raises:
        ConfigError: if ``items_per_look`` is below 1, or ``groups`` do not name the group of every document.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        items_per_look: int,
        seed: int = 0,
        groups: Mapping[str, Sequence[Hashable]] | None = None,
    ) -> None:
        if items_per_look < 1:
            raise ConfigError(f"`items_per_eval` must be 1 or more: got {items_per_look}.")
        self.sizes = dict(sizes)
        self.items_per_look = items_per_look
        self.seed = seed
        wrong = {name: len(of) for name, of in (groups or {}).items() if len(of) != self.sizes.get(name)}
        if wrong:
            raise ConfigError(f"`groups` names the group of each document: got {wrong} for tasks of {self.sizes}.")
        self._members = {name: _members(of) for name, of in (groups or {}).items()}
        self._newest_pass: dict[str, tuple[int, list[int], list[int]]] = {}  # it is asked for again and again
        self._taken = dict.fromkeys(self.sizes, 0)  # items of each task so far, over all passes through it

    @property
    def size(self) -> int:
        """Number of documents of all tasks."""
        return sum(self.sizes.values())

    @property
    def largest_groups(self) -> dict[str, int]:
        """Number of documents in the largest group of each task; 1 where every document stands alone."""
        return {name: max(map(len, self._members[name])) if name in self._members else 1 for name in self.sizes}

    @property
    def used_up(self) -> list[str]:
        """Tasks of which every item has been taken once or more."""
        return [name for name, taken in self._taken.items() if taken >= self.sizes[name]]

    @property
    def fresh(self) -> int:
        """Number of documents that no look has taken."""
        return sum(max(0, n - self._taken[name]) for name, n in self.sizes.items())

    def take(self, items: int | None = None) -> dict[str, list[int]]:
        """The documents of the next look, by task, ascending; whole groups, see the class.

        A look that comes to the end of a task takes what is left of it, and the next begins the task anew.

        Args:
            items: how many over all tasks; None for the number that the bank was given.
        """
        taken = self.ahead(items)
        for name, ids in taken.items():
            self._taken[name] += len(ids)
        return taken

    def sample(self, items: int | None = None) -> dict[str, list[int]]:
        """So many documents, those that no look has taken before the others; none counts as taken by this.

        Whole groups, as `take` has them.

        Args:
            items: how many over all tasks; None for the whole bank.
        """
        if items is None or items >= self.size:
            return {name: list(range(n)) for name, n in self.sizes.items()}
        found = {}
        for name, count in _quotas(self.sizes, items).items():
            start = min(self._taken[name], self.sizes[name])
            order, ends = self._order(name, 0)
            unseen, seen = [end for end in ends if end > start], [end + len(order) for end in ends if end <= start]
            found[name] = sorted((order + order)[start : _end_of([*unseen, *seen], start + count)])
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
        if {key: value for key, value in state.items() if key != "taken"} != self._identity():
            return False
        self._taken = {name: int(state["taken"][name]) for name in self.sizes}
        return True

    def _identity(self) -> dict[str, Any]:
        groups = {name: _digest(members) for name, members in self._members.items()}
        return {"seed": self.seed, "sizes": dict(self.sizes), **({"groups": groups} if groups else {})}

    def ahead(self, items: int | None = None) -> dict[str, list[int]]:
        """What `take` would give, without taking it.

        Args:
            items: how many over all tasks; None for the number that the bank was given.
        """
        found = {}
        for name, count in _quotas(self.sizes, self.items_per_look if items is None else items).items():
            turn, start = divmod(self._taken[name], self.sizes[name])
            order, ends = self._order(name, turn)
            found[name] = sorted(order[start : _end_of(ends, start + count)])
        return found

    def _order(self, name: str, turn: int) -> tuple[list[int], list[int]]:
        """A task's documents in the order of a pass through it, and after how many of them each group ends."""
        known = self._newest_pass.get(name)
        if known is not None and known[0] == turn:
            return known[1:]
        members = self._members.get(name) or [(i,) for i in range(self.sizes[name])]
        shuffled = list(range(len(members)))
        random.Random(f"{self.seed}/{name}/{turn}" if turn else f"{self.seed}/{name}").shuffle(shuffled)
        order, ends = [i for at in shuffled for i in members[at]], list(accumulate(len(members[at]) for at in shuffled))
        self._newest_pass[name] = (turn, order, ends)
        return order, ends


def _members(groups: Sequence[Hashable]) -> list[tuple[int, ...]]:
    """The documents of each group, groups in the order in which they first appear."""
    found: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return list(map(tuple, found.values()))


def _digest(members: Sequence[tuple[int, ...]]) -> str:
    """Which documents belong together, as a short text."""
    return hashlib.sha256(repr(members).encode()).hexdigest()[:16]


def _end_of(ends: Sequence[int], wanted: int) -> int:
    """Where the group ends that reaches so many documents; the last end where there are fewer."""
    return next((end for end in ends if end >= wanted), ends[-1])


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
