# SPDX-License-Identifier: Apache-2.0
"""Which scale is kept, and what it does to a model's adapters."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.report import TaskReport
from lightning_lora.forgetting.sweep import ScalePoint, Sweep, check_scales, choose_scale


def point(scale: float, target: float, holds: bool = True) -> ScalePoint:
    found = TaskReport(0.5, 0.6, -0.1, 0.02, 5, 3, -0.1, 0.01, 100, 0.5)
    return ScalePoint(scale, target, found, {"task": found}, holds)


def test_the_best_target_of_those_that_hold_is_kept() -> None:
    points = [point(0.0, 9.0), point(0.5, 3.0), point(0.75, 2.0), point(1.0, 1.0, holds=False)]
    assert choose_scale(points, "min") == (0.75, True)
    assert choose_scale(points, "max") == (0.5, True)


def test_of_equals_the_largest_and_a_target_that_is_no_number_is_never_the_best() -> None:
    assert choose_scale([point(0.5, 2.0), point(1.0, 2.0)], "min") == (1.0, True)
    assert choose_scale([point(0.5, 2.0), point(1.0, math.nan)], "min") == (0.5, True)
    assert choose_scale([point(0.5, -2.0), point(1.0, math.nan)], "max") == (0.5, True)


def test_when_none_holds_the_smallest_above_zero_is_kept() -> None:
    points = [point(0.0, 0.0), point(0.25, 1.0, holds=False), point(1.0, 0.5, holds=False)]
    assert choose_scale(points, "min") == (0.25, False)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(-5, 5), st.booleans()), min_size=1, max_size=8))
def test_what_is_kept_holds_whenever_something_does_and_nothing_that_holds_is_better(
    rows: list[tuple[float, float, bool]],
) -> None:
    points = [point(*row) for row in rows]
    scale, held = choose_scale(points, "min")
    kept = [p for p in points if p.scale == scale]
    assert held == any(p.holds for p in points)
    if held:
        assert min(p.target for p in kept if p.holds) == min(p.target for p in points if p.holds)


def test_scales_are_ordered_and_the_whole_adapter_is_among_them() -> None:
    assert check_scales((0.5, 0.25, 0.5)) == [0.25, 0.5, 1.0]
    assert check_scales(()) == [1.0]
    for wrong in (-0.1, 1.5, math.nan, True, "0.5"):
        with pytest.raises(ConfigError, match="scales"):
            check_scales([wrong])  # type: ignore[list-item]


def test_a_sweep_is_itself_after_json() -> None:
    points = [point(0.5, 3.0), point(1.0, 1.0, holds=False)]
    sweep = Sweep(points, 0.5, True, "uniform", "val_loss", "min", 0.005, 12)
    again = Sweep.from_dict(json.loads(json.dumps(sweep.to_dict())))
    assert again == sweep
    assert again.chosen.target == 3.0
    lines = sweep.summary().splitlines()
    assert lines[1].startswith("*")
    assert "a drop of more than 0.5" in lines[2]
