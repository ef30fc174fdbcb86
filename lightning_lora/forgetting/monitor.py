# SPDX-License-Identifier: Apache-2.0
"""The monitor: which items a look takes, what it finds, and the verdict at the end; no Trainer in sight.

::

    look k:   bank -> fresh items -> model's scores ---.
                                 `-> base's scores  ---+-> paired statistics -> Report
                                                       `-> bets, one a task  -> alarm?
    verdict:  the whole bank -> paired statistics, tests of them -> Report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, Protocol

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting import statistics
from lightning_lora.forgetting.arguments import check_levels
from lightning_lora.forgetting.bank import ItemBank
from lightning_lora.forgetting.gauges import on_items
from lightning_lora.forgetting.paired import PairedScores, Scores
from lightning_lora.forgetting.report import Report, TaskReport, compare, compare_pooled, groups_of
from lightning_lora.forgetting.scoring import Scorer, untrained
from lightning_lora.forgetting.sequential import EProcess, closed_e_values, mean_e_value, raises_alarm
from lightning_lora.forgetting.tasks import POOLED, LoadedTask
from lightning_lora.ranks import notice

#: Takes a report and the scores behind it, of the model and of the base, by task and target task, item by item in one
#: order.
Recorder = Callable[[Report, Scores, Scores], None]


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

    The alarm: each task's bet against "no drop of soft accuracy above the tolerance" goes on from look to look on
    fresh items, the mean of their capitals has come to 1/alpha (see `EProcess`), and over the same looks more answers
    were lost than gained (see `raises_alarm`). The verdict, on every item of the
    bank, tests accuracy itself, once: the drop's one-sided lower bound lies above the tolerance, Holm's correction
    over the tasks and all items together.

    Target tasks are scored at the same looks and by the same paired statistics, and nothing is decided by them: they
    say what was learned.

    Args:
        tasks: loaded tasks.
        items_per_look: items of a look over all tasks, and as many over all target tasks; see `ItemBank`.
        seed: shuffles the bank.
        tolerance: a drop that is nobody's concern [share of items].
        alpha: probability of an alarm at any look of the run when no drop of soft accuracy exceeds the tolerance, and
            apart from it of one at the verdict, when no drop of accuracy does.
        targets: loaded target tasks.
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
        targets: Mapping[str, LoadedTask] | None = None,
        observers: Sequence[Observer] = (),
        recorders: Sequence[Recorder] = (),
    ) -> None:
        check_levels(tolerance, alpha)
        self.tolerance = tolerance
        self.alpha = alpha
        self.pairs = PairedScores(tasks)
        self.bank = _bank(tasks, items_per_look, seed)
        self.target_pairs = PairedScores(targets or {})
        self.target_bank = _bank(targets or {}, items_per_look, seed)
        self.observers = list(observers)
        self.recorders = list(recorders)
        #: How long the observers took at the newest look, None where they did not measure [s].
        self.observed_seconds: float | None = None
        self.history: list[Report] = []
        largest = self.bank.largest_groups
        self.bets = {name: EProcess(tolerance, alpha, largest_group=largest[name]) for name in tasks}

    @property
    def last_step(self) -> int | None:
        """Optimizer step of the newest look; None before the first."""
        return self.history[-1].step if self.history else None

    @property
    def e_value(self) -> float:
        """The evidence of a drop above the tolerance that all looks have gathered: the mean of the tasks' capitals."""
        return mean_e_value([bet.e_value for bet in self.bets.values()])

    def look(
        self, scorer: Scorer, step: int, left: int | None = None, items: int | None = None, observe: bool = True
    ) -> Report:
        """Compare model and base on the next items of the bank.

        Args:
            scorer: the model.
            step: optimizer steps taken.
            left: looks of the run still to come, this one included; None when nobody knows.
            items: how many items to take; None for ``items_per_look``.
            observe: whether the observers measure too.
        """
        used_up = set(self.bank.used_up)
        picked, targets = self.bank.take(items), self.target_bank.take(items)
        again = [name for name in picked if name in used_up]
        if set(again) - {name for report in self.history for name in report.again}:
            notice(
                f"Forgetting: every item of {', '.join(again)} has been looked at; from here on items come again, "
                f"shuffled anew, and an alarm speaks of these very items, no longer of others like them. Fewer "
                f"`items_per_eval` or fewer looks keep them fresh."
            )
        return self._report(scorer, step, "look", picked, targets, again, left, observe)

    def verdict(self, scorer: Scorer, step: int, items: int | None = None, observe: bool = True) -> Report:
        """Compare model and base on every item of the bank.

        Args:
            scorer: the model.
            step: optimizer steps taken.
            items: how many items at most, those first that no look has taken; None for all.
            observe: whether the observers measure too.
        """
        picked, targets = self.bank.sample(items), self.target_bank.sample(items)
        return self._report(scorer, step, "verdict", picked, targets, [], None, observe)

    def begin_anew(self) -> None:
        """Let the bets begin with a capital of 1 again: another question is asked from here on."""
        for bet in self.bets.values():
            bet.reset()

    def state_dict(self) -> dict[str, Any]:
        """Items taken, capitals, the base's scores and every report, in primitives."""
        return {
            "bank": self.bank.state_dict(),
            "target_bank": self.target_bank.state_dict(),
            "bets": {name: bet.state_dict() for name, bet in self.bets.items()},
            "base": self.pairs.state_dict(),
            "target_base": self.target_pairs.state_dict(),
            "history": [report.to_dict() for report in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken: no look and no item twice, and the same capitals.

        Args:
            state: what `state_dict` gave. With other tasks, another seed or tolerance a notice says what begins again.
        """
        self.history = [Report.from_dict(values) for values in state["history"]]
        self.pairs.load_state_dict(state["base"])
        self.target_pairs.load_state_dict(state["target_base"])
        self.target_bank.load_state_dict(state["target_bank"])
        if not self.bank.load_state_dict(state["bank"]):
            notice(
                "Forgetting: the checkpoint's looks were made with other tasks or groups of items, or another `seed`. "
                "Its history is kept; items are taken from the start of the new bank, and the evidence for an alarm "
                "begins anew."
            )
            return
        try:
            for name, bet in self.bets.items():
                bet.load_state_dict(state["bets"][name])
        except ConfigError as error:
            self.begin_anew()
            notice(f"Forgetting: the evidence for an alarm begins anew. {error}")

    def _report(
        self,
        scorer: Scorer,
        step: int,
        kind: str,
        picked: Mapping[str, Sequence[int]],
        targets: Mapping[str, Sequence[int]],
        again: list[str],
        left: int | None,
        observe: bool,
    ) -> Report:
        start = time.perf_counter()
        with scorer.quietly():
            model, base = self.pairs.score(scorer, picked)
            learned = self.target_pairs.score(scorer, targets) if targets else ({}, {})
            between = time.perf_counter()
            observers = self.observers if observe else []
            gauges = {key: float(x) for o in observers for key, x in o.measure(scorer, step).items()}
            self.observed_seconds = time.perf_counter() - between if observers else None
            gauges |= on_items(model, base)
        if not model:
            raise ConfigError("Forgetting: no item of any task has a right choice, so nothing can be compared.")
        if not self.history:
            _check_identity(scorer.module, model, base)
        tasks = {name: compare(model[name], base[name]) for name in model}
        p_holm: dict[str, float] = {}
        pooled = compare_pooled([(model[name], base[name]) for name in model])
        if kind == "look":
            for name, bet in self.bets.items():
                bet.update(_soft_drops(model, base, name), left, groups_of([model.get(name, [])]))
            alarms = self._alarms_of_looks(tasks)
        else:
            alarms, p_holm = self._alarms_of_verdict(tasks, pooled)
        report = Report(
            step=step,
            kind=kind,
            tasks=tasks,
            pooled=pooled,
            e_values={name: bet.e_value for name, bet in self.bets.items()},
            e_value=self.e_value,
            p_holm=p_holm,
            alarms=alarms,
            left_out=self.bank.size - sum(map(len, picked.values())) if kind == "verdict" else 0,
            again=again,
            learning={name: compare(learned[0][name], learned[1][name]) for name in learned[0]},
            gauges=gauges,
            seconds=time.perf_counter() - start,
        )
        self.history.append(report)
        for record in self.recorders:
            record(report, {**model, **learned[0]}, {**base, **learned[1]})
        return report

    def _alarms_of_looks(self, newest: Mapping[str, TaskReport]) -> list[str]:
        """All together when the capital is there and answers with it, and the tasks that stand out by themselves."""
        if self.e_value < 1.0 / self.alpha:
            return []
        flips = {name: self._flips(name, newest) for name in self.bets}
        e_values = {POOLED: self.e_value}
        if len(self.bets) > 1:
            e_values |= closed_e_values({name: bet.e_value for name, bet in self.bets.items()})
        flips[POOLED] = (sum(lost for lost, _ in flips.values()), sum(gained for _, gained in flips.values()))
        return [name for name, e in e_values.items() if raises_alarm(e, self.alpha, *flips[name])]

    def _flips(self, name: str, newest: Mapping[str, TaskReport]) -> tuple[int, int]:
        """Answers of a task lost and gained over the looks that its bet has gone through, the newest included."""
        looks = [report.tasks for report in self.history if report.kind == "look"] + [newest]
        found = [tasks[name] for tasks in looks if name in tasks]
        found = found[len(found) - self.bets[name].looks :]
        return sum(task.flips_lost for task in found), sum(task.flips_gained for task in found)

    def _alarms_of_verdict(
        self, tasks: Mapping[str, TaskReport], pooled: TaskReport
    ) -> tuple[list[str], dict[str, float]]:
        """What has dropped by more than the tolerance, and the tasks' p-values, both corrected by Holm."""
        tested = {POOLED: pooled, **(tasks if len(tasks) > 1 else {})}
        above = statistics.holm({name: drop_p(found, self.tolerance) for name, found in tested.items()})
        changed = statistics.holm({name: found.p_value for name, found in tasks.items()})
        return [name for name, p in above.items() if p < self.alpha], changed


def drop_p(found: TaskReport, tolerance: float) -> float:
    r"""One-sided p-value that the drop of accuracy is at most the tolerance.

    .. math:: p = 1 - \Phi\left(\frac{-\Delta - \tau}{\max(SE, 1/n)}\right)

    The floor :math:`1/n` is the error of one changed answer among n, or of one changed group among n groups: a handful
    of items that happen to agree does not pass for certainty.

    Args:
        found: what was compared.
        tolerance: :math:`\tau` [share of items].
    """
    return NormalDist().cdf((found.delta + tolerance) / max(found.delta_se, 1.0 / found.n_independent))


def _bank(tasks: Mapping[str, LoadedTask], items_per_look: int, seed: int) -> ItemBank:
    """The bank of these tasks."""
    of = {name: groups for name, task in tasks.items() if (groups := task.groups()) is not None}
    return ItemBank({name: task.n_docs for name, task in tasks.items()}, items_per_look, seed, of)


def _soft_drops(model: Scores, base: Scores, name: str) -> list[float]:
    """What a task's bet is on: soft accuracy of the base less that of the model, item by item."""
    now, before = (statistics.soft_accuracy([s.margin for s in side.get(name, [])]) for side in (model, base))
    return [b - m for m, b in zip(now, before, strict=True)]


def _check_identity(module: nn.Module, model: Scores, base: Scores) -> None:
    """While nothing has been trained, adapters on and off must be one model, bit for bit."""
    if not untrained(module):
        return
    pairs = [(m, b) for name in model for m, b in zip(model[name], base[name], strict=True)]
    differing = [(m, b) for m, b in pairs if m.loglikelihoods != b.loglikelihoods]
    if differing:
        most = max(abs(x - y) for m, b in differing for x, y in zip(m.loglikelihoods, b.loglikelihoods, strict=True))
        notice(
            f"Forgetting: the adapters are untrained, yet {len(differing)} of {len(pairs)} items score otherwise with "
            f"adapters on than off (by up to {most:.2g} nats). Either the model computes differently from call to call "
            f"(a nondeterministic kernel, a random layer in eval mode), or something else than the adapters changed."
        )
