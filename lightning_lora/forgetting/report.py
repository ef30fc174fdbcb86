# SPDX-License-Identifier: Apache-2.0
"""The report of a look: what was found, by task and for all items together, as numbers, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_lora.forgetting import statistics
from lightning_lora.forgetting.budget import FEWEST
from lightning_lora.forgetting.scoring import ItemScore
from lightning_lora.forgetting.tasks import POOLED


@dataclass(frozen=True)
class TaskReport:
    """One task, or all together: the model against its base on the same items.

    Args:
        acc: accuracy of the model [share of items].
        acc_base: accuracy of the base on the same items [share of items].
        delta: acc less acc_base; below 0 is forgetting [share of items].
        delta_se: standard error of the paired difference [share of items].
        flips_lost: right with the base and wrong now [items].
        flips_gained: wrong with the base and right now [items].
        soft_delta: paired difference of soft accuracy [share of items].
        soft_delta_se: its standard error [share of items].
        n_items: how many items were compared.
        p_value: two-sided, that answers are lost as often as gained.
        n_groups: groups of items that belong together; None where every item stands alone.
        p_from: what gave the p-value: "mcnemar", the exact test of the flips, or "grouped z", the paired difference by
            its standard error over groups (see `statistics.grouped_p`).
    """

    acc: float
    acc_base: float
    delta: float
    delta_se: float
    flips_lost: int
    flips_gained: int
    soft_delta: float
    soft_delta_se: float
    n_items: int
    p_value: float
    n_groups: int | None = None
    p_from: str = "mcnemar"

    @property
    def n_independent(self) -> int:
        """How many groups, or items that stand alone, were compared."""
        return self.n_items if self.n_groups is None else self.n_groups


@dataclass(frozen=True)
class Report:
    """What one look found.

    Args:
        step: optimizer steps taken when it was made.
        kind: "look" for some items, "verdict" for the whole bank, or as much of it as a time budget holds.
        tasks: what was found, by task.
        pooled: all items of all tasks together, each with the same weight.
        alarms: what has dropped by more than the tolerance: names of tasks, and "pooled".
        left_out: items of the bank that a verdict left out, since the time budget did not hold them.
        seconds: how long it took [s].
        e_values: evidence of a drop above the tolerance that all looks so far have gathered, by task.
        e_value: their mean; from 1/alpha on it is an alarm.
        p_holm: at the verdict: `TaskReport.p_value` by task, made safe for being one of many by Holm.
        again: tasks of which the look took items that an earlier one had taken.
        learning: what was found on the target tasks, by task.
        gauges: further numbers, by the keys under which they are logged; nothing is decided by them.
        outcome: what the alarm led to, in primitives; empty when nothing was changed.
    """

    step: int
    kind: str
    tasks: dict[str, TaskReport]
    pooled: TaskReport
    alarms: list[str]
    seconds: float
    left_out: int = 0
    e_values: dict[str, float] = field(default_factory=dict)
    e_value: float = 1.0
    p_holm: dict[str, float] = field(default_factory=dict)
    again: list[str] = field(default_factory=list)
    learning: dict[str, TaskReport] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    outcome: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report in primitives, as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote."""
        nested = {
            key: {name: TaskReport(**found) for name, found in values.get(key, {}).items()}
            for key in ("tasks", "learning")
        }
        return cls(**{**values, **nested, "pooled": TaskReport(**values["pooled"])})

    def metrics(self) -> dict[str, float]:
        """The numbers by the keys under which they are logged."""
        named = {f"forgetting/{name}": task for name, task in {**self.tasks, POOLED: self.pooled}.items()}
        named |= {f"learning/{name}": task for name, task in self.learning.items()}
        found = {
            f"{name}/{key}": float(value)
            for name, task in named.items()
            for key, value in asdict(task).items()
            if isinstance(value, int | float) and (key not in ("p_value", "soft_delta_se") or self.kind == "verdict")
        }
        found |= {f"forgetting/{name}/p_holm": p for name, p in self.p_holm.items()}
        return {**found, **self.gauges, "forgetting/e_value": self.e_value, "forgetting/seconds": self.seconds}

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{name} {100 * r.acc_base:.1f} -> {100 * r.acc:.1f} % ({100 * r.delta:+.1f}{_error(r)})"
            for name, r in ({**self.tasks, POOLED: self.pooled} if len(self.tasks) > 1 else self.tasks).items()
        ]
        part = f" ({self.left_out:,} items of the bank left out: beyond the time budget)" if self.left_out else ""
        return (
            f"forgetting, {self.kind} at step {self.step}{part}: {'; '.join(parts)}, e-value {self.e_value:.3g} "
            f"[{self.seconds:.1f} s]"
        )


