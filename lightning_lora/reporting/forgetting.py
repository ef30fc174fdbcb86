# SPDX-License-Identifier: Apache-2.0
"""The plot of forgetting: what a run lost on general tasks over its steps, or against what it learned."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_lora.errors import ConfigError, MissingDependencyError
from lightning_lora.forgetting.budget import FEWEST
from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.tasks import POOLED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Z95 = 1.96

#: Least distance of two labels of steps, as a share of the plot's width.
LABEL_ROOM = 0.07


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
        history: reports, or what their ``to_dict`` gave. Looks at few items have wide bars, and those at fewer than
            `FEWEST` are left out where there are others; the verdict, drawn last
            with a large filled marker, stands for a look at the same step.
        learned: the target metric at optimizer steps; looks at other steps are left out.
        learned_label: what ``learned`` holds, with its unit.
        ax: axes to draw on; a new figure when None.

    Returns:
        The figure and the axes.

    Raises:
        ConfigError: when there is nothing to draw.
        MissingDependencyError: when matplotlib is not installed.
    """
    reports = [r if isinstance(r, Report) else Report.from_dict(r) for r in history]
    by_step = {r.step: r for r in sorted(reports, key=lambda r: (r.step, r.kind == "verdict"))}
    drawn = [r for step, r in by_step.items() if learned is None or step in learned]
    if not drawn:
        raise ConfigError(
            f"`history` has no look to draw: {len(reports)} reports"
            + ("." if learned is None else f", none at a step of `learned` ({sorted(learned)}).")
        )
    drawn = [r for r in drawn if r.pooled.n_items >= FEWEST] or drawn  # a budget's first look is one item
    figure, ax = axes_for(ax, (7.0, 4.2))
    names = list(dict.fromkeys(name for report in drawn for name in report.tasks))
    for name in [*names, POOLED] if len(names) > 1 else names:
        _draw(ax, name, drawn, learned)
    ax.axhline(0.0, color="0.4", linewidth=1.0, linestyle="--", label="base model")
    ax.set_xlabel("optimizer step" if learned is None else learned_label)
    ax.set_ylabel("accuracy less the base's [points]")
    ax.legend(fontsize="small")
    if learned is not None:
        if learned[drawn[-1].step] < learned[drawn[0].step]:
            ax.invert_xaxis()  # a loss falls: learning goes to the right
            ax.set_xlabel(f"{learned_label}, falling to the right: what was learned")
        _label_steps(ax, drawn, learned)
    return figure, ax


def pixels(figure: Figure) -> Any:
    """A figure as an image, (height, width, 3) uint8; drawn by Agg, whatever backend the user has chosen.

    Args:
        figure: any of matplotlib's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def axes_for(ax: Axes | None, size: tuple[float, float]) -> tuple[Any, Axes]:
    """The axes to draw on, and their figure: a new one when there are none.

    Args:
        ax: axes to draw on; None for new ones.
        size: of a new figure [inches].

    Raises:
        MissingDependencyError: when matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "Plots need `matplotlib`, which is not installed: pip install 'lightning-lora[plot]'"
        )
    if ax is not None:
        return ax.get_figure(), ax
    from matplotlib.figure import Figure

    # Not through pyplot: nothing global is kept, and no display is asked for.
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.add_subplot()


def _draw(ax: Axes, name: str, reports: Sequence[Report], learned: Mapping[int, float] | None) -> None:
    points = [(r, r.pooled if name == POOLED else r.tasks[name]) for r in reports if name in (POOLED, *r.tasks)]
    x = [r.step if learned is None else learned[r.step] for r, _ in points]
    y = [100 * found.delta for _, found in points]
    error = [100 * Z95 * found.delta_se if found.n_items >= FEWEST else np.nan for _, found in points]
    heavy = name == POOLED
    style: dict[str, Any] = {"color": "black", "linewidth": 2.0} if heavy else {"linewidth": 1.2}
    line = ax.errorbar(
        x, y, yerr=error, capsize=0, elinewidth=0.8, marker="o", markersize=4, markerfacecolor="white", label=name,
        zorder=4 if heavy else 3, **style,
    )  # fmt: skip
    colour = line[0].get_color()
    for bars in line[2]:
        bars.set(alpha=0.35, zorder=2)
    for i in (i for i, (r, _) in enumerate(points) if r.kind == "verdict"):
        # The verdict alone bears weight: drawn last, filled, with its own full bar.
        ax.errorbar(
            x[i], y[i], yerr=error[i], fmt="o", markersize=9, color=colour, elinewidth=1.8, capsize=4,
            markeredgecolor="white", label="_verdict", zorder=6 if heavy else 5,
        )  # fmt: skip


def _label_steps(ax: Axes, reports: Sequence[Report], learned: Mapping[int, float]) -> None:
    """Write the optimizer steps over the plot's upper edge: the first, the last, and those between with room."""
    places = {r.step: learned[r.step] for r in reports}
    width = abs(ax.get_xlim()[1] - ax.get_xlim()[0])
    kept: list[int] = []
    for step in [reports[0].step, reports[-1].step, *places]:
        if all(abs(places[step] - places[other]) > LABEL_ROOM * width for other in kept):
            kept.append(step)
    for step in kept:
        ax.annotate(
            f"step {step}" if step == kept[0] else str(step), (places[step], 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7,
        )  # fmt: skip
