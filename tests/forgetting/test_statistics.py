# SPDX-License-Identifier: Apache-2.0
"""The statistics against numpy, scipy and their own laws."""

from __future__ import annotations

import itertools
import math
import statistics as stdlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting import statistics as stats

answers = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60)
values = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=60)
margins = st.lists(st.floats(-50, 50, allow_subnormal=False), min_size=1, max_size=60)


@given(values)
def test_paired_difference_is_numpys(pairs: list[tuple[float, float]]) -> None:
    model, base = (np.array(x) for x in zip(*pairs, strict=True))
    delta, se = stats.paired_difference(list(model), list(base))
    d = model - base
    assert delta == pytest.approx(d.mean(), abs=1e-12)
    assert se == pytest.approx(d.std(ddof=1) / math.sqrt(len(d)), abs=1e-9)


@given(answers)
def test_paired_difference_and_flips_change_sides_with_their_arguments(pairs: list[tuple[float, float]]) -> None:
    model, base = map(list, zip(*pairs, strict=True))
    delta, se = stats.paired_difference(model, base)
    lost, gained = stats.flips(model, base)
    assert stats.paired_difference(base, model) == (pytest.approx(-delta), pytest.approx(se))
    assert stats.flips(base, model) == (gained, lost)
    assert delta == pytest.approx((gained - lost) / len(pairs))
    assert delta == pytest.approx(stats.accuracy(model) - stats.accuracy(base))
    assert math.isfinite(se)


def test_paired_difference_without_a_difference_is_exactly_zero() -> None:
    assert stats.paired_difference([1, 0, 1], [1, 0, 1]) == (0.0, 0.0)


def test_paired_difference_of_one_item_knows_nothing_of_its_error() -> None:
    assert stats.paired_difference([1], [0]) == (1.0, 1.0)


groups = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 5)), min_size=2, max_size=40)


@given(groups)
def test_grouped_error_is_the_double_sum_over_pairs_within_groups(items: list[tuple[float, float, int]]) -> None:
    """Miller's form: every pair of items of one group adds its product of deviations."""
    model, base, group = (np.array(x) for x in zip(*items, strict=True))
    delta, se = stats.paired_difference(list(model), list(base), list(group))
    d = model - base - (model - base).mean()
    pairs = np.outer(d, d)[np.equal.outer(group, group)].sum()
    n, g = len(d), len(set(group.tolist()))
    assert delta == pytest.approx((model - base).mean(), abs=1e-12)
    if g > 1:
        assert se == pytest.approx(math.sqrt(max(0.0, g / (g - 1) * pairs)) / n, abs=1e-7)
    else:
        assert se == (0.0 if not (model - base).any() else 1.0)


@given(values)
def test_a_group_for_each_item_is_no_grouping(pairs: list[tuple[float, float]]) -> None:
    model, base = map(list, zip(*pairs, strict=True))
    plain = stats.paired_difference(model, base)
    assert stats.paired_difference(model, base, range(len(pairs))) == (plain[0], pytest.approx(plain[1], abs=1e-9))


def test_groups_that_flip_together_widen_the_error_as_their_number_says() -> None:
    """Ten questions on each of fifty passages, all lost or none: fifty observations, not five hundred."""
    rng = np.random.default_rng(0)
    lost = rng.random(50) < 0.3
    base, model = [1.0] * 500, [1.0 - float(x) for x in np.repeat(lost, 10)]
    _, grouped = stats.paired_difference(model, base, np.repeat(np.arange(50), 10).tolist())
    _, fifty = stats.paired_difference([1.0 - float(x) for x in lost], [1.0] * 50)
    assert grouped == pytest.approx(fifty)
    assert grouped > 3 * stats.paired_difference(model, base)[1]
    with pytest.raises(ConfigError, match="got 3 for 2 items"):
        stats.paired_difference([1, 0], [1, 1], ["a", "a", "b"])


@pytest.mark.parametrize(("model", "base"), [([1.0], [1.0, 0.0]), ([], [])])
def test_paired_statistics_refuse_unpaired_items(model: list[float], base: list[float]) -> None:
    with pytest.raises(ConfigError, match=f"got {len(model)} and {len(base)}"):
        stats.paired_difference(model, base)
    with pytest.raises(ConfigError, match="same items"):
        stats.flips(model, base)


