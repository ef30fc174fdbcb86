# SPDX-License-Identifier: Apache-2.0
"""What the spectra of all adapters say together: averages to log, and advice where ranks collapse or go to waste.

The thresholds are rules of thumb, not theorems: a healthy adapter of rank 16 often has a stable rank of 2 to 5. They
are there to name the runs that somebody should look at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.model.spectrum import Spectrum

#: A stable rank below this is one direction that carries nearly everything.
COLLAPSED = 1.1
#: An effective rank above this share of r is a spectrum without an end: the update asks for more.
FULL = 0.9
#: Share of the modules that must agree before anything is said.
MOST = 0.5
#: Ranks below this are too few to speak of collapse or waste.
SMALL = 4


@dataclass(frozen=True)
class Diagnosis:
    """The spectra of a model's adapters at one step.

    Args:
        step: Optimizer steps taken.
        modules: The spectrum of each adapter, by the module's name.
    """

    step: int
    modules: dict[str, Spectrum]

    def metrics(self) -> dict[str, float]:
        """Averages over the modules by the keys under which they are logged; what has no finite value is left out.

        ======================== =======================================================
        adapter/stable_rank      mean of the stable ranks
        adapter/effective_rank   mean of the effective ranks
        adapter/condition        median of the condition numbers
        adapter/relative_update  mean of abs(dW) / abs(W) in Frobenius norms
        adapter/dead_share       directions below 1 % of the largest [share of all ranks]
        adapter/grad_norm_A      root of the summed squares over the modules
        adapter/grad_norm_B      the same of B
        ======================== =======================================================
        """
        found = list(self.modules.values())
        values = {
            "stable_rank": _mean(s.stable_rank for s in found),
            "effective_rank": _mean(s.effective_rank for s in found),
            "condition": _median(s.condition for s in found),
            "relative_update": _mean(s.relative_update for s in found),
            "dead_share": sum(s.dead_ranks for s in found) / max(sum(s.r for s in found), 1),
            "grad_norm_A": math.sqrt(sum(s.grad_norm_A**2 for s in found)),
            "grad_norm_B": math.sqrt(sum(s.grad_norm_B**2 for s in found)),
        }
        return {f"adapter/{name}": value for name, value in values.items() if math.isfinite(value)}

    def advice(self) -> dict[str, str]:
        """What to look at, by its kind; nothing for a model whose ranks are used."""
        large = {name: s for name, s in self.modules.items() if s.r >= SMALL and s.norm > 0}
        if not large:
            return {}
        collapsed = [name for name, s in large.items() if s.stable_rank < COLLAPSED]
        wasted = [name for name, s in large.items() if s.dead_ranks >= s.r / 2]
        full = [name for name, s in large.items() if s.effective_rank > FULL * s.r]
        told = {}
        if len(collapsed) > MOST * len(large):
            told["rank collapse"] = (
                f"rank collapse: in {len(collapsed)} of {len(large)} adapters, {collapsed[0]!r} first, one direction "
                f"carries nearly the whole update (stable rank below {COLLAPSED}). Lower the learning rate or "
                "`lora_alpha`, or look whether the data say one thing only"
            )
        if len(wasted) > MOST * len(large):
            ranks = sorted(s.rank_for(0.99) for s in large.values())
            enough = max(ranks[math.ceil(0.9 * len(ranks)) - 1], 1)
            told["wasted rank"] = (
                f"wasted rank: in {len(wasted)} of {len(large)} adapters half of the directions or more are below 1 % "
                f"of the largest. `r={enough}` would hold 99 % of the update in nine adapters of ten"
            )
        if len(full) > MOST * len(large):
            told["full rank"] = (
                f"full rank: in {len(full)} of {len(large)} adapters the singular values hardly fall off, so a larger "
                "`r` may learn more; with `use_rslora` the scale stays right"
            )
        return told

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis in primitives, as JSON holds it."""
        return {
            "step": self.step,
            "metrics": self.metrics(),
            "advice": self.advice(),
            "modules": {name: spectrum.to_dict() for name, spectrum in self.modules.items()},
        }


def grid(values: Mapping[str, Any]) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Names of modules as a table, layers by projections.

    The layer is the name up to its last number (``model.layers.7``), the projection what follows it
    (``self_attn.q_proj``); names without a number are one layer of their own.

    Args:
        values: By module name, in model order.

    Returns:
        Layers, projections, and the module of each place that has one.
    """
    places: dict[tuple[str, str], str] = {}
    for name in values:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
        places[".".join(parts[: last + 1]), ".".join(parts[last + 1 :]) or parts[-1]] = name
    layers, projections = (list(dict.fromkeys(place[i] for place in places)) for i in (0, 1))
    return layers, projections, places


def _mean(values: Iterable[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _median(values: Iterable[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return statistics.median(known) if known else math.nan
