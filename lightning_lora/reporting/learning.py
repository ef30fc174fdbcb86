# SPDX-License-Identifier: Apache-2.0
"""Learning against forgetting: a run's looks, the scales of its adapter, or several ways to tune, on one plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.response import TRIES
from lightning_lora.forgetting.sweep import Sweep
from lightning_lora.reporting.forgetting import Z95, axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORGETTING_LABEL = "general accuracy vs base [points]"
TARGET_LABEL = "target accuracy vs base [points]"


class Place(NamedTuple):
    """A point of the plot: what was learned and what was forgotten, with their standard errors."""

    x: float
    x_se: float
    y: float
    y_se: float
    name: str
    is_verdict: bool


def plot_run(
    history: Sequence[Report | Mapping[str, Any]],
    learned: Mapping[int, float] | None = None,
    learned_label: str = "validation loss",
    sweep: Sweep | None = None,
    mode: str = "min",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """What one run learned against what it forgot, look by look, with 95 % intervals; learning goes to the right.

    What was learned is the target tasks' gain, all their items together, or with ``learned`` a metric of the run's
    validation. A look between two validations stands at the value between theirs, on a straight line over steps;
    looks before the first and after the last are left out. With a sweep, the curve of its scales, the kept one
    marked by a star.

    Example::

        fig, ax = plot_run(monitor.history, {100: 3.4, 200: 3.2}, sweep=sweep.result)

    Args:
        history: reports, or what their ``to_dict`` gave.
        learned: the metric at optimizer steps; None for the target tasks of the reports.
        learned_label: what ``learned`` holds, with its unit.
        sweep: scales of the adapter, measured by the metric of ``learned``.
        mode: "min" or "max", which values of the metric are better.
        ax: axes to draw on; a new figure when None.

    Returns:
        The figure and the axes.

    Raises:
        ConfigError: when there is nothing to draw, or a sweep without ``learned``.
        MissingDependencyError: when matplotlib is not installed.
    """
    reports = [r if isinstance(r, Report) else Report.from_dict(r) for r in history]
    if sweep is not None and learned is None:
        raise ConfigError("`sweep` needs `learned`: its scales were measured by a metric, not by target tasks.")
    places = places_of(reports, learned)
    if not places and sweep is None:
        what = "no target tasks" if learned is None else f"none between two steps of `learned` ({sorted(learned)})"
        raise ConfigError(f"`history` has no look to draw: {len(reports)} reports, {what}.")
    figure, ax = axes_for(ax, (7.0, 4.6))
    ax.axhline(0.0, color="0.4", linewidth=1.0, linestyle="--", label="base model", zorder=1)
    if learned is None:
        ax.axvline(0.0, color="0.4", linewidth=1.0, linestyle="--", zorder=1)
    if sweep is not None:
        _draw_sweep(ax, sweep)
    if places:
        _draw_run(ax, places)
    falls = learned is not None and mode == "min"
    if falls:
        ax.invert_xaxis()
    for place in dict.fromkeys([*places[:1], *places[-1:]]):
        _name(ax, place.name, place.x, place.y, above=place is places[0])
    ax.set_xlabel(
        TARGET_LABEL if learned is None else f"{learned_label}, {'falling' if falls else 'rising'} to the right"
    )
    ax.set_ylabel(FORGETTING_LABEL)
    ax.legend(fontsize="small")
    return figure, ax


def pooled_learning(report: Report) -> tuple[float, float]:
    """Difference of accuracy to the base over all items of all target tasks, and its standard error [share of items].

    Args:
        report: with target tasks.
    """
    total = sum(found.n_items for found in report.learning.values())
    delta = math.fsum(found.n_items * found.delta for found in report.learning.values()) / total
    return delta, math.hypot(*(found.n_items * found.delta_se for found in report.learning.values())) / total


def as_trained(history: Sequence[Report]) -> list[Report]:
    """One report a step, of the adapters as training had left them: not of what a remedy or a sweep then kept.

    Args:
        history: every report of a run, in order.
    """
    kept: dict[int, Report] = {}
    settled: int | None = None  # what follows at this step is of other adapters
    owed = False
    for report in history:
        if report.step == settled or (owed and report.kind == "verdict"):
            continue
        kept[report.step] = report
        changes = TRIES.get(report.outcome.get("by", ""), 0) > 0
        owed |= changes and "holds" not in report.outcome  # settled when training ends, before the verdict
        if changes or report.kind == "verdict":
            settled = report.step
    return list(kept.values())


def places_of(reports: Sequence[Report], learned: Mapping[int, float] | None = None) -> list[Place]:
    """Where the looks of a run stand, in their order; see `plot_run`.

    Args:
        reports: every report of a run, in order.
        learned: a metric at optimizer steps; None for the target tasks, of which every verdict is shown.
    """
    if learned is None:
        judged = {report.step for report in reports if report.kind == "verdict"}
        drawn = [r for r in reports if r.learning and (r.kind == "verdict" or r.step not in judged)]
        return [_place(*pooled_learning(report), report, 100.0) for report in drawn]
    steps = sorted(step for step, value in learned.items() if math.isfinite(value))
    values = [learned[step] for step in steps]
    drawn = [report for report in as_trained(reports) if steps and steps[0] <= report.step <= steps[-1]]
    return [_place(float(np.interp(report.step, steps, values)), 0.0, report, 1.0) for report in drawn]


def _place(x: float, x_se: float, report: Report, unit: float) -> Place:
    found, verdict = report.pooled, report.kind == "verdict"
    name = f"step {report.step}"
    return Place(unit * x, unit * x_se, 100 * found.delta, 100 * found.delta_se, name, verdict)


def _draw_run(ax: Axes, places: Sequence[Place]) -> None:
    x, y = [p.x for p in places], [p.y for p in places]
    line = ax.errorbar(
        x, y, xerr=[Z95 * p.x_se for p in places], yerr=[Z95 * p.y_se for p in places], color="C0", linewidth=1.2,
        elinewidth=0.8, marker="o", markersize=5, markerfacecolor="white", label="this run, by its looks", zorder=3,
    )  # fmt: skip
    for bars in line[2]:
        bars.set(alpha=0.35, zorder=2)
    verdicts = [p for p in places if p.is_verdict]
    for p in verdicts:
        ax.errorbar(
            p.x, p.y, xerr=Z95 * p.x_se, yerr=Z95 * p.y_se, fmt="o", markersize=9, color="C0", elinewidth=1.8,
            capsize=4, markeredgecolor="white", label="verdict" if p is verdicts[0] else "_verdict", zorder=5,
        )  # fmt: skip


def _draw_sweep(ax: Axes, sweep: Sweep) -> None:
    points = [point for point in sweep.points if math.isfinite(point.target)]
    x, y = [p.target for p in points], [100 * p.pooled.delta for p in points]
    ax.errorbar(
        x, y, yerr=[100 * Z95 * p.pooled.delta_se for p in points], color="0.45", linewidth=1.2, elinewidth=0.8,
        marker="s", markersize=4, label=f"scales of the adapter, {sweep.shape}", zorder=2,
    )  # fmt: skip
    for point, at in zip(points, y, strict=True):
        _name(ax, f"{point.scale:g}", point.target, at, above=False)
        if point.scale == sweep.scale:
            ax.plot(
                [point.target], [at], marker="*", markersize=16, color="C1", markeredgecolor="black", linestyle="",
                label=f"kept: {point.scale:g}", zorder=6,
            )  # fmt: skip


def _name(ax: Axes, text: str, x: float, y: float, above: bool) -> None:
    """Write beside a point, towards the middle of the plot."""
    left = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))[0] < 0.5
    ax.annotate(
        text, (x, y), xytext=(6 if left else -6, 6 if above else -12), textcoords="offset points", fontsize=8,
        ha="left" if left else "right", zorder=7,
    )  # fmt: skip


def plot_learning(
    points: Mapping[str, Sequence[tuple[float, float]]],
    curves: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    base: float | None = None,
    learned_label: str = "target loss",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Learning against forgetting: each way to tune as a point, with its spread over seeds.

    Example::

        fig, ax = plot_learning({"LoRA": [(3.9, -9.1), (3.9, -8.7)], "scaled": [(4.4, -1.0)]}, base=5.2)

    Args:
        points: for each way, its runs: (what was learned, difference of accuracy to the base [points]). The mark is
            their mean, the bars run from the least to the most.
        curves: further lines to draw, such as the scales of one adapter, as the same pairs in order.
        base: the base's value on the learning axis; it stands at a difference of 0.
        learned_label: what the learning axis holds, with its unit; a loss, that falls to the right.
        ax: axes to draw on; a new figure when None.

    Returns:
        The figure and the axes.

    Raises:
        ConfigError: when there is nothing to draw.
        MissingDependencyError: when matplotlib is not installed.
    """
    if not points:
        raise ConfigError("`points` is empty: there is nothing to draw.")
    figure, ax = axes_for(ax, (8.0, 4.8))
    for name, line in (curves or {}).items():
        ax.plot(*zip(*line, strict=True), color="0.6", linewidth=1.2, marker=".", markersize=4, label=name, zorder=2)
    marks = "osD^vPh<X>pd"
    for number, (name, runs) in enumerate(points.items()):
        x, y = (sum(column) / len(runs) for column in zip(*runs, strict=True))
        spread = [
            [[centre - min(c)], [max(c) - centre]] for centre, c in zip((x, y), zip(*runs, strict=True), strict=True)
        ]
        ax.errorbar(
            x, y, xerr=spread[0], yerr=spread[1], fmt=marks[number % len(marks)], color=f"C{number % 10}",
            markersize=8, markeredgecolor="white", elinewidth=1.0, label=name, zorder=3,
        )  # fmt: skip
    if base is not None:
        ax.plot([base], [0.0], marker="+", markersize=13, markeredgewidth=2, color="black", linestyle="", label="base")
    ax.axhline(0.0, color="0.4", linewidth=1.0, linestyle="--", zorder=1)
    ax.invert_xaxis()
    ax.set_xlabel(f"{learned_label}, falling to the right: what was learned")
    ax.set_ylabel("accuracy less the base's [points]")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, ax
