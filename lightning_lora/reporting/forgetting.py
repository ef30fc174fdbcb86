# SPDX-License-Identifier: Apache-2.0
"""The plot of forgetting: what a run lost on general tasks over its steps, or against what it learned."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import ConfigError, MissingDependencyError
from lightning_lora.forgetting.monitor import Report
from lightning_lora.forgetting.tasks import POOLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Z95 = 1.96


def plot_forgetting(
    history: Sequence[Report | Mapping[str, Any]],
    learned: Mapping[int, float] | None = None,
    learned_label: str = "target loss",
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Difference of accuracy to the base, each task and all together, with 95 % intervals.

    Over optimizer steps; with ``learned``, over what the run has learned by then, so that a curve shows what a
    gain on the target cost elsewhere. The line at 0 is the base.

    Example::

        fig, ax = plot_forgetting(monitor.history, learned={0: 3.9, 50: 3.4, 100: 3.2})
        fig.savefig("forgetting.png")

    Args:
        history: reports, or what their ``to_dict`` gave. Looks at few items have wide bars; the verdict, drawn with a
            filled marker, stands for a look at the same step.
        learned: the target metric at optimizer steps; looks at other steps are left out.
        learned_label: what ``learned`` holds, with its unit.
        ax: axes to draw on; a new figure when None.

    Returns:
        The figure and the axes.

    Raises:
        ConfigError: when there is nothing to draw.
        MissingDependencyError: when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "Plots need `matplotlib`, which is not installed: pip install 'lightning-lora[plot]'"
        )
    from matplotlib.figure import Figure

    reports = [r if isinstance(r, Report) else Report.from_dict(r) for r in history]
    by_step = {r.step: r for r in sorted(reports, key=lambda r: (r.step, r.kind == "verdict"))}
    drawn = [r for step, r in by_step.items() if learned is None or step in learned]
    if not drawn:
        raise ConfigError(
            f"`history` has no look to draw: {len(reports)} reports"
            + ("." if learned is None else f", none at a step of `learned` ({sorted(learned)}).")
        )
    figure: Any = None if ax is None else ax.get_figure()
    if ax is None:
        # Not through pyplot: nothing global is kept, and no display is asked for.
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        ax = figure.add_subplot()
    names = list(dict.fromkeys(name for report in drawn for name in report.tasks))
    for name in [*names, POOLED] if len(names) > 1 else names:
        _draw(ax, name, drawn, learned)
    ax.axhline(0.0, color="0.4", linewidth=1.0, linestyle="--", label="base model")
    ax.set_xlabel("optimizer step" if learned is None else learned_label)
    ax.set_ylabel("accuracy less the base's [points]")
    ax.legend(fontsize="small")
    if learned is not None and learned[drawn[-1].step] < learned[drawn[0].step]:
        ax.invert_xaxis()  # a loss falls: learning goes to the right
    return figure, ax


def _draw(ax: Axes, name: str, reports: Sequence[Report], learned: Mapping[int, float] | None) -> None:
    points = [(r, r.pooled if name == POOLED else r.tasks[name]) for r in reports if name in (POOLED, *r.tasks)]
    x = [r.step if learned is None else learned[r.step] for r, _ in points]
    y = [100 * found.delta for _, found in points]
    error = [100 * Z95 * found.delta_se for _, found in points]
    heavy = name == POOLED
    style: dict[str, Any] = {"color": "black", "linewidth": 2.0} if heavy else {"linewidth": 1.2}
    line = ax.errorbar(
        x, y, yerr=error, capsize=3, elinewidth=1.2, marker="o", markerfacecolor="white", label=name, **style
    )
    ends = [i for i, (r, _) in enumerate(points) if r.kind == "verdict"]
    ax.plot([x[i] for i in ends], [y[i] for i in ends], "o", color=line[0].get_color(), zorder=3)
    if learned is not None and (heavy or len(reports[0].tasks) == 1):
        for (report, _), at, height in zip(points, x, y, strict=True):
            ax.annotate(str(report.step), (at, height), xytext=(4, 4), textcoords="offset points", fontsize=7)
