# SPDX-License-Identifier: Apache-2.0
"""The callback in real fits: schedule, logs, stop, resume, and no trace in the weights."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.errors import ConfigError, Notice, TaskError
from tests.forgetting import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_task(folder, "alpha", tiny.items(40, seed=1))
    tiny.write_task(folder, "beta", tiny.items(20, seed=2, choices=3))
    tiny.write_task(folder, "known", tiny.known_items(tiny.llama(), 60, seed=3))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def trainer(*callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    values: dict[str, Any] = {
        "max_steps": 20, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }  # fmt: skip
    return L.Trainer(callbacks=[LoRA(r=4, lora_dropout=0.1), *callbacks], **{**values, **kwargs})


def digest(module: torch.nn.Module) -> str:
    bits = (t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in module.state_dict().values())
    return hashlib.md5(b"".join(bits)).hexdigest()


def steps(monitor: ForgettingMonitor) -> list[tuple[str, int]]:
    return [(r.kind, r.step) for r in monitor.history]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_weights_are_the_same_bits_with_and_without(folder: Path, tokenizer: Any, precision: Any) -> None:
    digests = {}
    for monitored in (False, True):
        monitor = ForgettingMonitor(
            [str(folder / "alpha.yaml"), str(folder / "beta.yaml")], tokenizer, every_n_steps=5, items_per_eval=20
        )
        L.seed_everything(1)
        student = tiny.Student(dropout=0.1)
        run = trainer(*([monitor] if monitored else []), precision=precision, val_check_interval=7)
        run.fit(student, tiny.loader(), tiny.loader(8))
        digests[monitored] = digest(student)
    assert digests[True] == digests[False]
    assert steps(monitor) == [("look", 0), ("look", 5), ("look", 10), ("look", 15), ("look", 20), ("verdict", 20)]
    assert monitor.report is not None
    assert monitor.report.pooled.n_items == 60
    json.dumps(monitor.report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("kwargs", "run", "expected"),
    [
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 3, "max_steps": 5}, [0, 2, 4, -5]),
        ({"at_steps": [1, 4], "on_fit_start": False}, {"max_steps": 5}, [1, 4, -5]),
        ({"every_n_epochs": 1}, {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}, [0, 3, 6, -6]),
        ({"every_n_steps": 3, "every_n_epochs": 1, "on_fit_end": False},
         {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 3}, [0, 3, 6]),
        ({"on_fit_start": False}, {"max_steps": 2}, [-2]),
        ({"at_fractions": [0.2, 0.5, 1.0], "at_steps": [3]}, {"max_steps": 7}, [0, 2, 3, 4, 7, -7]),
    ],
)  # fmt: skip
def test_schedule(folder: Path, tokenizer: Any, kwargs: Any, run: Any, expected: list[int]) -> None:
    """Each look once; negative steps stand for the verdict."""
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer, items_per_eval=5, **kwargs)
    trainer(monitor, **run).fit(tiny.Student(), tiny.loader())
    assert [r.step if r.kind == "look" else -r.step for r in monitor.history] == expected


def test_numbers_are_logged_and_can_be_monitored(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    monitor = ForgettingMonitor(str(folder / "alpha.yaml"), tokenizer, every_n_steps=2, items_per_eval=10)
    seen = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            seen[trainer.global_step] = float(trainer.callback_metrics["forgetting/alpha/acc"])

    checkpoint = ModelCheckpoint(
        tmp_path / "best", monitor="forgetting/pooled/delta", mode="max", every_n_train_steps=2
    )
    run = trainer(monitor, Watch(), checkpoint, max_steps=4, logger=CSVLogger(tmp_path))
    run.fit(tiny.Student(), tiny.loader())
    reports = {r.step: r for r in monitor.history if r.kind == "look"}
    assert seen[1] == pytest.approx(reports[0].tasks["alpha"].acc)
    assert seen[2] == seen[3] == pytest.approx(reports[2].tasks["alpha"].acc)
    assert seen[4] == pytest.approx(reports[4].tasks["alpha"].acc)
    assert checkpoint.best_model_path
    rows = list(csv.DictReader((Path(run.logger.log_dir) / "metrics.csv").open()))
    logged = [(int(row["step"]), float(row["forgetting/alpha/acc"])) for row in rows if row["forgetting/alpha/acc"]]
    assert logged == [(r.step, pytest.approx(r.tasks["alpha"].acc)) for r in monitor.history]
    assert [row["forgetting/alpha/p_value"] for row in rows][-1]
    assert all(float(row["forgetting/seconds"]) > 0 for row in rows if row["forgetting/seconds"])


def test_callback_metrics_hold_the_newest_look(folder: Path, tokenizer: Any) -> None:
    """Epochs end between looks, and some looks are made at their end."""
    monitor = ForgettingMonitor(
        str(folder / "alpha.yaml"), tokenizer, every_n_steps=5, every_n_epochs=2, items_per_eval=10
    )
    wrong = []

    class Watch(ModelCheckpoint):  # Lightning calls checkpoints last
        def check(self, trainer: L.Trainer, hook: str) -> None:
            newest = monitor.history[-1].pooled
            shown = trainer.callback_metrics.get("forgetting/pooled/acc_base")
            if float(shown) != pytest.approx(newest.acc_base):
                wrong.append((hook, trainer.global_step, float(shown), newest.acc_base))

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.check(trainer, "batch end")

        def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.check(trainer, "epoch end")

    run = trainer(monitor, Watch(save_top_k=0), max_epochs=4, max_steps=-1, limit_train_batches=6)
    run.fit(tiny.Student(), tiny.loader())
    assert len({r.pooled.acc_base for r in monitor.history}) > 2
    assert not wrong


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_model_that_forgets_is_named_and_stopped(folder: Path, tokenizer: Any, action: str) -> None:
    monitor = ForgettingMonitor(
        str(folder / "known.yaml"), tokenizer, every_n_steps=3, items_per_eval=60, on_forgetting=action
    )
    run = trainer(monitor, max_steps=12)
    with pytest.warns(
        Notice,
        match="Forgetting at step 12, the verdict: below the base" if action == "warn" else "evidence of .* to 1",
    ):
        run.fit(tiny.Student(lr=0.5), tiny.loader())
    verdict = monitor.report
    assert verdict is not None
    assert (verdict.kind, verdict.step) == ("verdict", run.global_step)
    assert verdict.pooled.acc_base == 1.0
    assert verdict.pooled.delta < -0.2
    assert verdict.tasks["known"].p_value < 0.01
    assert run.global_step < 12 if action == "stop" else run.global_step == 12


@pytest.mark.parametrize(
    ("limits", "said", "end"),
    [
        ({}, "Training stops after this step, as", 3),
        (
            {"min_steps": 6, "limit_train_batches": 4},
            "only when the trainer has done step 6 (`min_steps`) and epoch 1 (`min_epochs`), as",
            6,
        ),
        ({"min_epochs": 2, "limit_train_batches": 4}, "only when the trainer has done epoch 2 (`min_epochs`), as", 8),
    ],
)
def test_stopping_is_said_once_with_the_step_at_which_it_comes(
    folder: Path, tokenizer: Any, recwarn: pytest.WarningsRecorder, limits: dict[str, Any], said: str, end: int
) -> None:
    monitor = ForgettingMonitor(
        str(folder / "known.yaml"), tokenizer, every_n_steps=3, items_per_eval=60, on_forgetting="stop"
    )
    run = trainer(monitor, max_steps=12, **limits)
    run.fit(tiny.Student(lr=2.0), tiny.loader())
    texts = [str(w.message) for w in recwarn if issubclass(w.category, Notice) and "Forgetting at" in str(w.message)]
    assert [r.step for r in monitor.history if r.alarms][0] == 3
    assert [said in text for text in texts] == [True] + [False] * (len(texts) - 1)
    assert sum("Training stops" in text for text in texts) == 1
    assert run.global_step == end


def test_no_forgetting_no_alarm(folder: Path, tokenizer: Any, recwarn: pytest.WarningsRecorder) -> None:
    monitor = ForgettingMonitor(
        str(folder / "known.yaml"), tokenizer, every_n_steps=1, items_per_eval=12, on_forgetting="stop"
    )
    run = trainer(monitor, max_steps=4)
    run.fit(tiny.Student(lr=1e-6), tiny.loader())
    assert run.global_step == 4
    assert not [w for w in recwarn if issubclass(w.category, Notice) and "orgetting" in str(w.message)]


class Crash(L.Callback):
    """Saves a checkpoint after step 7 and dies."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint("cut.ckpt")
            raise KeyError("crash")


