# SPDX-License-Identifier: Apache-2.0
"""The time budget on a clock that the test turns: runs of any length and pace stay within it."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora.forgetting.budget import CAUTION, FEWEST, Budget
from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.response import TRIES, Response
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.sizes import WARM, Sizes
from lightning_lora.forgetting.tasks import POOLED, load_tasks
from tests.forgetting import tiny


class Clock:
    """Time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run as the monitor makes it: a small first look, looks when they are planned, a verdict."""

    def __init__(self, share: float, step: float, fixed: float, item: float, noise: float, bank: int = 2000) -> None:
        self.clock = Clock()
        self.budget = Budget(share, self.clock)
        self.step, self.fixed, self.item, self.noise, self.bank = step, fixed, item, noise, bank
        self.looks: list[tuple[int, int]] = []
        self.verdict = 0
        self.random = random.Random(0)

    def spend(self, step: int, items: int) -> None:
        self.time(step, 2 * items)

    def time(self, step: int, passes: int) -> None:
        with self.budget.spending(step, passes):
            self.clock.now += (self.fixed + self.item * passes) * self.random.uniform(1.0, 1.0 + self.noise)

    def warm(self, step: int) -> None:
        for passes in WARM:
            if passes > self.budget.largest_timed and self.budget.cost(passes) <= self.budget.for_timing:
                self.time(step, passes)

    def go(self, steps: int, known: bool = True, end: int | None = None) -> float:
        """The share of the run's time that was spent."""
        budget, begun = self.budget, self.clock.now
        budget.begin(0)
        self.spend(0, 3)
        budget.forget_cold()
        self.time(0, 1)
        self.warm(0)
        budget.plan(0, steps if known else None, 0.0, 0.0)
        for step in range(1, (end or steps) + 1):
            self.clock.now += self.step
            if step == budget.next_step:
                self.warm(step)
                reserve = budget.cost(2 * self.bank) / CAUTION
                items = budget.largest(lambda n: 2 * n, 250, budget.for_look(reserve))
                if items:
                    self.spend(step, items)
                    self.looks.append((step, items))
                budget.plan(step, steps if known else None, budget.cost(500), reserve)
        self.warm(end or steps)
        self.verdict = budget.largest(lambda n: 2 * n, self.bank, budget.balance)
        if self.verdict:
            self.spend(end or steps, self.verdict)
        return budget.spent / (self.clock.now - begun)


@pytest.mark.parametrize("steps", [200, 2000, 20_000])
@pytest.mark.parametrize("known", [True, False])
def test_share_holds_on_runs_ten_times_longer_and_shorter(steps: int, known: bool) -> None:
    run = Run(0.05, step=0.05, fixed=0.02, item=0.002, noise=0.3)
    assert 0.015 < run.go(steps, known) <= 0.05
    assert len(run.looks) >= (3 if steps > 200 else int(known))
    assert run.verdict >= FEWEST
    assert all(FEWEST <= items <= 250 for _, items in run.looks)
    if steps == 20_000:
        assert run.verdict == 2000  # the whole bank
        assert sum(items == 250 for _, items in run.looks) > 10
    elif steps == 200:
        assert FEWEST <= run.verdict < 2000


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([0.01, 0.05, 0.3]),
    steps=st.integers(50, 3000),
    step=st.floats(0.02, 3.0),
    item=st.floats(1e-4, 0.02),
    fixed=st.floats(0.0, 0.1),
    stop=st.floats(0.1, 1.0),
)
def test_share_holds_wherever_the_run_ends(
    share: float, steps: int, step: float, item: float, fixed: float, stop: float
) -> None:
    """What the first look and its timing took is the only debt: it is made before anything was earned."""
    run = Run(share, step, fixed, item, noise=0.3)
    end = max(1, int(stop * steps))
    found = run.go(steps, end=end)
    debt = (4 * fixed + item * (6 + 1 + sum(WARM))) * 1.3
    assert found <= max(share, debt / (debt + end * step)) + 1e-9


@pytest.mark.parametrize("action", ["scale", "rollback"])
@pytest.mark.parametrize("trained", [200.0, 600.0, 6000.0])
def test_a_remedy_and_the_verdict_after_it_are_paid_from_the_budget(
    task_folder: Path, tokenizer: Any, action: str, trained: float
) -> None:
    """A real model, whose every row takes a tenth of a second of the test's clock; the alarm comes early or late."""
    clock = Clock()

    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        clock.now += 0.1 * len(ids)
        return module(ids).logits

    share, model = 0.2, tiny.adapted(0.3)
    monitor = Monitor(load_tasks(str(task_folder / "known.yaml")), items_per_look=60)
    budget = Budget(share, clock)
    sizes = Sizes(monitor, budget, verdict=True, tries=TRIES[action])
    response, scorer = Response(action, monitor, sizes), Scorer(model, tokenizer, forward=forward)
    response.begin(model, 0)
    response.snapshots.take(model, 5)
    budget.begin(0)
    for step, seconds in enumerate([0.0, trained / 2, trained / 2]):
        clock.now += seconds
        items, _ = sizes.look(step, None) if step else sizes.first()
        with sizes.spending(step, sizes.look_passes(items)):
            report = monitor.look(scorer, step, items=items)
    with sizes.spending(2):
        response.hear(scorer, replace(report, alarms=[POOLED]), at_once=True)
    assert response.outcome is not None
    assert FEWEST <= response.outcome["items"] <= 60
    items, _ = sizes.verdict(last=True)
    if items:
        with sizes.spending(2, sizes.verdict_passes(items)):
            monitor.verdict(scorer, 2, items)
    assert items or trained < 6000.0
    assert budget.spent <= share * (clock.now - 100.0)
    assert (response.outcome["items"] == 60) is (trained == 6000.0)


