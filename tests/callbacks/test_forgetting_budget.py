# SPDX-License-Identifier: Apache-2.0
"""The time budget in real fits: the share of wall time, what fits into it, and a resume."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.errors import ConfigError, Notice
from tests.forgetting import tiny

#: A share of wall time: a machine that stops for a second in these short runs is no fault of the budget, thrice is.
by_the_clock = pytest.mark.flaky(reruns=3)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_task(folder, "many", tiny.items(600, seed=1))
    return str(folder / "many.yaml")


class Slow(tiny.Student):
    """Takes a fixed time for a step, as a larger model does."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


class Wall(L.Callback):
    """Seconds from the first hook of training to the last."""

    seconds = 0.0

    def on_train_start(self, *args: Any) -> None:
        self.seconds = -time.perf_counter()

    def on_fit_end(self, *args: Any) -> None:
        self.seconds += time.perf_counter()


def fit(monitor: ForgettingMonitor, *callbacks: L.Callback, ckpt: str | None = None, **kwargs: Any) -> float:
    wall = Wall()
    values: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    L.Trainer(callbacks=[LoRA(r=4), wall, monitor, *callbacks], **{**values, **kwargs}).fit(
        Slow(), tiny.loader(), ckpt_path=ckpt
    )
    return wall.seconds


@by_the_clock
@pytest.mark.parametrize(
    ("steps", "share"), [(20, 0.2), (200, 0.2), (200, 0.05), pytest.param(2000, 0.2, marks=pytest.mark.slow)]
)
def test_share_of_wall_time_stays_within_the_budget(task: str, steps: int, share: float) -> None:
    """Runs of which each is ten times as long as the one before, and a small budget."""
    monitor = ForgettingMonitor(task, tiny.tokenizer(), max_time_fraction=share)
    seconds = fit(monitor, max_steps=steps)
    ledger = monitor.state_dict()["budget"]
    spent = sum(report.seconds for report in monitor.history)
    assert spent < ledger["spent"] <= share * seconds  # what is written and logged is in the ledger too
    looks = [r for r in monitor.history if r.kind == "look"]
    assert looks[0].step == 0
    assert looks[0].pooled.n_items == 1
    verdict = monitor.report
    assert verdict is not None
    if steps >= 200:
        assert verdict.kind == "verdict"
        assert verdict.pooled.n_items + verdict.left_out == 600
        assert verdict.pooled.n_items >= 8
        assert len(looks) >= (2 if share == 0.2 else 1)
        assert all(1 <= r.pooled.n_items <= 250 for r in looks)
    if steps == 2000:
        assert verdict.left_out == 0
        assert spent / seconds > 0.05


class Other(L.Callback):
    """Something else that evaluates: when training begins, in the middle and at its end."""

    def __init__(self, monitor: ForgettingMonitor) -> None:
        self.monitor = monitor
        self.balances: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:
            self._compare()

    def on_train_end(self, *args: Any) -> None:
        self._compare()

    def _compare(self) -> None:
        before = self.monitor.state_dict()["budget"]
        start = time.perf_counter()
        self.monitor.compare(200)
        took, after = time.perf_counter() - start, self.monitor.state_dict()["budget"]
        self.balances.append((after["spent"] - before["spent"]) / took)
        assert after["trained"] - before["trained"] < 0.1 * took


def test_what_is_compared_by_hand_is_spent_and_earns_nothing(task: str) -> None:
    monitor = ForgettingMonitor(task, tiny.tokenizer(), max_time_fraction=0.2, gauges=False, on_fit_end=False)
    other = Other(monitor)
    fit(monitor, other, max_steps=8)
    assert other.balances == pytest.approx([1.0, 1.0], abs=0.1)


def test_another_monitors_looks_earn_nothing(task: str) -> None:
    held = ForgettingMonitor(task, tiny.tokenizer(), max_time_fraction=0.2, gauges=False)
    free = ForgettingMonitor(task, tiny.tokenizer(), every_n_steps=4, items_per_eval=150, seed=1, gauges=False)
    seconds = fit(free, held, max_steps=16)
    ledger, looks = held.state_dict()["budget"], sum(report.seconds for report in free.history)
    assert looks > 0.3
    assert ledger["trained"] + ledger["spent"] + looks <= seconds