def test_chance_adjusted_accuracy_is_zero_for_a_guess_and_one_for_knowledge() -> None:
    assert stats.chance_adjusted_accuracy([1, 0, 0, 0], [4] * 4) == pytest.approx(0.0)
    assert stats.chance_adjusted_accuracy([1, 1], [2, 5]) == pytest.approx(1.0)
    assert stats.chance_adjusted_accuracy([0, 1, 1], [2, 4, 4]) == pytest.approx((-1 + 1 + 1) / 3)
    assert math.isnan(stats.chance_adjusted_accuracy([], []))
    with pytest.raises(ConfigError, match="the smallest 1"):
        stats.chance_adjusted_accuracy([1, 0], [1, 4])
    with pytest.raises(ConfigError, match="got 1 numbers"):
        stats.chance_adjusted_flips([1, 0], [1, 1], [4])


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(2, 6))
def test_chance_adjustment_finds_what_is_known_behind_guesses(known: float, lost: float, gained: float, k: int) -> None:
    """Exact expectation: the observed shares that knowing, losing, gaining and independent guessing make."""
    lost, gained = known * lost, (1 - known) * gained
    never, kept = 1 - known - gained, known - lost
    right = 1 / k
    # (base, model) -> its share: what is known before and after, lost, gained, and known never.
    shares = {
        (1, 1): kept + (lost + gained) * right + never * right**2,
        (1, 0): lost * (1 - right) + never * right * (1 - right),
        (0, 1): gained * (1 - right) + never * right * (1 - right),
        (0, 0): never * (1 - right) ** 2,
    }
    n = 20_000
    items = [pair for pair, share in shares.items() for _ in range(round(n * share))]
    base, model = ([pair[side] for pair in items] for side in (0, 1))
    ks = [k] * len(items)
    assert stats.chance_adjusted_accuracy(base, ks) == pytest.approx(known, abs=2e-3)
    found = stats.chance_adjusted_flips(model, base, ks)
    assert found == (pytest.approx(lost, abs=2e-3), pytest.approx(gained, abs=2e-3))


def test_chance_adjusted_flips_never_fall_below_zero() -> None:
    assert stats.chance_adjusted_flips([0, 1], [0, 1], [2, 2]) == (0.0, 0.0)


@given(st.dictionaries(st.sampled_from("abcdefg"), st.floats(0, 1), max_size=6), st.floats(0.01, 0.5))
def test_holm_rejects_what_the_closed_bonferroni_test_rejects(p_values: dict[str, float], alpha: float) -> None:
    """A test is rejected when Bonferroni rejects every group of tests that it belongs to."""
    adjusted = stats.holm(p_values)
    assert list(adjusted) == list(p_values)
    for name, p in p_values.items():
        assert p <= adjusted[name] <= 1.0
        groups = [g for size in range(1, len(p_values) + 1) for g in itertools.combinations(p_values, size)]
        worst = max(min(1.0, len(g) * min(p_values[n] for n in g)) for g in groups if name in g)
        assert adjusted[name] == pytest.approx(worst)
        assert (adjusted[name] <= alpha) == (worst <= alpha)


def test_holm_by_hand() -> None:
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    with pytest.raises(ConfigError, match="'b': nan"):
        stats.holm({"a": 0.5, "b": math.nan})


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_scipys_exact_binomial_test(lost: int, gained: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert stats.mcnemar_p(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_stands_large_counts() -> None:
    assert 0.0 < stats.mcnemar_p(10_000, 10_500) < 0.001
    with pytest.raises(ConfigError, match="lost=-1"):
        stats.mcnemar_p(-1, 0)


@given(margins, st.floats(0.1, 10))
def test_soft_accuracy_does_not_see_the_models_confidence(found: list[float], factor: float) -> None:
    soft = stats.soft_accuracy(found)
    scaled = stats.soft_accuracy([factor * m for m in found])
    assert all(0.0 <= s <= 1.0 for s in soft)
    # Near the border where no spread is left the curve turns into a step; away from it, it is one curve.
    if stdlib.pstdev(found) > 1e-6:
        assert scaled == pytest.approx(soft, abs=1e-6)


@given(margins)
def test_soft_accuracy_keeps_order_and_side(found: list[float]) -> None:
    soft = stats.soft_accuracy(found)
    for m, s in zip(found, soft, strict=True):
        assert (s >= 0.5) if m > 0 else (s <= 0.5) if m < 0 else s == 0.5
    order = sorted(range(len(found)), key=found.__getitem__)
    assert all(soft[a] <= soft[b] for a, b in zip(order, order[1:], strict=False))


def test_soft_accuracy_is_the_stated_curve() -> None:
    found = [-2.0, 0.5, 1.0, 3.0]
    scale = 0.5 * np.std(found)
    expected = 1 / (1 + np.exp(-1.702 * np.array(found) / scale))
    assert stats.soft_accuracy(found) == pytest.approx(list(expected))


def test_soft_accuracy_without_spread_is_a_step() -> None:
    assert stats.soft_accuracy([]) == []
    assert stats.soft_accuracy([2.0]) == [1.0]
    assert stats.soft_accuracy([-0.1, -0.1]) == [0.0, 0.0]
    assert stats.soft_accuracy([0.0]) == [0.5]


def test_soft_accuracy_of_a_diverged_model_is_zero() -> None:
    soft = stats.soft_accuracy([math.nan, 1.0, 2.0, math.inf, -math.inf])
    assert soft[0] == 0.0
    assert soft[3:] == [1.0, 0.0]
    assert soft[1:3] == stats.soft_accuracy([1.0, 2.0])
