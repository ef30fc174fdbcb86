# SPDX-License-Identifier: Apache-2.0
"""The monitor: which items a look takes, what it finds, and the verdict at the end; no Trainer in sight.

::

    look k:   bank -> items -> model's scores ---.
                          `-> base's scores  ----+-> paired statistics -> Report -> alarm?
    verdict:  the whole bank, the same way
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from lightning_lora.errors import ConfigError, Notice
from lightning_lora.forgetting import statistics
from lightning_lora.forgetting.arguments import check_levels
from lightning_lora.forgetting.bank import ItemBank
from lightning_lora.forgetting.report import Report, TaskReport, compare, compare_pooled
from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import POOLED, LoadedTask
from lightning_lora.model.apply import adapter_modules, disable_adapters
from lightning_lora.ranks import rank_and_world

log = logging.getLogger(__name__)


#: Takes a report and the scores behind it, of the model and of the base, by task, item by item in one order.
Recorder = Callable[[Report, Mapping[str, Sequence[ItemScore]], Mapping[str, Sequence[ItemScore]]], None]


class Observer(Protocol):
    """Measures something else at each look; a gauge, by which nothing is decided."""

    def measure(self, scorer: Scorer, step: int) -> Mapping[str, float]:
        """Numbers by the keys under which they are logged, such as ``forgetting/kl``.

        Called on every rank, inside `Scorer.quietly`: the model evaluates without gradients, and what is drawn
        leaves no trace.

        Args:
            scorer: the model.
            step: optimizer steps taken.
        """
        ...


class Monitor:
    """Takes looks at a model in training, keeps what they found, and says when it forgets.

    The alarm: a lower confidence bound of the drop, of all items together or of one task alone, lies above
    the tolerance. A look takes it from soft accuracy, which shows a drop on fewer items; the verdict from
    accuracy itself. The error probability alpha is shared out over looks and, within a look, over the tests.

    Args:
        tasks: loaded tasks.
        items_per_look: items of a look over all tasks; see `ItemBank`.
        seed: shuffles the bank.
        tolerance: a drop that is nobody's concern [share of items].
        alpha: probability of an alarm in the whole run when no drop exceeds the tolerance. A run prolonged
            after its plan was used up spends it anew.
        observers: measure something else at each look.
        recorders: take each report with the scores behind it, on every rank.

    Raises:
        ConfigError: for values out of range.
    """

    def __init__(
        self,
        tasks: Mapping[str, LoadedTask],
        items_per_look: int = 250,
        seed: int = 0,
        tolerance: float = 0.005,
        alpha: float = 0.05,
        observers: Sequence[Observer] = (),
        recorders: Sequence[Recorder] = (),
    ) -> None:
        check_levels(tolerance, alpha)
        self.tasks = dict(tasks)
        self.observers = list(observers)
        self.recorders = list(recorders)
        self.bank = ItemBank({name: task.n_docs for name, task in tasks.items()}, items_per_look, seed)
        self.tolerance = tolerance
        self.alpha = alpha
        self.history: list[Report] = []
        self.looks = 0
        self._spent, self._tests = 0.0, 0  # of alpha: how much, on how many looks and verdicts
        self._base: dict[tuple[str, str, str], ItemScore] = {}

    @property
    def last_step(self) -> int | None:
        """Optimizer step of the newest look; None before the first."""
        return self.history[-1].step if self.history else None

    def look(self, scorer: Scorer, step: int, left: int | None = None) -> Report:
        """Compare model and base on the next items of the bank.

        Args:
            scorer: the model.
            step: optimizer steps taken.
            left: looks and verdicts of the run still to come, this one included; None when nobody knows.
        """
        if self.looks == self.bank.fresh_looks:
            log.info("Every item of some task has been used once; from here on items come again.")
        report = self._report(scorer, step, "look", self.bank.items(self.looks), left)
        self.looks += 1
        return report

    def verdict(self, scorer: Scorer, step: int, left: int | None = None) -> Report:
        """Compare model and base on every item of the bank.

        Args:
            scorer: the model.
            step: optimizer steps taken.
            left: looks and verdicts of the run still to come, this one included; None when nobody knows.
        """
        return self._report(scorer, step, "verdict", self.bank.everything(), left)

    def state_dict(self) -> dict[str, Any]:
        """Looks taken, their reports and the alpha spent, in primitives: some 400 bytes for a task and look."""
        return {
            "bank": self.bank.describe(),
            "looks": self.looks,
            "spent": self._spent,
            "tests": self._tests,
            "history": [report.to_dict() for report in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: no look and no item twice.

        Args:
            state: what `state_dict` gave. With other tasks, seed or items a look it does not fit the bank:
                a notice says so and the looks begin again.
        """
        self.history = [Report.from_dict(values) for values in state["history"]]
        self._spent, self._tests = state["spent"], state["tests"]
        if state["bank"] == self.bank.describe():
            self.looks = state["looks"]
            return
        _notice(
            "Forgetting: the checkpoint's looks were made with other tasks, another `seed` or another "
            "`items_per_eval`. Its history is kept; items are taken from the start of the new bank."
        )

    def _report(
        self, scorer: Scorer, step: int, kind: str, picked: Mapping[str, Sequence[int]], left: int | None
    ) -> Report:
        start = time.perf_counter()
        with scorer.quietly():
            model = scorer.score(self.tasks, picked)
            base = self._base_scores(scorer, model, picked)
            gauges = {key: float(x) for o in self.observers for key, x in o.measure(scorer, step).items()}
        if not self.history:
            _check_identity(scorer.module, model, base)
        tasks = {name: compare(model[name], base[name]) for name in model if model[name]}
        if not tasks:
            raise ConfigError("Forgetting: no item of any task has a right choice, so nothing can be compared.")
        pooled = compare_pooled([(model[name], base[name]) for name in tasks])
        alpha = self._spend(left)
        bounds = drop_bounds(tasks, pooled, alpha, soft=kind == "look")
        report = Report(
            step=step,
            kind=kind,
            tasks=tasks,
            pooled=pooled,
            drop_bounds=bounds,
            alpha=alpha,
            alarms=[name for name, lower in bounds.items() if lower > self.tolerance],
            seconds=time.perf_counter() - start,
            gauges=gauges,
        )
        self.history.append(report)
        for record in self.recorders:
            record(report, model, base)
        return report

    def _spend(self, left: int | None) -> float:
        """This look's share of alpha. A run prolonged after its plan was used up gets a new alpha."""
        if self.alpha - self._spent < 1e-9:
            self._spent, self._tests = 0.0, 0
        self._tests += 1
        alpha = statistics.spend(self.alpha - self._spent, self._tests, left)
        self._spent += alpha
        return alpha

    def _base_scores(
        self, scorer: Scorer, model: Mapping[str, Sequence[ItemScore]], picked: Mapping[str, Sequence[int]]
    ) -> dict[str, list[ItemScore]]:
        """The base's scores of the same items, from the cache where that is exact.

        In 16 bits a score depends a little on what shared its batch; there the base is asked in the very
        batches of the model. In 32 bits only unseen items are asked.
        """
        if scorer.exact:
            ask = {n: [s.doc_id for s in found if (n, *s.key) not in self._base] for n, found in model.items()}
        else:
            ask = {name: list(ids) for name, ids in picked.items()}
        if any(ask.values()):
            with disable_adapters(scorer.module):
                for name, found in scorer.score(self.tasks, ask).items():
                    self._base.update({(name, *score.key): score for score in found})
        return {name: [self._base[(name, *score.key)] for score in found] for name, found in model.items()}


