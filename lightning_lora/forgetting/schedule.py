# SPDX-License-Identifier: Apache-2.0
"""The schedule: after which optimizer steps a look is due, and how many looks are still to come."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_lora.errors import ConfigError


@dataclass(frozen=True)
class RunLength:
    """How long a run is by plan; None stands for what nobody knows.

    Args:
        steps: optimizer steps after which it ends.
        epoch: optimizer steps of one epoch.
    """

    steps: int | None
    epoch: int | None


@dataclass(frozen=True)
class Schedule:
    """When to look. Looks at the start and at the end of a run are not its concern.

    Args:
        every_n_steps: whenever so many optimizer steps have been taken; None for never.
        every_n_epochs: at the end of every so many epochs; None for never.
        at_steps: further optimizer steps, from 1.
        at_fractions: further shares of the run, above 0, up to 1. They need a run whose length is known.
    """

    every_n_steps: int | None = None
    every_n_epochs: int | None = None
    at_steps: tuple[int, ...] = ()
    at_fractions: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any look in it."""
        return bool(self.every_n_steps or self.every_n_epochs or self.at_steps or self.at_fractions)

    def fixed(self, end: int | None) -> set[int]:
        """The steps of `at_steps`, and of `at_fractions` in a run of ``end`` steps: the first at or past each share."""
        return {*self.at_steps, *(() if end is None else (max(1, math.ceil(f * end)) for f in self.at_fractions))}

    def is_due(self, before: int, now: int, end: int | None) -> bool:
        """Whether a look is due among the optimizer steps after ``before`` up to ``now``.

        Gradient accumulation repeats a step and several optimizers jump over some, so a look is due when its
        step is passed, not when it is met.

        Args:
            before: optimizer steps taken when this was asked last.
            now: optimizer steps taken.
            end: optimizer steps after which the run ends; None when nobody knows.
        """
        n = self.every_n_steps
        return (n is not None and now // n > before // n) or any(before < s <= now for s in self.fixed(end))

    def is_due_after_epoch(self, epochs: int) -> bool:
        """Whether a look is due at the end of an epoch.

        Args:
            epochs: epochs done, this one included.
        """
        return self.every_n_epochs is not None and epochs % self.every_n_epochs == 0

    def looks_left(self, step: int, length: RunLength) -> int | None:
        """Looks after ``step``; None when the length of the run is not known.

        Args:
            step: optimizer steps taken.
            length: of the run.
        """
        end = length.steps
        if end is None:
            return None
        due = self.fixed(end)
        if self.every_n_steps is not None:
            due.update(range(self.every_n_steps, end + 1, self.every_n_steps))
        if self.every_n_epochs is not None:
            if length.epoch is None:
                return None
            every = length.epoch * self.every_n_epochs
            due.update(range(every, end + 1, every))
        return sum(step < s <= end for s in due)

    def check(self, end: int | None) -> list[int]:
        """Those of `at_steps` that a run of ``end`` steps never comes to.

        Args:
            end: optimizer steps after which the run ends; None when nobody knows.

        Raises:
            ConfigError: for `at_fractions` of a run whose length is not known.
        """
        if end is None and self.at_fractions:
            raise ConfigError(
                "`at_fractions` are shares of the run, and its length is not known. Set the Trainer's `max_steps`, or "
                "use `every_n_steps` or `at_steps`."
            )
        return [] if end is None else [step for step in self.at_steps if step > end]
