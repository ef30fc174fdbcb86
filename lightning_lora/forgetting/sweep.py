# SPDX-License-Identifier: Apache-2.0
"""The scale sweep: what each share of the adapter learns and forgets, and which one is kept.

Of the scales (`scales`) at which the model holds, the one with the best target metric is kept. Averaging a tuned model
with its base against forgetting: Y. Lin et al., "Mitigating the Alignment Tax of RLHF", arXiv 2309.06256.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.report import TaskReport


@dataclass(frozen=True)
class ScalePoint:
    """What the model is at one scale.

    Args:
        scale: lambda.
        target: the target metric.
        pooled: all items of all tasks together, against the base.
        tasks: each task against the base.
        holds: whether the model holds, see `remedies`.
    """

    scale: float
    target: float
    pooled: TaskReport
    tasks: dict[str, TaskReport]
    holds: bool


@dataclass(frozen=True)
class Sweep:
    """The curve, and the scale that was kept.

    Args:
        points: in order of the scale.
        scale: what the adapters were multiplied by; 1 leaves them as they were trained.
        holds: whether the model holds at it.
        shape: "uniform" or "linear" (in depth).
        monitor: name of the target metric.
        mode: "min" or "max", which of its values are better.
        tolerance: a drop that is nobody's concern [share of items].
        step: optimizer steps taken.
    """

    points: list[ScalePoint]
    scale: float
    holds: bool
    shape: str
    monitor: str
    mode: str
    tolerance: float
    step: int

    @property
    def chosen(self) -> ScalePoint:
        """The point at the scale that was kept."""
        return next(point for point in self.points if point.scale == self.scale)

    def to_dict(self) -> dict[str, Any]:
        """The sweep in primitives, as JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sweep:
        """The sweep that `to_dict` wrote."""
        points = [
            ScalePoint(
                **{
                    **point,
                    "pooled": TaskReport(**point["pooled"]),
                    "tasks": {name: TaskReport(**found) for name, found in point["tasks"].items()},
                }
            )
            for point in values["points"]
        ]
        return cls(**{**values, "points": points})

    def summary(self) -> str:
        """The curve as a table, the scale that was kept marked by a star."""
        rows = [f"  {'scale':>6}  {self.monitor:>12}  accuracy less the base's [points]"]
        for point in self.points:
            mark, found = "*" if point.scale == self.scale else " ", point.pooled
            drop = f"{100 * found.delta:+.2f} +- {100 * found.delta_se:.2f}"
            above = "" if point.holds else f", a drop of more than {100 * self.tolerance:g}"
            rows.append(f"{mark} {point.scale:>6g}  {point.target:>12.5g}  {drop}{above}")
        return "\n".join(rows)


def choose_scale(points: Sequence[ScalePoint], mode: str) -> tuple[float, bool]:
    """The scale that is kept, and whether the model holds at it.

    Of the scales above 0 that hold the one with the best target; of equals the largest, which keeps most of what was
    learned. When none holds, the smallest above 0: a scale of 0 would leave nothing that could be saved. A target that
    is no number is worse than any.

    Args:
        points: of the curve, at least one above 0.
        mode: "min" or "max", which values of the target are better.
    """
    sign = 1.0 if mode == "min" else -1.0
    above = [point for point in points if point.scale > 0.0]
    held = [point for point in above if point.holds and not math.isnan(point.target)]
    if held:
        return min(held, key=lambda point: (sign * point.target, -point.scale)).scale, True
    smallest = min(above, key=lambda point: point.scale)
    return smallest.scale, smallest.holds


def check_scales(scales: Sequence[float], between: bool = False) -> list[float]:
    """The scales in order, 1 among them.

    Args:
        scales: to try.
        between: whether something must be left to choose, at least one scale between 0 and 1.

    Raises:
        ConfigError: for anything but a list of numbers in [0, 1].
    """
    given = None if isinstance(scales, str) or not isinstance(scales, Iterable) else list(scales)
    if given is None:
        raise ConfigError(
            f"`scales` must be a list of shares of the adapter, such as [0.25, 0.5, 0.75]: got {scales!r}."
        )
    wrong = [x for x in given if isinstance(x, bool) or not isinstance(x, int | float) or not 0.0 <= x <= 1.0]
    if wrong:
        raise ConfigError(f"`scales` are shares of the adapter, each in [0, 1]: got {wrong}.")
    if between and not any(0.0 < x < 1.0 for x in given):
        raise ConfigError(
            f"`scales` must hold at least one share between 0 and 1, such as 0.5, or nothing could be kept but all of "
            f"the adapter: got {given}."
        )
    return sorted({1.0, *map(float, given)})
