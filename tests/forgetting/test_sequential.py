# SPDX-License-Identifier: Apache-2.0
"""The bet against its formula, its law (no expected gain without a drop, by exact enumeration) and resume."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.sequential import BETS, LARGEST, EProcess, closed_e_values, mean_e_value

differences = st.lists(st.floats(-1, 1), min_size=1, max_size=12)
looks_of_items = st.lists(differences, min_size=1, max_size=6)
tolerances = st.floats(0, 0.5)


def stated_capital(looks: Sequence[Sequence[float]], weights: Sequence[float], tolerance: float) -> float:
    """The sum over starts as the module's docstring has it; starts that have not come yet hold their weight."""
    total = 1.0 - math.fsum(weights[: len(looks)])
    for start, weight in enumerate(weights[: len(looks)]):
        items = [d for look in looks[start:] for d in look]
        products = [math.prod(1 + bet / (1 + tolerance) * (d - tolerance) for d in items) for bet in BETS]
        total += weight * math.fsum(products) / len(BETS)
    return total


@given(looks_of_items, tolerances)
def test_capital_is_the_stated_sum_over_starts_with_a_plan(looks: list[list[float]], tolerance: float) -> None:
    bet = EProcess(tolerance)
    planned = len(looks) + 2
    for k, look in enumerate(looks):
        found = bet.update(look, left=planned - k)
        assert found == pytest.approx(stated_capital(looks[: k + 1], [1 / planned] * planned, tolerance), rel=1e-9)


@given(looks_of_items, tolerances)
def test_capital_is_the_stated_sum_over_starts_without_a_plan(looks: list[list[float]], tolerance: float) -> None:
    bet = EProcess(tolerance)
    weights = [1 / (k * (k + 1)) for k in range(1, len(looks) + 1)]
    for k, look in enumerate(looks):
        assert bet.update(look) == pytest.approx(stated_capital(looks[: k + 1], weights, tolerance), rel=1e-9)


#: Values of a difference and their probabilities; the mean is at most the tolerance of 0.02 in each.
NULLS = {
    "no change": ((0.0,), (1.0,)),
    "churn": ((-1.0, 0.0, 1.0), (0.15, 0.7, 0.15)),
    "churn at the tolerance": ((-1.0, 0.0, 1.0), (0.14, 0.7, 0.16)),
    "rare large drops": ((-0.02, 0.98), (0.96, 0.04)),
    "better": ((-0.5, 0.25), (0.5, 0.5)),
}


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("plan", [(2, 1), (None, None), (None, 1), (5, 4)])
def test_capital_has_no_expected_gain_after_any_past_while_the_drop_is_within_the_tolerance(
    null: str, plan: tuple[int | None, int | None]
) -> None:
    """Exact, over every outcome of two looks at two items: at no point does the mean of the next capital exceed it.

    So no stopping rule gains either, and Ville's inequality holds.
    """
    outcomes, chances = NULLS[null]
    assert math.fsum(o * c for o, c in zip(outcomes, chances, strict=True)) <= 0.02 + 1e-12
    table = list(zip(outcomes, chances, strict=True))

    def after(state: dict[str, object] | None, left: int | None) -> list[tuple[float, float, dict[str, object]]]:
        found = []
        for (d, p), (e, q) in itertools.product(table, repeat=2):
            bet = EProcess(0.02)
            if state is not None:
                bet.load_state_dict(state)
            found.append((p * q, bet.update([d, e], left), bet.state_dict()))
        return found

    first = after(None, plan[0])
    assert math.fsum(p * e for p, e, _ in first) <= 1 + 1e-12
    for _, capital, state in first:
        assert math.fsum(p * e for p, e, _ in after(state, plan[1])) <= capital * (1 + 1e-12)


def test_capital_grows_where_there_is_a_drop() -> None:
    bet = EProcess(0.005, alpha=0.05)
    for _ in range(10):
        bet.update([0.0] * 50)
    assert not bet.alarm
    assert bet.e_value < 1
    while not bet.alarm:
        bet.update([0.1, 0.0] * 25)
        assert bet.looks < 30
    assert bet.e_value >= 20
    assert bet.items == 50 * bet.looks


