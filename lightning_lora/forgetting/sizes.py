# SPDX-License-Identifier: Apache-2.0
"""Sizes: how many items the monitor's next look, its verdict or a remedy may take, and when the next look is due.

Without a time budget every answer is None: as many as were asked for. With one, rank 0 answers and the others are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning_lora.forgetting.budget import CAUTION, FEWEST, Budget
from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.ranks import from_rank_zero

#: After one item, passes over so many are timed: two sizes make a line.
WARM = (2, FEWEST)


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
        self._verdict = verdict
        #: Candidates of a sweep of scales that comes after the verdict; None without one.
        self.sweep: int | None = None

    @property
    def at_end(self) -> int:
        """How many times the bank is to be asked when training ends.

        A remedy, and a sweep that changes the adapters, is followed by a verdict of its own where there is one.
        """
        return (1 + bool(self.tries)) * self._verdict + self.tries + self._of_sweep

    @property
    def _of_sweep(self) -> int:
        return 0 if self.sweep is None else self._verdict + self.sweep

    @contextmanager
    def pausing(self, step: int) -> Iterator[None]:
        """Inside, the budget earns nothing: other evaluation than the monitor's goes on.

        Args:
            step: optimizer steps taken.
        """
        if self.budget is None:
            yield
            return
        with self.budget.pausing(step):
            yield

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

    def time(self, scorer: Scorer, step: int) -> None:
        """Time warm passes over the next items of the bank: the first look is one item, and found everything cold.

        One item of each task at first, then more of them as soon as there is time for it (`Budget.for_timing`), each
        size once. The answers are thrown away: no item counts as taken, and nothing is decided by them. Every rank
        takes part.

        Args:
            scorer: the model.
            step: optimizer steps taken.
        """
        budget = self.budget
        if budget is None:
            return
        if not budget.is_warm:
            if budget.first is None:
                self._time(scorer, step, 1)
            budget.forget_cold()
            self._time(scorer, step, 1)
        for items in WARM:
            more = self._ahead_passes(items)
            if more > budget.largest_timed and from_rank_zero(budget.cost(more) <= budget.for_timing):
                self._time(scorer, step, items)

    def _time(self, scorer: Scorer, step: int, items: int) -> None:
        groups = ((self.monitor.bank, self.monitor.pairs), (self.monitor.target_bank, self.monitor.target_pairs))
        if self.budget is None:
            return
        before = self.budget.spent
        with self.spending(step), scorer.quietly():
            for bank, pairs in groups:
                if bank.size:
                    scorer.score(pairs.tasks, bank.ahead(items))
        self.budget.note(self._ahead_passes(items), self.budget.spent - before)

    def _ahead_passes(self, items: int) -> int:
        """Passes of one model over the next items."""
        return self.look_passes(items) // 2

    def verdict(self, last: bool) -> tuple[int | None, bool]:
        """Items of the verdict, 0 for none, and whether there is time for gauges.

        Args:
            last: whether no remedy can follow any more, for which something would be left.
        """
        if self.budget is None:
            return None, True
        size = max(self.monitor.bank.size, self.monitor.target_bank.size)
        seconds = self.budget.balance / (1 + self._of_sweep if last else max(1, self.at_end))
        return from_rank_zero(self._with_gauges(self.verdict_passes, size, seconds))

    def remedy(self) -> int | None:
        """Items on which a remedy's candidates must hold; None for the whole bank."""
        return self._candidates(self.tries, self.at_end)

    def swept(self) -> int | None:
        """Items at each scale of the sweep that begins now; None for the whole bank. It is no longer to come."""
        tries, to_come = self.sweep or 0, self._of_sweep
        self.sweep = None
        return self._candidates(tries, to_come)

    def _candidates(self, tries: int, to_come: int) -> int | None:
        """Items that each of so many candidates is compared on.

        As many as leave the verdict after them its share; where those would be fewer than a look's, the candidates come
        first. A handful is taken even where the budget has no time for it: it is done once, and not on nothing.
        """
        if self.budget is None:
            return None
        bank, seconds = self.monitor.bank, self.budget.balance
        look = min(bank.size, bank.items_per_look)
        found = self.budget.largest(self.verdict_passes, bank.size, seconds / max(1, to_come))
        if found < look:
            found = self.budget.largest(self.verdict_passes, look, seconds / max(1, tries))
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

    def _with_gauges(self, passes: Callable[[int], int], most: int, seconds: float) -> tuple[int, bool]:
        """How many items so many seconds hold; gauges are left out where they would halve them."""
        if self.budget is None:
            return most, True
        items = self.budget.largest(passes, most, seconds)
        beside = self.budget.largest(passes, most, seconds - self._gauge_cost / CAUTION)
        return (beside, True) if beside and 2 * beside >= items else (items, False)