def test_without_a_look_at_the_start_there_are_looks_too(task: str) -> None:
    monitor = ForgettingMonitor(task, tiny.tokenizer(), max_time_fraction=0.5, gauges=False, on_fit_start=False)
    fit(monitor, max_steps=60)
    assert monitor.history
    assert monitor.history[0].step > 0


class Breaks(L.Callback):
    """Training that destroys the model from its first step on."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.5


@pytest.mark.slow
@by_the_clock
@pytest.mark.parametrize("action", ["scale", "rollback"])
def test_a_remedy_is_paid_from_the_budget_too(tmp_path: Path, action: Any) -> None:
    """An early alarm: there is no time to ask a look's items about every scale."""
    known = tiny.write_task(tmp_path, "known", tiny.known_items(tiny.llama(), 300, seed=3))
    monitor = ForgettingMonitor(
        str(known), tiny.tokenizer(), every_n_steps=10, max_time_fraction=0.1, on_forgetting=action, gauges=False
    )
    seconds = fit(monitor, Breaks(), max_steps=1000)
    assert monitor.outcome is not None
    assert monitor.outcome["step"] < 1000
    assert 8 <= monitor.outcome["items"] < 250
    spent = monitor.state_dict()["budget"]["spent"]
    assert sum(report.seconds for report in monitor.history) < spent <= 0.1 * seconds


def test_a_run_without_time_for_a_verdict_says_so(task: str) -> None:
    monitor = ForgettingMonitor(task, tiny.tokenizer(), max_time_fraction=0.001)
    with pytest.warns(Notice, match="too short for a verdict within `max_time_fraction`=0.001"):
        fit(monitor, max_steps=3)
    assert [(r.kind, r.step) for r in monitor.history] == [("look", 0)]


@by_the_clock
def test_a_schedule_says_when_and_the_budget_how_many(task: str) -> None:
    monitor = ForgettingMonitor(task, tiny.tokenizer(), every_n_steps=40, items_per_eval=100, max_time_fraction=0.3)
    fit(monitor, max_steps=121)
    steps = [r.step for r in monitor.history if r.kind == "look"]
    assert set(steps) <= {0, 40, 80, 120}
    assert len(steps) >= 2
    assert all(r.pooled.n_items <= 100 for r in monitor.history if r.kind == "look")


class Crash(L.Callback):
    """Saves a checkpoint after a step and dies."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("crash")


@by_the_clock
def test_a_resume_replays_no_item_and_keeps_the_ledger(task: str, tmp_path: Path) -> None:
    asked: list[list[tuple[str, str]]] = []

    def make() -> ForgettingMonitor:
        monitor = ForgettingMonitor(task, tiny.tokenizer(), max_time_fraction=0.3, items_per_eval=20, on_fit_end=False)
        monitor.recorders.append(lambda report, model, base: asked.append([s.key for s in model["many"]]))
        return monitor

    first, second = make(), make()
    with pytest.raises(KeyError):
        fit(first, Crash(50, tmp_path / "cut.ckpt"), max_steps=100)
    before = len(asked)
    fit(second, max_steps=100, ckpt=str(tmp_path / "cut.ckpt"))
    assert 1 < before < len(asked)
    keys = [key for look in asked for key in look]
    assert len(set(keys)) == len(keys)
    assert second.history[:before] == first.history
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert 0.0 < state["budget"]["spent"] < 0.3 * (state["budget"]["spent"] + state["budget"]["trained"])
    assert second.state_dict()["budget"]["spent"] > state["budget"]["spent"]


@pytest.mark.parametrize("value", [0, 1, -0.1, "0.1", True])
def test_a_share_out_of_range_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="`max_time_fraction` is a share of the run's time in \\(0, 1\\).*got"):
        ForgettingMonitor("arc_easy", max_time_fraction=value)