#: What a group of two items may give, and its probability; the mean over items is 0 in each. Items lean on each other
#: in one, sizes differ in another.
GROUPED_NULLS = {
    "both or neither": (((1.0, 1.0), 0.15), ((0.0, 0.0), 0.7), ((-1.0, -1.0), 0.15)),
    "one against the other": (((1.0, -1.0), 0.5), ((0.0, 0.0), 0.5)),
    "two sizes": (((1.0, 1.0), 0.1), ((-1.0,), 0.2), ((0.0, 0.0), 0.7)),
}


@pytest.mark.parametrize("null", GROUPED_NULLS)
def test_a_bet_on_groups_has_no_expected_gain_and_one_on_their_items_has(null: str) -> None:
    """Exact, over every outcome of a look at three groups."""
    for largest, fair in ((2, True), (None, null != "both or neither")):
        expected = 0.0
        for drawn in itertools.product(GROUPED_NULLS[null], repeat=3):
            bet = EProcess(0.0, largest_group=largest or 1)
            differences = [d for outcome, _ in drawn for d in outcome]
            groups = [g for g, (outcome, _) in enumerate(drawn) for _ in outcome]
            e_value = bet.update(differences, 1, groups if largest else None)
            expected += math.prod(p for _, p in drawn) * e_value
        assert (expected <= 1.0 + 1e-12) is fair or null == "two sizes"


@given(looks_of_items, tolerances)
def test_groups_of_one_item_change_no_bit(looks: list[list[float]], tolerance: float) -> None:
    plain, grouped = EProcess(tolerance), EProcess(tolerance, largest_group=1)
    for look in looks:
        assert plain.update(look) == grouped.update(look, groups=[f"group {i}" for i in range(len(look))])
    assert plain.state_dict() == grouped.state_dict()
    one = EProcess(tolerance)
    one.update(looks[0], left=1)  # all of the capital, 1, is staked: what is left is the product over items
    assert one.state_dict()["log_staked"] == [
        math.fsum(math.log1p(bet / (1.0 + tolerance) * (d - tolerance)) for d in looks[0]) for bet in BETS
    ]


@given(st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=12), tolerances)
def test_capital_of_groups_is_the_stated_product(look: list[tuple[float, int]], tolerance: float) -> None:
    differences, groups = [d for d, _ in look], [g for _, g in look]
    largest = 12
    outcomes = [math.fsum(d - tolerance for d, of in look if of == g) / largest for g in set(groups)]
    products = [math.prod(1 + bet / (1 + tolerance) * y for y in outcomes) for bet in BETS]
    found = EProcess(tolerance, largest_group=largest).update(differences, 1, groups)
    assert found == pytest.approx(math.fsum(products) / len(BETS), rel=1e-9)


def group_looks(rng: np.random.Generator, looks: int, groups: int, size: int) -> np.ndarray:
    """Differences without a drop, items of a group nearly alike. Shape: (looks, groups, size)."""
    shared = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(looks, groups, 1))
    own = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=(looks, groups, size))
    return np.where(rng.random((looks, groups, size)) < 0.9, shared, own)


