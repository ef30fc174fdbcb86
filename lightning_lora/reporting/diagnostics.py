# SPDX-License-Identifier: Apache-2.0
"""The heat map of adapters' spectra: layers by projections."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import ConfigError, MissingDependencyError
from lightning_lora.model.diagnosis import Diagnosis, grid
from lightning_lora.model.spectrum import Spectrum

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Title of each panel, and its value.
PANELS: dict[str, Callable[[Spectrum], float]] = {
    "effective rank": lambda s: s.effective_rank,
    "stable rank": lambda s: s.stable_rank,
    "size of the update, |dW| / |W| [%]": lambda s: 100 * s.relative_update,
}

#: More places than this along an axis and not every one gets its number or its name.
ROOM = 24


def plot_diagnostics(diagnosis: Diagnosis) -> Figure:
    """A heat map each of effective rank, stable rank and relative size, layers downwards, projections across.

    Example::

        plot_diagnostics(diagnostics.report).savefig("diagnostics.png")

    Args:
        diagnosis: What a look found.

    Returns:
        The figure, which no display or pyplot knows of.

    Raises:
        ConfigError: There is no module to draw.
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(
            "Plots need `matplotlib`, which is not installed: pip install 'lightning-lora[plot]'"
        )
    from matplotlib.figure import Figure

    if not diagnosis.modules:
        raise ConfigError("the diagnosis has no module to draw.")
    layers, projections, places = grid(diagnosis.modules)
    width, height = 1.6 + 0.62 * max(len(projections), 3), 1.9 + 0.3 * min(max(len(layers), 2), 60)
    figure = Figure(figsize=(len(PANELS) * width, height), layout="constrained")
    prefix = common_prefix(layers)
    for index, (title, value) in enumerate(PANELS.items()):
        axes: Any = figure.add_subplot(1, len(PANELS), index + 1)
        cells = [
            [
                value(diagnosis.modules[places[p]]) if (p := (row, column)) in places else math.nan
                for column in projections
            ]
            for row in layers
        ]
        image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(projections)), [p.rpartition(".")[2] for p in projections], rotation=60, ha="right")
        step = math.ceil(len(layers) / ROOM)
        rows = range(0, len(layers), step)
        axes.set_yticks(rows, [layers[i].removeprefix(prefix) or "-" for i in rows] if index == 0 else [""] * len(rows))
        if index == 0:
            axes.set_ylabel(f"layer ({prefix.rstrip('.')})" if prefix else "layer")
        if len(layers) <= ROOM:
            _write(axes, image, cells)
        else:
            figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(f"adapters at step {diagnosis.step}", fontsize="large")
    return figure


def _write(axes: Any, image: Any, cells: list[list[float]]) -> None:
    """Each place's number, in black or white, whichever can be read there."""
    for y, row in enumerate(cells):
        for x, value in enumerate(row):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", fontsize=7, color="w" if dark else "k")


def common_prefix(layers: list[str]) -> str:
    """What all names but their last part have in common, with its dot; "" for nothing.

    Args:
        layers: names of layers.
    """
    heads = {layer.rpartition(".")[0] for layer in layers if layer}
    return f"{heads.pop()}." if len(heads) == 1 and "" not in heads else ""