def test_resume_repeats_no_look_and_no_item(folder: Path, tokenizer: Any) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def fit(*callbacks: L.Callback, ckpt: str | None = None) -> list[dict[str, Any]]:
        monitor = ForgettingMonitor(str(folder / "alpha.yaml"), tokenizer, every_n_steps=3, items_per_eval=8)
        L.seed_everything(2)
        rows = StatefulDataLoader(tiny.Sequences(), batch_size=4)
        run = trainer(monitor, *callbacks, max_steps=12)
        try:
            run.fit(tiny.Student(), rows, ckpt_path=ckpt)
        except KeyError:
            assert callbacks
        return [{**r.to_dict(), "seconds": 0} for r in monitor.history]

    whole = fit()
    assert [(r["kind"], r["step"]) for r in fit(Crash())] == [("look", 0), ("look", 3), ("look", 6)]
    assert fit(ckpt="cut.ckpt") == whole
    torch.load("cut.ckpt", weights_only=True)


def test_second_fit_goes_on_and_another_run_begins_anew(folder: Path, tokenizer: Any) -> None:
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer, every_n_steps=2, items_per_eval=5)
    student = tiny.Student()
    run = trainer(monitor, max_steps=2)
    run.fit(student, tiny.loader())
    assert steps(monitor) == [("look", 0), ("look", 2), ("verdict", 2)]
    run.fit_loop.epoch_loop.max_steps = 4
    run.fit(student, tiny.loader())
    assert steps(monitor)[3:] == [("look", 4), ("verdict", 4)]
    trainer(monitor, max_steps=1).fit(tiny.Student(), tiny.loader())
    assert steps(monitor) == [("look", 0), ("verdict", 1)]


