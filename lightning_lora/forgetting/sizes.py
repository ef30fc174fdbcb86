# SPDX-License-Identifier: Apache-2.0
"""Sizes: how many items the monitor's next look, its verdict or a remedy may take, and when the next look is due.

Without a time budget every answer is None: as many as were asked for. With one, rank 0 answers and the others are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_lora.forgetting.budget import CAUTION, FEWEST, Budget
from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.ranks import from_rank_zero


class Sizes:
    """What a time budget makes of a monitor's looks.

    Args:
        monitor: whose looks.
        budget: the ledger; None for no limit.
        verdict: whether a verdict comes at the end, for which time is kept.
        tries: how many candidates a remedy may ask the bank about, 0 without one.
    """

    def __init__(self, monitor: Monitor, budget: Budget | None, verdict: bool, tries: int) -> None:
        self.monitor = monitor
        self.budget = budget
        self.tries = tries
        # A remedy is followed by a second verdict where there was one.
        self.at_end = (1 + bool(tries)) * verdict + tries

    @contextmanager
    def spending(self, step: int, passes: int = 0) -> Iterator[None]:
        """Inside, the budget is spent.

        Args:
            step: optimizer steps taken.
            passes: those of a look; 0 where this is none.
        """
        if self.budget is None:
            yield
            return
        before = self.budget.spent
        with self.budget.spending(step):
            yield
        if passes:
            gauges = self.monitor.observed_seconds
            self.budget.note(passes, self.budget.spent - before - (gauges or 0.0))
            self.budget.gauges = self.budget.gauges if gauges is None else gauges

    def look_passes(self, items: int | None) -> int:
        """Passes of the next look: every item by the model and by its base.

        Args:
            items: how many items, of the tasks and of the target tasks each; None for a look of full size.
        """
        banks = [bank for bank in (self.monitor.bank, self.monitor.target_bank) if bank.size]
        return sum(2 * sum(map(len, bank.ahead(items).values())) for bank in banks)

    def verdict_passes(self, items: int | None) -> int:
        """Passes of a verdict: the base is not asked again about what is known of it.

        Args:
            items: how many items at most; None for the whole bank.
        """
        groups = ((self.monitor.bank, self.monitor.pairs), (self.monitor.target_bank, self.monitor.target_pairs))
        found = [(bank.sample(items), pairs) for bank, pairs in groups if bank.size]
        return sum(sum(map(len, picked.values())) + pairs.unseen(picked) for picked, pairs in found)

    def first(self) -> tuple[int | None, bool]:
        """The look before the first step, when no time has been measured: one item of each task, and no gauges."""
        return (None, True) if self.budget is None else (1, False)

    def look(self, step: int, end: int | None) -> tuple[int | None, bool]:
        """Items of a look now, 0 for none, and whether there is time for gauges.

        Args:
            step: optimizer steps taken.
            end: those after which the run ends; None when nobody knows.
        """
        if self.budget is None:
            return None, True
        if self.at_end and end is not None and step >= end:
            return 0, False  # the verdict comes at once
        return from_rank_zero(
            self._with_gauges(self.look_passes, self.monitor.bank.items_per_look, self.budget.for_look(self._reserve()))
        )

    def verdict(self, last: bool) -> tuple[int | None, bool]:
        """Items of the verdict, 0 for none, and whether there is time for gauges.

        Args:
            last: whether no remedy can follow any more, for which something would be left.
        """
        if self.budget is None:
            return None, True
        size = max(self.monitor.bank.size, self.monitor.target_bank.size)
        seconds = self.budget.balance / (1 if last else max(1, self.at_end))
        return from_rank_zero(self._with_gauges(self.verdict_passes, size, seconds, early=False))

    def remedy(self) -> int | None:
        """Items on which a remedy's candidates must hold.

        As many as leave the verdict after it its share; where those would be fewer than a look's, the remedy comes
        first. A handful is taken even where the budget has no time for it: it is done once, and not on nothing.
        """
        if self.budget is None:
            return None
        bank, seconds = self.monitor.bank, self.budget.balance
        look = min(bank.size, bank.items_per_look)
        found = self.budget.largest(self.verdict_passes, bank.size, seconds / self.at_end)
        if found < look:
            found = self.budget.largest(self.verdict_passes, look, seconds / self.tries)
        return from_rank_zero(max(found, min(bank.size, FEWEST)))

    def plan(self, step: int, end: int | None) -> None:
        """Say when the next look is due, where no schedule does.

        Args:
            step: optimizer steps taken.
            end: those after which the run ends; None when nobody knows.
        """
        if self.budget is not None:
            wanted = self.budget.cost(self.look_passes(None)) + self._gauge_cost
            self.budget.next_step = from_rank_zero(self.budget.plan(step, end, wanted, self._reserve()))

    def _reserve(self) -> float:
        """Seconds that the end of the run is going to take."""
        if self.budget is None or not self.at_end:
            return 0.0
        return (self.at_end * self.budget.cost(self.verdict_passes(None)) + self._gauge_cost) / CAUTION

    @property
    def _gauge_cost(self) -> float:
        return self.budget.gauge_cost if self.budget is not None and self.monitor.observers else 0.0

    def _with_gauges(
        self, passes: Callable[[int], int], most: int, seconds: float, early: bool = True
    ) -> tuple[int, bool]:
        """How many items so many seconds hold; gauges are left out where they would halve them."""
        if self.budget is None:
            return most, True
        items = self.budget.largest(passes, most, seconds, early)
        beside = self.budget.largest(passes, most, seconds - self._gauge_cost / CAUTION, early)
        return (beside, True) if beside and 2 * beside >= items else (items, False)
