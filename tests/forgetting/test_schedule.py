# SPDX-License-Identifier: Apache-2.0
"""When looks are due, and how many are still to come."""

from __future__ import annotations

from lightning_lora.forgetting.schedule import RunLength, Schedule


def test_a_step_that_is_jumped_over_is_due_once() -> None:
    schedule = Schedule(every_n_steps=10, at_steps=(3,), at_fractions=(0.25, 1.0))
    due = [
        (a, b) for a, b in ((0, 0), (0, 2), (2, 4), (4, 9), (9, 11), (11, 11), (11, 14)) if schedule.is_due(a, b, 50)
    ]
    assert due == [(2, 4), (9, 11), (11, 14)]


def test_shares_are_of_the_planned_steps() -> None:
    schedule = Schedule(at_fractions=(0.001, 0.5, 1.0))
    assert schedule.fixed(7) == {1, 4, 7}
    assert schedule.fixed(None) == set()


def test_looks_left_counts_each_step_once() -> None:
    schedule = Schedule(every_n_steps=10, every_n_epochs=2, at_steps=(5, 10, 99), at_fractions=(0.5,))
    # 5, 10, 20, 30, 40 by steps; 8, 16, 24, 32, 40 by epochs of 4; 20 by share
    assert schedule.looks_left(0, RunLength(40, 4)) == 9
    assert schedule.looks_left(30, RunLength(40, 4)) == 2
    assert schedule.looks_left(0, RunLength(None, 4)) is None
    assert schedule.looks_left(0, RunLength(40, None)) is None
    assert schedule.check(40) == [99]
    assert not Schedule()
