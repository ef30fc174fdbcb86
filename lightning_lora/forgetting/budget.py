# SPDX-License-Identifier: Apache-2.0
r"""The time budget: how many items a look may have, and when, so that looking stays a small share of the run.

Looks are paid from what training has earned by then, so the share holds wherever the run ends:

.. math:: spent \le \frac{\sigma}{1 - \sigma}\, trained \quad \iff \quad spent \le \sigma\,(trained + spent)

with the share :math:`\sigma` and seconds of wall clock. Up to half of what was earned is kept back for the verdict.
What other evaluation takes inside ``fit`` (a sweep's validation, another monitor's looks) neither earns nor costs.
What a look will take is foretold from the looks before it, :math:`seconds = a + b \cdot passes`, one pass being one
item scored by one model. Only time is measured: which items come, and what they say, has no part in the sizes.

Rank 0's clock decides; the others are told.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

#: What is foretold may take this share of the seconds that there are: a look can take longer than the ones before it.
CAUTION = 0.7

#: A look of fewer items is not worth its fixed costs.
FEWEST = 8

#: In a run whose length is known there are at least so many occasions to look; in another, one whenever the number of
#: steps has doubled.
OCCASIONS = 8

#: Before gauges have been measured they are taken to last so many times as long as the first look.
GAUGES = 20

#: Optimizer steps after which the pace of training is known well enough.
FIRST = 16


class Budget:
    """A ledger of seconds, and what it allows.

    Args:
        share: of the run's wall clock that may be spent, in (0, 1).
        clock: seconds that only grow.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share = share
        self.next_step: int | None = None
        self.spent = 0.0
        #: What gauges took when they were measured last, None before [s].
        self.gauges: float | None = None
        self._clock = clock
        self._trained, self._steps = 0.0, 0
        self._since: float | None = None  # while training goes on: since when it was not counted in yet
        self._since_step = 0
        #: What the first look took, which found everything cold; None before [s].
        self.first: float | None = None
        #: Whether a pass was timed after the cold one.
        self.is_warm = False
        self._observed: deque[tuple[int, float]] = deque(maxlen=6)

    @property
    def trained(self) -> float:
        """Seconds of training so far, over all fits of the run [s]."""
        return self._trained + (0.0 if self._since is None else self._clock() - self._since)

    @property
    def balance(self) -> float:
        """What training has earned less what was spent [s]."""
        return self._earned - self.spent

    @property
    def _earned(self) -> float:
        return self.share / (1.0 - self.share) * self.trained

    def begin(self, step: int) -> None:
        """Training begins, or goes on after a resume.

        Args:
            step: optimizer steps taken.
        """
        self._since, self._since_step = self._clock(), step

    @contextmanager
    def spending(self, step: int, passes: int = 0) -> Iterator[None]:
        """Inside, time is spent; outside, it is earned.

        Args:
            step: optimizer steps taken.
            passes: items to be scored, each once for every model that is asked; 0 where this says nothing of looks.
        """
        start = self._clock()
        try:
            with self.pausing(step):
                yield
        finally:
            seconds = self._clock() - start
            self.spent += seconds
            if passes:
                self.note(passes, seconds)

    @contextmanager
    def pausing(self, step: int) -> Iterator[None]:
        """Inside, nothing is earned; what is spent inside counts.

        Args:
            step: optimizer steps taken.
        """
        went_on = self._since is not None
        self._trained = self.trained
        self._steps += step - self._since_step if went_on else 0
        self._since, self._since_step = None, step
        try:
            yield
        finally:
            if went_on:
                self.begin(step)

    def note(self, passes: int, seconds: float) -> None:
        """Remember how long a look took.

        Args:
            passes: items that were scored, each once for every model that was asked.
            seconds: how long that took, gauges left out [s].
        """
        self._observed.append((passes, seconds))
        self.first = seconds if self.first is None else self.first

    @property
    def largest_timed(self) -> int:
        """Passes of the largest look that is remembered."""
        return max((passes for passes, _ in self._observed), default=0)

    @property
    def for_timing(self) -> float:
        """What timing passes may take: as much as the first look did on credit, or part of what there is [s]."""
        return max(self.first or 0.0, CAUTION * self.balance / 4)

    def forget_cold(self) -> None:
        """Foretell nothing from what was timed so far: what comes is warm."""
        self._observed.clear()
        self.is_warm = True

    @property
    def gauge_cost(self) -> float:
        """What gauges are going to take; infinite before the first look [s]."""
        if self.gauges is None:
            return math.inf if self.first is None else GAUGES * self.first
        return self.gauges

    def cost(self, passes: int) -> float:
        """What so many passes are going to take, by the looks so far; infinite before the first [s].

        A line through the newest looks. A pass beyond the largest of them is taken to cost at least half of what one
        cost in it on average, and all of it where the looks show no line: two short times can differ by anything.

        Args:
            passes: items to be scored, each once for every model that is asked.
        """
        if not self._observed:
            return math.inf
        n = len(self._observed)
        mean_p = sum(p for p, _ in self._observed) / n
        mean_s = sum(s for _, s in self._observed) / n
        spread = sum((p - mean_p) ** 2 for p, _ in self._observed)
        slope = sum((p - mean_p) * (s - mean_s) for p, s in self._observed) / spread if spread else 0.0
        fixed = mean_s - slope * mean_p
        largest, seconds = max(self._observed)
        if slope <= 0.0:
            return mean_s + seconds / largest * max(0, passes - largest)
        if fixed < 0.0:
            return max(s / p for p, s in self._observed) * passes
        beyond = max(slope, seconds / largest / 2)
        return fixed + slope * min(passes, largest) + beyond * max(0, passes - largest)

    def largest(self, passes: Callable[[int], int], most: int, seconds: float) -> int:
        """The largest number of items that so many seconds hold; 0 when they do not hold `FEWEST`.

        Args:
            passes: passes that so many items need; it does not fall.
            most: items that are wanted.
            seconds: how long it may take [s].
        """

        def fits(items: int) -> bool:
            return self.cost(passes(items)) <= CAUTION * seconds

        low, high = min(FEWEST, most), most
        if not fits(low):
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def for_look(self, reserve: float) -> float:
        """Seconds that a look may take now [s].

        Args:
            reserve: what the end of the run is going to take; of what was earned up to half is kept for it [s].
        """
        return self.balance - min(reserve, self._earned / 2)

    def plan(self, step: int, end: int | None, wanted: float, reserve: float) -> int:
        """The optimizer step of the next occasion to look, where no schedule says it; it becomes `next_step`.

        Args:
            step: optimizer steps taken.
            end: those after which the run ends; None when nobody knows.
            wanted: what a look of full size is going to take [s].
            reserve: what the end of the run is going to take [s].
        """
        taken = self._steps + step - self._since_step
        part = None if end is None else max(1, end // OCCASIONS)
        if not taken:
            wait = min(FIRST, part or FIRST)
        else:
            earned = self.share / (1.0 - self.share) * self.trained / taken
            earned *= 0.5 if reserve > self._earned / 2 else 1.0
            missing = max(0.0, wanted / CAUTION - self.for_look(reserve))
            wait = max(1, math.ceil(min(missing / earned, 1e9) if earned > 0.0 else FIRST))
        self.next_step = step + min(wait, max(FIRST, taken) if part is None else part - step % part)
        return self.next_step

    def state_dict(self) -> dict[str, Any]:
        """The ledger, in primitives."""
        return {
            "spent": self.spent,
            "trained": self.trained,
            "steps": self._steps,
            "since_step": self._since_step,
            "next_step": self.next_step,
            "gauges": self.gauges,
            "first": self.first,
            "is_warm": self.is_warm,
            "observed": [list(seen) for seen in self._observed],
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on with the ledger of `state_dict`; the time between the two is nobody's.

        Args:
            state: what `state_dict` gave.
            step: optimizer steps taken by then.
        """
        self.spent, self._trained = state["spent"], state["trained"]
        self._steps = state["steps"] + step - state["since_step"]
        self.next_step, self.gauges = state["next_step"], state["gauges"]
        self.first, self.is_warm = state.get("first"), state.get("is_warm", True)  # states from before timing passes
        self._observed.clear()
        self._observed.extend((int(p), float(s)) for p, s in state["observed"])
        self.begin(step)
