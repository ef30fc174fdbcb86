# SPDX-License-Identifier: Apache-2.0
"""Forgetting and backward transfer by hand and by their laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.transfer import (
    backward_transfer,
    forgetting_measure,
    mean_forgetting,
    relative_forgetting,
)

scores = st.lists(st.floats(0, 1), min_size=2, max_size=8)


def test_forgetting_by_hand() -> None:
    table = {"a": [0.5, 0.75, 0.25], "b": [0.5, 0.25, 0.5]}
    assert forgetting_measure(table["a"]) == 0.5
    assert forgetting_measure(table["b"]) == 0.0
    assert mean_forgetting(table) == 0.25
    assert backward_transfer(table) == pytest.approx((-0.25 + 0.0) / 2)
    assert backward_transfer(table, {"a": 1}) == pytest.approx((-0.5 + 0.0) / 2)
    assert relative_forgetting(table) == pytest.approx((0.5 + 0.0) / 2)
    assert relative_forgetting(table, {"b": 1}) == pytest.approx((0.5 - 1.0) / 2)


@given(scores, st.floats(-1, 1))
def test_a_shift_of_every_look_is_nothing_and_forgetting_is_at_least_what_was_lost_since_the_start(
    found: list[float], shift: float
) -> None:
    moved = [x + shift for x in found]
    assert forgetting_measure(moved) == pytest.approx(forgetting_measure(found), abs=1e-12)
    assert forgetting_measure(found) >= -backward_transfer({"t": found}) - 1e-12


def test_a_score_of_zero_at_the_start_has_no_share() -> None:
    assert math.isnan(relative_forgetting({"a": [0.0, 0.5]}))


def test_what_was_not_looked_at_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 look"):
        forgetting_measure([0.5])
    with pytest.raises(ConfigError, match="at least one task"):
        mean_forgetting({})
    with pytest.raises(ConfigError, match="look 3 for 'a'"):
        backward_transfer({"a": [0.1, 0.2]}, {"a": 3})
    with pytest.raises(ConfigError, match="without scores: b"):
        backward_transfer({"a": [0.1, 0.2]}, {"b": 0})
