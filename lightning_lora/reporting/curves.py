# SPDX-License-Identifier: Apache-2.0
"""Curves of training and validation over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightning_lora.errors import ConfigError
from lightning_lora.reporting.forgetting import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: More points than this are averaged over neighbours: nobody sees more, and a page holds every one.
MOST = 400

Points = Sequence[tuple[int, float]]


def plot_curves(curves: Mapping[str, Points], label: str = "", ax: Axes | None = None) -> tuple[Figure, Axes]:
    """Draw curves over optimizer steps.

    Args:
        curves: (optimizer step, value) by name; values that are not finite are left out.
        label: of the vertical axis.
        ax: axes to draw on; a new figure when None.

    Returns:
        The figure and the axes.

    Raises:
        ConfigError: when there is nothing to draw.
        MissingDependencyError: when matplotlib is not installed.
    """
    drawn = {name: thin(points) for name, points in curves.items() if any(math.isfinite(y) for _, y in points)}
    if not drawn:
        raise ConfigError(f"`curves` has no finite value to draw: {sorted(curves)}.")
    figure, ax = axes_for(ax, (7.0, 4.2))
    for name, points in drawn.items():
        few = len(points) <= 30
        ax.plot(
            [x for x, _ in points], [y for _, y in points], label=name, linewidth=1.4,
            marker="o" if few else "", markersize=4,
        )  # fmt: skip
    ax.set_xlabel("optimizer step")
    ax.set_ylabel(label)
    if len(drawn) > 1 or not label:
        ax.legend(fontsize="small")
    return figure, ax


def thin(points: Points, most: int = MOST) -> list[tuple[float, float]]:
    """At most so many points: each the mean of its neighbours; what is not finite is left out.

    Args:
        points: (optimizer step, value).
        most: how many to leave.
    """
    finite = [(float(x), y) for x, y in points if math.isfinite(y)]
    size = math.ceil(len(finite) / most)
    groups = [finite[i : i + size] for i in range(0, len(finite), max(size, 1))]
    return [(math.fsum(x for x, _ in g) / len(g), math.fsum(y for _, y in g) / len(g)) for g in groups]