def test_validate_and_test_do_nothing(folder: Path, tokenizer: Any) -> None:
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer)
    trainer(monitor).validate(tiny.Student(), tiny.loader(8), verbose=False)
    assert (monitor.history, monitor.report) == ([], None)


def test_an_exception_inside_a_look_leaves_flags_and_random_states(folder: Path, tokenizer: Any) -> None:
    seen: dict[str, Any] = {}

    def state(module: L.LightningModule) -> Any:
        return (
            [m.training for m in module.modules()],
            random.getstate(),
            np.random.get_state()[1].tolist(),
            torch.get_rng_state().tolist(),
            torch.is_grad_enabled(),
        )

    class Before(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen["before"] = state(pl_module)

        def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
            seen["after"] = state(pl_module)

    def forward(module: tiny.Student, ids: torch.Tensor) -> torch.Tensor:
        if module.trainer.global_step == 2:
            torch.rand(3), random.random()
            raise RuntimeError("the look fails")
        return module.net(ids).logits

    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer, forward=forward, every_n_steps=2)
    with pytest.raises(RuntimeError, match="the look fails"):
        trainer(Before(), monitor).fit(tiny.Student(), tiny.loader())
    assert seen["before"] == seen["after"]
    assert all(seen["after"][0])


def test_two_monitors_keep_their_own_state(folder: Path, tokenizer: Any) -> None:
    pair = [ForgettingMonitor(str(folder / f"{name}.yaml"), tokenizer) for name in ("alpha", "beta")]
    assert pair[0].state_key != pair[1].state_key
    trainer(*pair, max_steps=1).fit(tiny.Student(), tiny.loader())
    assert [list(m.report.tasks) for m in pair if m.report] == [["alpha"], ["beta"]]


