# SPDX-License-Identifier: Apache-2.0
"""The alarm keeps its word on a thousand simulated runs, and a raw-margin test fails the same check."""

from __future__ import annotations

import pytest

from benchmarks.alarm import (
    ALPHA,
    DROPS,
    FIND_LEAST,
    FIND_LOOKS,
    LEVEL,
    NULLS,
    PASSAGES,
    UNEVEN,
    Rule,
    Scenario,
    alarm_looks,
    margin_difference,
    paths,
    share,
)

pytestmark = pytest.mark.slow
RUNS = 1000


@pytest.mark.parametrize("scenario", NULLS, ids=lambda s: s.name)
def test_false_alarms_over_twenty_looks_are_at_most_alpha(scenario: Scenario) -> None:
    assert share(alarm_looks(scenario, runs=RUNS)) <= ALPHA


@pytest.mark.parametrize("scenario", DROPS[:3], ids=lambda s: s.name)
def test_a_two_point_drop_is_found_within_eight_looks_of_250_items(scenario: Scenario) -> None:
    assert share(alarm_looks(scenario, runs=RUNS), FIND_LOOKS) >= FIND_LEAST


@pytest.mark.parametrize("scenario", [s for s in UNEVEN if s.flips == 0], ids=lambda s: s.name)
def test_confidence_that_differs_between_items_is_no_alarm_while_no_answer_changes(scenario: Scenario) -> None:
    """The capital alone raises one in every run: soft accuracy does move."""
    assert share(alarm_looks(scenario, rule=Rule(by_answers=False), runs=RUNS // 10)) > 0.9
    assert share(alarm_looks(scenario, runs=RUNS // 4)) == 0.0
    assert share(alarm_looks(scenario, rule=Rule(0.005), runs=RUNS // 4)) == 0.0


@pytest.mark.parametrize("scenario", [s for s in UNEVEN if s.flips > 0], ids=lambda s: s.name)
def test_the_answers_take_false_alarms_away_and_add_none(scenario: Scenario) -> None:
    alone = alarm_looks(scenario, rule=Rule(by_answers=False), runs=RUNS // 4)
    gated = alarm_looks(scenario, runs=RUNS // 4)
    assert all(a is not None and a <= g for a, g in zip(alone, gated, strict=True) if g is not None)
    assert share(gated) < 0.9 * share(alone)


def test_a_drop_of_the_tolerance_is_no_alarm_and_one_above_it_is() -> None:
    rule = Rule(tolerance=0.005)
    assert share(alarm_looks(Scenario("at the tolerance", drop=0.005), rule=rule, runs=RUNS)) <= ALPHA
    assert share(alarm_looks(DROPS[0], rule=rule, runs=RUNS // 4), 16) >= 0.9


def test_raw_margins_cry_wolf_when_confidence_falls_and_miss_a_drop_when_it_rises() -> None:
    """The same bet on the same runs: what soft accuracy passes above, raw margins fail."""
    less, more = NULLS[2], DROPS[1]
    assert (less.confidence, less.drop) == (0.8, 0.0)
    assert (more.confidence, more.drop) == (1.25, 0.02)
    alone = Rule(by_answers=False)
    assert share(alarm_looks(less, margin_difference, alone, RUNS // 4)) > 0.9
    assert share(alarm_looks(more, margin_difference, alone, RUNS // 4), FIND_LOOKS) < 0.1


def test_items_that_lean_on_each_other_keep_the_level_by_passage_and_break_it_one_by_one() -> None:
    by_passage, one_by_one = Rule(by_passage=True), Rule(by_answers=False)
    none, _, five = PASSAGES
    assert share(alarm_looks(none, rule=by_passage, runs=RUNS)) <= ALPHA
    assert share(alarm_looks(none, rule=Rule(tasks=2, by_passage=True), runs=RUNS // 4)) <= ALPHA
    assert share(alarm_looks(none, rule=one_by_one, runs=RUNS // 4)) > 5 * ALPHA
    assert share(alarm_looks(five, rule=by_passage, runs=RUNS // 4)) >= FIND_LEAST


def test_the_mean_of_tasks_finds_the_one_that_collapses() -> None:
    """Four tasks share the look; one loses eight points, which is two of all."""
    rule = Rule(tasks=4, hit=1)
    assert share(alarm_looks(Scenario("eight points", drop=0.08), rule=rule, runs=RUNS // 4), FIND_LOOKS) >= FIND_LEAST
    assert share(alarm_looks(NULLS[0], rule=rule, runs=RUNS // 4)) <= ALPHA


def test_the_mean_capital_of_runs_without_a_drop_stays_near_one() -> None:
    """The law behind the level, seen on the real statistic: soft accuracy's spread is estimated within each look."""
    last = [path[-1].e_value for path in paths(NULLS[0], runs=RUNS // 2, whole=True)]
    assert sum(last) / len(last) < 1.5  # at most 1 in expectation; the mean of 500 heavy-tailed values is rough
    assert sum(e >= LEVEL for e in last) / len(last) <= ALPHA