def drop_bounds(tasks: Mapping[str, TaskReport], pooled: TaskReport, alpha: float, soft: bool) -> dict[str, float]:
    """Lower confidence bounds of the drop of all items together and of each task, alpha shared among them.

    Args:
        tasks: reports by task.
        pooled: the report of all items together; with one task it is that task's, and only one test is made.
        alpha: error probability of all bounds together.
        soft: take soft accuracy instead of accuracy.
    """
    tested = {POOLED: pooled, **(tasks if len(tasks) > 1 else {})}
    bounds = {}
    for name, found in tested.items():
        delta, se = (found.soft_delta, found.soft_delta_se) if soft else (found.delta, found.delta_se)
        bounds[name] = statistics.drop_bound(delta, se, found.n_items, alpha / len(tested)).lower
    return bounds


def _check_identity(
    module: nn.Module, model: Mapping[str, Sequence[ItemScore]], base: Mapping[str, Sequence[ItemScore]]
) -> None:
    """While nothing has been trained, adapters on and off must be one model, bit for bit."""
    if not all(adapter.untrained() for _, adapter in adapter_modules(module)):
        return
    pairs = [(m, b) for name in model for m, b in zip(model[name], base[name], strict=True)]
    differing = [(m, b) for m, b in pairs if m.loglikelihoods != b.loglikelihoods]
    if differing:
        most = max(abs(x - y) for m, b in differing for x, y in zip(m.loglikelihoods, b.loglikelihoods, strict=True))
        _notice(
            f"Forgetting: the adapters are untrained, yet {len(differing)} of {len(pairs)} items score otherwise with "
            f"adapters on than off (by up to {most:.2g} nats). Either the model computes differently from call to call "
            f"(a nondeterministic kernel, a random layer in eval mode), or something else than the adapters changed."
        )


def _notice(text: str) -> None:
    """A warning, from one rank: all of them come to it."""
    if rank_and_world()[0] == 0:
        warnings.warn(text, Notice, stacklevel=3)