def _error(found: TaskReport) -> str:
    """The standard error in points; of a handful of items their number, from which none can be had."""
    if found.n_items < FEWEST:
        return f", {found.n_items} item{'s' * (found.n_items > 1)}"
    return f" +- {100 * found.delta_se:.1f}"


def compare(model: Sequence[ItemScore], base: Sequence[ItemScore]) -> TaskReport:
    """The paired statistics of one task.

    Args:
        model: the model's scores.
        base: the base's, of the same items in the same order.
    """
    return compare_pooled([(model, base)])


def compare_pooled(tasks: Sequence[tuple[Sequence[ItemScore], Sequence[ItemScore]]]) -> TaskReport:
    """The paired statistics over the items of several tasks, every item with the same weight.

    Soft accuracy is scaled within each task, since margins of different tasks are of different sizes. Standard errors
    are over groups where a task declares them.

    Args:
        tasks: scores of model and base, by task.
    """
    correct = [s.correct for model, _ in tasks for s in model]
    correct_base = [s.correct for _, base in tasks for s in base]
    soft = [x for model, _ in tasks for x in statistics.soft_accuracy([s.margin for s in model])]
    soft_base = [x for _, base in tasks for x in statistics.soft_accuracy([s.margin for s in base])]
    groups = groups_of([model for model, _ in tasks])
    n_groups = None if groups is None else len(set(groups))
    delta, delta_se = statistics.paired_difference(correct, correct_base, groups)
    soft_delta, soft_delta_se = statistics.paired_difference(soft, soft_base, groups)
    lost, gained = statistics.flips(correct, correct_base)
    return TaskReport(
        acc=statistics.accuracy(correct),
        acc_base=statistics.accuracy(correct_base),
        delta=delta,
        delta_se=delta_se,
        flips_lost=lost,
        flips_gained=gained,
        soft_delta=soft_delta,
        soft_delta_se=soft_delta_se,
        n_items=len(correct),
        p_value=(
            statistics.mcnemar_p(lost, gained) if n_groups is None else statistics.grouped_p(delta, delta_se, n_groups)
        ),
        n_groups=n_groups,
        p_from="mcnemar" if n_groups is None else "grouped z",
    )


def alarm_text(report: Report, alpha: float, tolerance: float) -> str:
    """Why a report has alarms, in sentences.

    Args:
        report: a look or verdict with alarms.
        alpha: error probability.
        tolerance: a drop that is nobody's concern [share of items].
    """
    found = {**report.tasks, POOLED: report.pooled}
    if report.kind == "look":
        below = ", ".join(
            f"{n} {100 * found[n].soft_delta:+.1f} +- {100 * found[n].soft_delta_se:.1f}"
            for n in report.alarms
            if n in found
        )
        return (
            f"Forgetting at step {report.step}: the looks so far are evidence of {report.e_value:.3g} to 1 for a drop "
            f"of more than {100 * tolerance:g} points below the base; an alarm from {1 / alpha:.3g} on (alpha "
            f"{alpha:g}). Soft accuracy at this look, in points: {below}."
        )
    below = ", ".join(f"{n} {100 * found[n].delta:+.1f} +- {100 * found[n].delta_se:.1f}" for n in report.alarms)
    return (
        f"Forgetting at step {report.step}, the verdict: below the base by more than {100 * tolerance:g} points at an "
        f"error probability of {alpha:g}, in points of accuracy: {below}."
    )


def groups_of(tasks: Sequence[Sequence[ItemScore]]) -> list[tuple[int, str | int]] | None:
    """The group of each item of all tasks, one without is a group of its own; None where no task declares any.

    Args:
        tasks: scores by task.
    """
    if all(score.group is None for scores in tasks for score in scores):
        return None
    return [
        (k, i if score.group is None else score.group)
        for k, scores in enumerate(tasks)
        for i, score in enumerate(scores)
    ]