def test_without_a_look_nothing_is_foretold() -> None:
    budget = Budget(0.05, Clock())
    assert budget.cost(1) == math.inf
    assert budget.largest(lambda n: n, 250, 1e9) == 0


def test_cost_is_a_line_through_the_newest_looks_or_grows_with_the_items() -> None:
    clock = Clock()
    budget = Budget(0.05, clock)

    def spend(passes: int, seconds: float) -> None:
        with budget.spending(0, passes):
            clock.now += seconds

    spend(10, 1.0)
    assert budget.cost(5) == pytest.approx(1.0)
    assert budget.cost(20) == pytest.approx(2.0)
    spend(20, 0.5)  # the first look was slow for its size
    assert budget.cost(100) >= 2.5
    spend(40, 0.51)  # a line by chance: what is beyond the largest look is not foretold from it
    assert budget.cost(400) >= 0.51 + 360 * 0.51 / 40 / 2
    for passes in (50, 100, 150, 200, 250, 300):
        spend(passes, 0.1 + 0.002 * passes)
    assert budget.cost(500) == pytest.approx(1.1)


def test_what_other_evaluation_takes_neither_earns_nor_costs() -> None:
    clock = Clock()
    budget = Budget(0.5, clock)
    with budget.pausing(0):
        clock.now += 1.0  # another monitor's first look, before this run's training has begun
    budget.begin(0)
    clock.now += 10.0
    with budget.pausing(5):
        clock.now += 100.0
        with budget.spending(5, 4):
            clock.now += 3.0
        clock.now += 100.0
        assert (budget.trained, budget.spent, budget.balance) == (10.0, 3.0, 7.0)
    clock.now += 2.0
    assert (budget.trained, budget.spent) == (12.0, 3.0)
    with budget.spending(6):
        clock.now += 1.0
    assert (budget.trained, budget.spent) == (12.0, 4.0)
    assert budget.state_dict()["steps"] == 6


def test_time_for_a_sweep_and_the_verdict_after_it_is_kept(task_folder: Path, tokenizer: Any) -> None:
    clock = Clock()

    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        clock.now += 0.05 + 0.01 * len(ids)
        return module(ids).logits

    monitor = Monitor(load_tasks(str(task_folder / "known.yaml")), items_per_look=60)
    budget = Budget(0.5, clock)
    sizes, scorer = Sizes(monitor, budget, verdict=True, tries=0), Scorer(tiny.adapted(0.3), tokenizer, forward=forward)
    sizes.time(scorer, 0)
    assert monitor.bank.fresh == monitor.bank.size
    budget.begin(0)
    clock.now += budget.spent + 4.0 * budget.cost(sizes.verdict_passes(None)) / CAUTION
    alone, _ = sizes.verdict(last=True)
    sizes.sweep = 5
    first, _ = sizes.verdict(last=True)
    assert alone == monitor.bank.size
    assert 0 < first < alone
    before = budget.balance
    with sizes.spending(0, sizes.verdict_passes(first)):
        monitor.verdict(scorer, 0, first)
    assert before - budget.balance < before / 4
    items = sizes.swept()
    assert items is not None
    assert FEWEST <= items <= alone
    for _ in range(5):
        with sizes.spending(0), scorer.quietly():
            monitor.pairs.score(scorer, monitor.bank.sample(items))
    second, _ = sizes.verdict(last=True)
    assert second >= first
    with sizes.spending(0):
        monitor.verdict(scorer, 0, second)
    assert budget.spent <= 0.5 * (budget.spent + budget.trained)


def test_a_failed_look_is_paid_too() -> None:
    clock = Clock()
    budget = Budget(0.05, clock)
    with pytest.raises(KeyError), budget.spending(0, 10):
        clock.now += 2.0
        raise KeyError
    assert budget.spent == 2.0


def test_the_ledger_is_in_the_state() -> None:
    run = Run(0.05, step=0.05, fixed=0.02, item=0.002, noise=0.0)
    run.go(400)
    run.clock.now += 3.0
    state = json.loads(json.dumps(run.budget.state_dict()))
    clock = Clock()
    other = Budget(0.05, clock)
    clock.now += 1000.0  # between two fits
    other.load_state_dict(state, 400)
    assert other.trained == pytest.approx(run.budget.trained)
    assert other.balance == pytest.approx(run.budget.balance)
    assert other.next_step == run.budget.next_step
    assert other.cost(77) == run.budget.cost(77)
    assert other.plan(400, None, 1.0, 0.0) == run.budget.plan(400, None, 1.0, 0.0)
