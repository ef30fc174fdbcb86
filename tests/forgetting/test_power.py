# SPDX-License-Identifier: Apache-2.0
"""Items and power: published and measured figures, and each function as the other's inverse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.power import detectable_drop, paired_sd, power_of, required_items, unpaired_sd

drops, sds = st.floats(0.001, 0.3), st.floats(0.01, 1.0)
alphas, powers = st.floats(0.001, 0.2), st.floats(0.5, 0.99)


@pytest.mark.parametrize(
    ("drop", "flips", "unpaired", "paired"),
    [(0.005, 0.05, 118_705, 12_359), (0.01, 0.03, 29_676, 1_849), (0.01, 0.05, 29_676, 3_085),
     (0.01, 0.10, 29_676, 6_176), (0.02, 0.10, 7_419, 1_539), (0.03, 0.10, 3_297, 681)],
)  # fmt: skip
def test_items_for_a_drop_at_an_accuracy_of_60_percent(drop: float, flips: float, unpaired: int, paired: int) -> None:
    assert required_items(drop, unpaired_sd(0.6)) == pytest.approx(unpaired, rel=1e-3)
    assert required_items(drop, paired_sd(flips, drop)) == pytest.approx(paired, rel=1e-3)


def test_items_of_millers_example() -> None:
    """Section 5 of arXiv 2411.00640: 3 points at 80 % with omega^2 = 1/9 and one answer a question, two-sided 5 %."""
    assert required_items(0.03, 1 / 3, alpha=0.05, power=0.8, sides=2) == 969


@given(drops, sds, alphas, powers, st.floats(0, 0.1), st.sampled_from([1, 2]))
def test_items_power_and_detectable_drop_belong_together(
    drop: float, sd: float, alpha: float, power: float, tolerance: float, sides: int
) -> None:
    drop += tolerance
    n = required_items(drop, sd, alpha, power, tolerance, sides)
    assert power_of(drop, sd, n, alpha, tolerance, sides) >= power - 1e-6
    if n > 1:
        assert power_of(drop, sd, n - 1, alpha, tolerance, sides) < power + 1e-6
        assert detectable_drop(sd, n, alpha, power, tolerance, sides) <= drop + 1e-9
        assert detectable_drop(sd, n - 1, alpha, power, tolerance, sides) >= drop - 1e-9


def test_power_by_simulation() -> None:
    """A thousand made-up looks of 1,539 items with one answer in ten changed: four in five find two points."""
    import numpy as np

    rng = np.random.default_rng(0)
    n, drop, flips = 1_539, 0.02, 0.10
    d = rng.choice([1.0, -1.0, 0.0], p=[(flips + drop) / 2, (flips - drop) / 2, 1 - flips], size=(1_000, n))
    z = d.mean(axis=1) / (d.std(axis=1, ddof=1) / np.sqrt(n))
    assert (z > 1.6449).mean() == pytest.approx(power_of(drop, paired_sd(flips, drop), n), abs=0.035)


def test_no_spread_needs_one_item() -> None:
    assert required_items(0.01, 0.0) == 1
    assert power_of(0.01, 0.0, 1) == 1.0
    assert detectable_drop(0.0, 10, tolerance=0.01) == 0.01


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"drop=0\.01, tolerance=0\.01"):
        required_items(0.01, 0.3, tolerance=0.01)
    with pytest.raises(ConfigError, match="sides"):
        required_items(0.01, 0.3, sides=3)
    with pytest.raises(ConfigError, match="power"):
        required_items(0.01, 0.3, power=1.0)
    with pytest.raises(ConfigError, match="n_items=0"):
        power_of(0.01, 0.3, 0)
    with pytest.raises(ConfigError, match=r"drop=0\.2"):
        paired_sd(0.1, 0.2)
    with pytest.raises(ConfigError, match="accuracy"):
        unpaired_sd(1.1)
    with pytest.raises(ConfigError, match="sd=nan"):
        required_items(0.01, float("nan"))
