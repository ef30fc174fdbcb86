# SPDX-License-Identifier: Apache-2.0
"""A heat map as a table of a page: layers by projections, a colour and a number in each place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lightning_lora.model.diagnosis import grid
from lightning_lora.reporting.diagnostics import common_prefix

#: Viridis at five places: even in brightness, told apart by any kind of colour vision.
_SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class Cell:
    """A place of the table: its text, and the colours of ground and text; all empty where no module stands."""

    text: str = ""
    ground: str = ""
    ink: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A table of one number by layer and projection.

    Args:
        title: what the number is, with its unit.
        corner: what the names of the rows are of.
        columns: names of the projections.
        rows: name and cells of each layer.
    """

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def heat_map(title: str, modules: Mapping[str, Mapping[str, Any]], key: str, factor: float = 1.0) -> HeatMap:
    """The heat map of one number of every module.

    Args:
        title: what it is, with its unit.
        modules: `Spectrum.to_dict` by module name.
        key: of the number.
        factor: what it is multiplied by.
    """
    layers, projections, places = grid(modules)
    raw = {place: modules[name].get(key) for place, name in places.items()}
    values = {place: factor * float(x) for place, x in raw.items() if x is not None and math.isfinite(x)}
    low, high = (min(values.values()), max(values.values())) if values else (0.0, 0.0)
    prefix = common_prefix(layers)
    rows = [
        (layer.removeprefix(prefix) or "-", [_cell(values.get((layer, column)), low, high) for column in projections])
        for layer in layers
    ]
    corner = f"layer ({prefix.rstrip('.')})" if prefix else "layer"
    return HeatMap(title, corner, [column.rpartition(".")[2] for column in projections], rows)


def colour_of(share: float) -> tuple[int, int, int]:
    """The colour of a share between least and most, as red, green and blue.

    Args:
        share: in [0, 1].
    """
    place = share * (len(_SCALE) - 1)
    at = min(int(place), len(_SCALE) - 2)
    low, high = list(pairwise(_SCALE))[at]
    red, green, blue = (round(a + (place - at) * (b - a)) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _cell(value: float | None, low: float, high: float) -> Cell:
    if value is None:
        return Cell()
    red, green, blue = colour_of((value - low) / (high - low) if high > low else 0.5)
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 128
    return Cell(f"{value:.3g}", f"#{red:02x}{green:02x}{blue:02x}", "#ffffff" if dark else "#000000")