def test_two_monitors_of_the_same_tasks_each_go_on_after_a_cut(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """They ask otherwise: other shots, another prompt, other target tasks, another seed."""
    alpha, beta = (str(folder / f"{name}.yaml") for name in ("alpha", "beta"))
    ways: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"num_fewshot": 1}, {"system_instruction": "the cat sings"}, {"target_tasks": beta},
    ]  # fmt: skip

    def run(steps: int, **kwargs: Any) -> list[ForgettingMonitor]:
        every = [
            ForgettingMonitor(
                alpha, tokenizer, every_n_steps=2, items_per_eval=6 + k, gauges=False, on_fit_end=False, **way
            )
            for k, way in enumerate(ways)
        ]
        keep = ModelCheckpoint(dirpath=tmp_path, filename="cut", every_n_train_steps=2, save_top_k=-1)
        L.seed_everything(0, verbose=False)
        trainer(*every, *([keep] if not kwargs else []), max_steps=steps).fit(tiny.Student(), tiny.loader(), **kwargs)
        return every

    first = run(2)
    assert len({monitor.state_key for monitor in first}) == len(ways)
    second = run(4, ckpt_path=str(tmp_path / "cut.ckpt"))
    for before, after in zip(first, second, strict=True):
        assert after.history[: len(before.history)] == before.history
        assert steps(after) == [("look", 0), ("look", 2), ("look", 4)]
    sizes = [[report.pooled.n_items for report in monitor.history] for monitor in second]
    assert sizes == [[6 + k] * 3 for k in range(len(ways))]


