# SPDX-License-Identifier: Apache-2.0
"""The response to an alarm: what is said, what becomes of the adapters, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.errors import TaskError
from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.remedies import SCALES_TRIED, outcome_text, roll_back, scale_down
from lightning_lora.forgetting.report import Report, alarm_text
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.sizes import Sizes
from lightning_lora.forgetting.snapshots import KEPT, Snapshots
from lightning_lora.ranks import from_rank_zero, together

#: What `on_forgetting` may be, and how many candidates each may ask the bank about.
TRIES = {"warn": 0, "stop": 0, "rollback": KEPT, "scale": SCALES_TRIED}

#: A look is one to go back to while the evidence, 1 at the start, has not begun to build up.
HELD = 1.1


class Response:
    """Answers the first alarm of a run, and keeps what is needed for it.

    Args:
        action: one of `TRIES`.
        monitor: whose alarms.
        sizes: on how many items a remedy must hold.
    """

    def __init__(self, action: str, monitor: Monitor, sizes: Sizes) -> None:
        self.action = action
        self.monitor = monitor
        self.sizes = sizes
        self.forget()

    def forget(self) -> None:
        """Begin anew: no alarm, no snapshot."""
        self.snapshots = Snapshots()
        #: ``by``, ``step``, and ``rolled_back_to`` or ``scale`` with ``holds`` and ``items``; None without an alarm.
        self.outcome: dict[str, Any] | None = None
        self._said: set[str] = set()

    @property
    def changes_adapters(self) -> bool:
        """Whether the answer leaves less of the adapters."""
        return TRIES[self.action] > 0

    @property
    def is_owed(self) -> bool:
        """Whether there was an alarm and the adapters are still as they were."""
        return self.changes_adapters and self.outcome is not None and "holds" not in self.outcome

    def begin(self, model: nn.Module, step: int) -> None:
        """Keep the adapters with which the run begins, where there is nothing yet to go back to.

        Args:
            model: the model.
            step: optimizer steps taken.
        """
        if self.action == "rollback" and not self.snapshots.steps:
            self.snapshots.take(model, step)

    def hear(self, scorer: Scorer, report: Report, at_once: bool) -> tuple[str, bool]:
        """Take note of a report, and act on its alarms. Every rank comes here, and rank 0's alarms count.

        Args:
            scorer: the model; its adapters may be changed.
            report: the newest of the monitor, which is given the outcome.
            at_once: whether training ends now. Otherwise the adapters are left for `settle`, at its end.

        Returns:
            What to say, "" for nothing, and whether training is to end for it.
        """
        alarms = from_rank_zero(report.alarms)
        if not alarms:
            held = report.kind == "look" and report.e_value <= HELD
            if self.action == "rollback" and held and self.outcome is None:
                self.snapshots.take(scorer.module, report.step)
            return "", False
        text = alarm_text(report, self.monitor.alpha, self.monitor.tolerance)
        answered = self.outcome is None and (self.changes_adapters or (self.action == "stop" and report.kind == "look"))
        news = bool(set(alarms) - self._said) or report.kind == "verdict"
        self._said |= set(alarms)
        if not answered:
            return text if news else "", False
        self.outcome = {"by": self.action, "step": report.step}
        if at_once:
            self.settle(scorer)
        self.monitor.history[-1] = replace(report, outcome=dict(self.outcome))
        return f"{text} {outcome_text(self.outcome)}".rstrip(), report.kind == "look"

    def settle(self, scorer: Scorer) -> None:
        """Do to the adapters what is owed, if anything is.

        Args:
            scorer: the model; its adapters are changed.
        """
        if self.outcome is None or not self.is_owed:
            return
        pairs, tolerance = self.monitor.pairs, self.monitor.tolerance
        with together("act on forgetting", TaskError):
            picked = self.monitor.bank.sample(self.sizes.remedy())
            if self.action == "rollback":
                self.outcome |= roll_back(scorer, pairs, picked, self.snapshots, tolerance)
            else:
                self.outcome |= scale_down(scorer, pairs, picked, tolerance)

    def state_dict(self) -> dict[str, Any]:
        """Snapshots and outcome, as primitives and tensors."""
        return {
            "snapshots": self.snapshots.state_dict(),
            "outcome": None if self.outcome is None else dict(self.outcome),
            "said": sorted(self._said),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.snapshots.load_state_dict(state["snapshots"])
        self.outcome, self._said = state["outcome"], set(state["said"])