def test_false_alarms_over_twenty_looks_at_groups_keep_the_level_and_bets_on_their_items_do_not() -> None:
    """Five groups of twelve items a look, no drop, two tasks: the mean of their capitals, as the monitor pools them."""
    runs, alpha, (looks, size, tasks) = 100, 0.05, (20, 12, 2)
    groups = [i // size for i in range(5 * size)]
    alarms = {size: 0, 1: 0}
    for run in range(runs):
        drawn = [group_looks(np.random.default_rng((run, task)), looks, 5, size) for task in range(tasks)]
        for largest in alarms:
            bets = [EProcess(0.0, alpha, largest_group=largest) for _ in drawn]
            for k in range(looks):
                for bet, found in zip(bets, drawn, strict=True):
                    bet.update(found[k].ravel().tolist(), looks - k, groups if largest > 1 else None)
                if mean_e_value([bet.e_value for bet in bets]) >= 1 / alpha:
                    alarms[largest] += 1
                    break
    assert alarms[size] / runs <= alpha
    assert alarms[1] / runs > 5 * alpha


@given(looks_of_items, st.integers(0, 6), st.booleans())
def test_resume_is_exact(looks: list[list[float]], cut: int, planned: bool) -> None:
    def left(k: int) -> int | None:
        return len(looks) - k if planned else None

    whole, first, second = EProcess(), EProcess(), EProcess(alpha=0.01)
    for k, look in enumerate(looks):
        whole.update(look, left(k))
    for k, look in enumerate(looks[:cut]):
        first.update(look, left(k))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for k, look in enumerate(looks[cut:], start=min(cut, len(looks))):
        second.update(look, left(k))
    assert second.e_value == whole.e_value
    assert second.state_dict() == whole.state_dict()


@given(differences, st.randoms(use_true_random=False))
def test_the_order_of_items_in_a_look_is_nothing(look: list[float], random: object) -> None:
    shuffled = list(look)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert EProcess().update(look) == EProcess().update(shuffled)


def test_a_plan_that_grows_never_stakes_more_than_there_is() -> None:
    """Without a gain or a loss in any look, the capital is all that was there: 1."""
    bet = EProcess(0.0)
    for left in (3, 2, 1, 1, 7, None):
        assert bet.update([0.0, 0.0], left) == pytest.approx(1.0, abs=1e-12)


def test_capital_stands_extremes() -> None:
    bet = EProcess(0.0)
    for _ in range(20):
        bet.update([1.0] * 1000)
    assert bet.e_value == LARGEST
    assert bet.log_e_value > 10_000
    assert bet.alarm
    json.dumps(bet.state_dict(), allow_nan=False)
    lost = EProcess(0.0)
    for left in (2, 1):
        assert lost.update([-1.0] * 100_000, left) < 1
    assert lost.e_value == 0.0
    assert not lost.alarm
    assert EProcess().update([]) == 1.0
    assert EProcess().state_dict()["looks"] == 0


def test_bad_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tolerance=1\.0"):
        EProcess(tolerance=1.0)
    with pytest.raises(ConfigError, match="alpha=0"):
        EProcess(alpha=0)
    with pytest.raises(ConfigError, match="bets"):
        EProcess(bets=(0.5, 1.0))
    with pytest.raises(ConfigError, match="left=0"):
        EProcess().update([0.0], left=0)
    for wrong in (1.5, -1.01, math.nan):
        with pytest.raises(ConfigError, match="soft_accuracy"):
            EProcess().update([0.0, wrong])
    with pytest.raises(ConfigError, match="another bet"):
        EProcess(tolerance=0.01).load_state_dict(EProcess(tolerance=0.02).state_dict())
    with pytest.raises(ConfigError, match="largest group.*1.*3"):
        EProcess(largest_group=1).load_state_dict(EProcess(largest_group=3).state_dict())
    with pytest.raises(ConfigError, match="no group has more than 2 item.*one of this look has 3"):
        EProcess(largest_group=2).update([0.0] * 4, groups=["a", "b", "b", "b"])
    with pytest.raises(ConfigError, match="from 1: got 0"):
        EProcess(largest_group=0)
    with pytest.raises(ConfigError, match="at least one"):
        mean_e_value([])


def test_tasks_together_are_the_mean_and_one_collapse_shows() -> None:
    assert mean_e_value([0.5, 99.5]) == 50.0
    assert mean_e_value([LARGEST] * 3) == pytest.approx(LARGEST)


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1e6), min_size=1))
def test_closed_e_values_are_the_smallest_mean_over_all_groups(e_values: dict[str, float]) -> None:
    closed = closed_e_values(e_values)
    for name in e_values:
        groups = [
            group
            for size in range(1, len(e_values) + 1)
            for group in itertools.combinations(e_values, size)
            if name in group
        ]
        expected = min(math.fsum(e_values[n] for n in group) / len(group) for group in groups)
        assert closed[name] == pytest.approx(expected)