def test_two_monitors_that_a_checkpoint_could_not_tell_apart_are_refused(folder: Path, tokenizer: Any) -> None:
    class Brings(tiny.Student):
        def configure_callbacks(self) -> list[L.Callback]:
            return [ForgettingMonitor(str(folder / "alpha.yaml"), tokenizer, every_n_steps=n) for n in (2, 3)]

    with pytest.raises(ConfigError, match="Two ForgettingMonitor callbacks ask the same .*give one another `seed`"):
        trainer(max_steps=1).fit(Brings(), tiny.loader())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ForgettingMonitor`"):
        trainer(*Brings().configure_callbacks())  # Lightning's own word


def test_the_modules_own_tokenizer_and_a_named_part_do(folder: Path, tokenizer: Any) -> None:
    student = tiny.Student()
    student.tokenizer = tokenizer
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), forward="net")
    trainer(monitor, max_steps=1).fit(student, tiny.loader())
    assert monitor.report is not None


class Steps(L.Callback):
    """Counts batches."""

    taken = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.taken += 1


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"tasks": "no_such_task"}, TaskError, "'no_such_task' is unknown to lm-eval"),
        ({"tasks": "missing.yaml"}, TaskError, "'missing.yaml' does not exist"),
        ({"tokenizer": None}, ConfigError, "Student has no attribute `tokenizer`"),
        ({"tokenizer": "./no_such_folder"}, ConfigError, "`tokenizer`='./no_such_folder' does not exist"),
        ({"tokenizer": "models/base/no_such"}, ConfigError, "`tokenizer`='models/base/no_such' does not exist"),
        ({"tokenizer": Path("no_such_folder")}, ConfigError, "`tokenizer`='no_such_folder' does not exist"),
        ({"forward": "no.such"}, ConfigError, "`forward`='no.such'"),
    ],
)
def test_bad_input_fails_before_the_first_step(
    folder: Path, tokenizer: Any, kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    monitor = ForgettingMonitor(**{"tasks": str(folder / "beta.yaml"), "tokenizer": tokenizer, **kwargs})
    counter = Steps()
    with pytest.raises(error, match=message):
        trainer(monitor, counter).fit(tiny.Student(), tiny.loader())
    assert counter.taken == 0


OFFLINE = """
import json, sys, time
from pathlib import Path
import lightning as L
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from tests.forgetting import tiny

for tasks in (["arc_easy", "hellaswag", "winogrande"], [sys.argv[1]]):
    start = time.time()
    monitor = ForgettingMonitor(tasks, tokenizer="gpt2")
    try:
        L.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[LoRA(r=2), monitor]
        ).fit(tiny.Student(), tiny.loader())
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error), time.time() - start]))
"""


def test_hub_out_of_reach_fails_soon_for_tasks_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    env.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", OFFLINE, str(folder / "beta.yaml")]
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=900)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    (kind, tasks, seconds), (other_kind, tokenizer, other_seconds) = said
    assert (kind, other_kind) == ("TaskError", "ConfigError")
    assert all(part in tasks for part in ("'arc_easy'", "dataset_path: json", "give its local folder as `tokenizer`"))
    assert "`tokenizer`='gpt2' is no folder here" in tokenizer
    assert "give the local folder of a tokenizer" in tokenizer
    assert max(seconds, other_seconds) < 30


def test_a_model_without_adapters_is_refused(folder: Path, tokenizer: Any) -> None:
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer)
    run = L.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[monitor])
    with pytest.raises(ConfigError, match="Student has none. Add the LoRA callback"):
        run.fit(tiny.Student(), tiny.loader())


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"on_forgetting": "panic"}, ConfigError, "must be one of warn, stop, rollback, scale: got 'panic'"),
        ({"target_tasks": 3}, ConfigError, "`target_tasks` must be task names.*got 3"),
        ({"target_tasks": []}, ConfigError, "`target_tasks` is empty"),
        ({"every_n_steps": 0}, ConfigError, "`every_n_steps` must be 1 or more: got 0"),
        ({"every_n_epochs": -1}, ConfigError, "`every_n_epochs` must be 1 or more: got -1"),
        ({"items_per_eval": 0}, ConfigError, "`items_per_eval` must be 1 or more: got 0"),
        ({"batch_tokens": 0}, ConfigError, "`batch_tokens` must be 1 or more: got 0"),
        ({"tolerance": 2.0}, ConfigError, "`tolerance`.*got 2.0"),
        ({"alpha": 1.5}, ConfigError, "`alpha`.*got 1.5"),
        ({"tasks": []}, ConfigError, "`tasks` is empty"),
        ({"tasks": None}, ConfigError, "`tasks` must be task names.*got None"),
        ({"tasks": ["arc_easy", 3]}, ConfigError, "`tasks` must be task names.*got \\['arc_easy', 3\\]"),
        ({"every_n_steps": "3"}, ConfigError, "`every_n_steps` must be a whole number or None: got '3'"),
        ({"every_n_steps": 2.5}, ConfigError, "`every_n_steps` must be a whole number or None: got 2.5"),
        ({"every_n_epochs": True}, ConfigError, "`every_n_epochs` must be a whole number or None: got True"),
        ({"items_per_eval": None}, ConfigError, "`items_per_eval` must be a whole number: got None"),
        ({"num_fewshot": -1}, ConfigError, "`num_fewshot` must be 0 or more: got -1"),
        ({"at_steps": 3}, ConfigError, "`at_steps` must be a list of optimizer steps.*got 3"),
        ({"at_steps": "30"}, ConfigError, "`at_steps` must be a list of optimizer steps.*got '30'"),
        ({"at_steps": [-1, 0, 5]}, ConfigError, "`at_steps` must hold whole numbers of 1 or more: got \\[-1, 0\\]"),
        ({"at_steps": [2.5]}, ConfigError, "`at_steps` must hold whole numbers of 1 or more: got \\[2.5\\]"),
        ({"at_fractions": 0.5}, ConfigError, "`at_fractions` must be a list of shares of the run.*got 0.5"),
        ({"at_fractions": [0, 0.5, 2, "1"]}, ConfigError, "above 0, up to 1: got \\[0, 2, '1'\\]"),
        ({"tolerance": "1"}, ConfigError, "`tolerance`.*got '1'"),
        ({"alpha": None}, ConfigError, "`alpha`.*got None"),
        ({"tasks": "a,b"}, ConfigError, "`tasks` takes several tasks as a list.*got 'a,b', write \\['a', 'b'\\]"),
        ({"target_tasks": ["a, b"]}, ConfigError, "`target_tasks` takes several tasks as a list.*got 'a, b'"),
        ({"allow_code": True}, ConfigError, "`allow_code` must be a name or a list of names.*got True"),
        ({"allow_code": [1]}, ConfigError, "`allow_code` must be a name or a list of names.*got \\[1\\]"),
        ({"seed": "x"}, ConfigError, "`seed` must be a whole number, such as 0: got 'x'"),
        ({"target_metric": None}, ConfigError, "`target_metric` must be the name of a metric.*got None"),
        ({"on_fit_start": False, "on_fit_end": False}, ConfigError, "would never look. Set `every_n_steps`"),
    ],
)
def test_bad_argument_is_refused(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ForgettingMonitor(**{"tasks": "arc_easy", **kwargs})


def test_command_lines_learn_the_choices_of_on_forgetting() -> None:
    hints = typing.get_type_hints(ForgettingMonitor.__init__)
    assert typing.get_args(hints["on_forgetting"]) == ("warn", "stop", "rollback", "scale")


def test_steps_beyond_the_end_are_named_at_the_start(folder: Path, tokenizer: Any) -> None:
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer, at_steps=[1, 50, 60], items_per_eval=5)
    with pytest.warns(Notice, match="will not look at steps \\[50, 60\\] of `at_steps`: the run ends at step 2"):
        trainer(monitor, max_steps=2).fit(tiny.Student(), tiny.loader())
    assert steps(monitor) == [("look", 0), ("look", 1), ("verdict", 2)]


def test_shares_of_a_run_without_an_end_are_refused(folder: Path, tokenizer: Any) -> None:
    monitor = ForgettingMonitor(str(folder / "beta.yaml"), tokenizer, at_fractions=[0.5])
    with pytest.raises(ConfigError, match="`at_fractions` are shares of the run, and its length is not known"):
        trainer(monitor, max_steps=-1, max_epochs=-1).fit(tiny.Student(), tiny.loader())


class CrashInBuildUp(L.Callback):
    """Saves a checkpoint when the evidence is between nothing and an alarm, and dies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        newest = next(c for c in trainer.callbacks if isinstance(c, ForgettingMonitor)).history[-1]
        if 1.5 < newest.e_value < 20 and trainer.global_step > newest.step:
            trainer.save_checkpoint(self.path)
            raise KeyError("crash")


def test_a_cut_while_an_alarm_builds_up_changes_no_e_value(folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def fit(*callbacks: L.Callback, ckpt: Path | None = None) -> tuple[list[dict[str, Any]], Any]:
        monitor = ForgettingMonitor(
            str(folder / "known.yaml"), tokenizer, every_n_steps=2, items_per_eval=5, on_forgetting="rollback"
        )
        L.seed_everything(2)
        student = tiny.Student(lr=0.05)
        run = trainer(monitor, *callbacks, max_steps=22)
        try:
            run.fit(student, StatefulDataLoader(tiny.Sequences(96), batch_size=4), ckpt_path=ckpt)
        except KeyError:
            assert callbacks
        return [{**r.to_dict(), "seconds": 0} for r in monitor.history], (monitor.outcome, digest(student))

    whole, end = fit()
    cut, _ = fit(CrashInBuildUp(tmp_path / "cut.ckpt"))
    assert 1.5 < cut[-1]["e_value"] < 20
    assert len(cut) < len(whole)
    assert fit(ckpt=tmp_path / "cut.ckpt") == (whole, end)
    assert end[0]["by"] == "rollback"  # from a snapshot that may be from before the cut
    assert max(r["e_value"] for r in whole) >= 20


def test_target_tasks_are_scored_logged_and_refused_twice(folder: Path, tokenizer: Any) -> None:
    names = [str(folder / f"{name}.yaml") for name in ("alpha", "beta")]
    monitor = ForgettingMonitor(names[0], tokenizer, items_per_eval=10, target_tasks=names[1], every_n_steps=1)
    seen: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            seen.append(float(trainer.callback_metrics["learning/beta/delta"]))

    trainer(monitor, Watch(), max_steps=2).fit(tiny.Student(), tiny.loader())
    assert monitor.report is not None
    assert (list(monitor.report.tasks), list(monitor.report.learning)) == (["alpha"], ["beta"])
    assert monitor.report.learning["beta"].n_items == 20
    assert seen == [pytest.approx(r.learning["beta"].delta) for r in monitor.history if r.kind == "look" and r.step]
    twice = ForgettingMonitor(names, tokenizer, target_tasks=names[1])
    with pytest.raises(ConfigError, match="`tasks` and `target_tasks` both have beta"):
        trainer(twice).fit(tiny.Student(), tiny.loader())
