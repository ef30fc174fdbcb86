# SPDX-License-Identifier: Apache-2.0
"""The verdict in words: what was forgotten, how sure that is, and what was done about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lightning_lora.forgetting.power import required_items
from lightning_lora.forgetting.remedies import outcome_text
from lightning_lora.forgetting.report import Report, TaskReport
from lightning_lora.forgetting.tasks import POOLED
from lightning_lora.reporting.forgetting import Z95
from lightning_lora.reporting.learning import pooled_learning
from lightning_lora.reporting.record import Watch


class Verdict(NamedTuple):
    """What to think of a run.

    Args:
        mark: "forgets", "holds" or "open".
        headline: in a few words.
        sentences: in full.
    """

    mark: str
    headline: str
    sentences: list[str]


def verdict_in_words(watch: Watch) -> Verdict:
    """What a monitor's looks come to.

    Args:
        watch: with one look at least.
    """
    history = [Report.from_dict(values) for values in watch.history]
    report = next((r for r in reversed(history) if r.kind == "verdict"), history[-1])
    mark, headline, judgement = _judged(report, watch.tolerance)
    sentences = [_compared(report), _before(history, report), judgement, *_of_looks(history, watch.alpha)]
    if watch.outcome:
        sentences.append(outcome_text(watch.outcome))
    if report.learning:
        sentences.append(_learned(report))
    return Verdict(mark, headline, [sentence for sentence in sentences if sentence])


def interval(delta: float, error: float) -> str:
    """A 95 % interval in points.

    Args:
        delta: a difference [share of items].
        error: its standard error [share of items].
    """
    low, high = (round(100 * (delta + sign * Z95 * error), 1) + 0.0 for sign in (-1, 1))  # no "-0.0"
    return f"{low:+.1f} to {high:+.1f}"


def points(share: float) -> str:
    """A share of items in points.

    Args:
        share: of items.
    """
    return f"{100 * share:g} point{'' if round(100 * share, 9) == 1 else 's'}"


def _compared(report: Report) -> str:
    found = report.pooled
    what = "all items" if report.kind == "verdict" and not report.left_out else "items"
    moved = (
        f"a difference of {100 * found.delta:+.1f} points (95 % interval {interval(found.delta, found.delta_se)})"
        if found.flips_lost or found.flips_gained
        else "not one answer has changed"
    )
    left_out = f" {report.left_out:,} items were left out: beyond the time budget." if report.left_out else ""
    return (
        f"After {report.step:,} optimizer steps the model answers {100 * found.acc:.1f} % of {found.n_items:,} "
        f"questions of the general tasks right ({what} of the bank), its base {100 * found.acc_base:.1f} %: {moved}. "
        f"{found.flips_lost:,} answers were lost and {found.flips_gained:,} gained.{left_out}"
    )


def _judged(report: Report, tolerance: float | None) -> tuple[str, str, str]:
    found = report.pooled
    if report.alarms:
        names = ", ".join("all tasks together" if name == POOLED else name for name in report.alarms)
        above = "" if tolerance is None else f" by more than the tolerance of {points(tolerance)}"
        return "forgets", "The model forgets", f"It lies below its base{above}, and not by chance, in: {names}."
    if tolerance is None:
        words = "No drop above the run's tolerance was shown; how much that is the files do not say."
        return "open", f"No alarm by the {report.kind}", words
    allowed = points(tolerance)
    if report.kind == "verdict" and found.n_items > 1 and -(found.delta - Z95 * _error(found)) <= tolerance:
        return "holds", "The model holds", f"A drop of more than {allowed}, the tolerance, is excluded at 95 %."
    sd = _error(found) * math.sqrt(found.n_items)
    needed = required_items(2 * tolerance, sd, tolerance=tolerance) if tolerance > 0 else 0
    more = (
        f" To tell a drop of {points(2 * tolerance)} from it takes about {needed:,} items like these."
        if needed > found.n_items
        else ""
    )
    return (
        "open",
        "Not settled",
        f"Neither a drop of more than {allowed}, the tolerance, nor its absence is shown.{more}",
    )


def _error(found: TaskReport) -> float:
    """The standard error, at least that of one changed answer: items that happen to agree are no certainty."""
    return max(found.delta_se, 1.0 / found.n_items)


def _of_looks(history: Sequence[Report], alpha: float | None) -> list[str]:
    looks = [report for report in history if report.kind == "look"]
    first = next((report for report in looks if report.alarms), None)
    if first is not None:
        bound = "" if alpha is None else f"; from {1 / alpha:g} on it is an alarm"
        return [
            f"The looks during training raised the alarm at step {first.step:,} (e-value {first.e_value:.3g}{bound})."
        ]
    if not looks:
        return []
    most = max(report.e_value for report in looks)
    return [f"None of the {len(looks)} looks during training raised the alarm (largest e-value {most:.3g})."]


def _before(history: Sequence[Report], report: Report) -> str:
    """What an earlier verdict at the same step said: of all that was trained, before a part of it was kept."""
    earlier = [r for r in history if r.kind == report.kind == "verdict" and r.step == report.step and r is not report]
    if not earlier:
        return ""
    found = earlier[0].pooled
    return (
        f"These are the adapters as they were kept; as they were trained the difference was "
        f"{100 * found.delta:+.1f} points (95 % interval {interval(found.delta, found.delta_se)})."
    )


def _learned(report: Report) -> str:
    delta, error = pooled_learning(report)
    return (
        f"On the target tasks the model differs from its base by {100 * delta:+.1f} points "
        f"(95 % interval {interval(delta, error)})."
    )
