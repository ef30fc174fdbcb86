# SPDX-License-Identifier: Apache-2.0
"""Rollback and scale in real fits: what is left in the model, in checkpoints, adapter folders and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.errors import Notice, UnsupportedError
from lightning_lora.io.adapter import load_adapter
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from tests.forgetting import tiny


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty questions that the untouched model answers right."""
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_task(folder, "known", tiny.known_items(tiny.llama(), 60, seed=3))
    return str(folder / "known.yaml")


class Worsens(L.Callback):
    """From a step on, training pushes the adapters away from the base; before it they hardly move."""

    def __init__(self, step: int, lr: float = 0.5, keep: bool = True) -> None:
        self.step, self.lr, self.keep = step, lr, keep
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.lr if trainer.global_step >= self.step else 1e-5

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log("steps", float(trainer.global_step))
        if self.keep:
            self.seen[trainer.global_step] = {k: t.clone() for k, t in adapter_state_dict(pl_module).items()}


def fit(monitor: ForgettingMonitor, *callbacks: L.Callback, **kwargs: Any) -> tuple[L.Trainer, tiny.Student]:
    values: dict[str, Any] = {
        "max_steps": 16, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }  # fmt: skip
    L.seed_everything(1, verbose=False)
    run = L.Trainer(callbacks=[LoRA(r=4), *callbacks, monitor], **{**values, **kwargs})
    student = tiny.Student(dropout=0.0)
    run.fit(student, tiny.loader())
    return run, student


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def rolled_back(known: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run that is well for six steps, forgets, and is rolled back at an alarm."""
    out = tmp_path_factory.mktemp("rolled_back")
    worsens = Worsens(step=6)
    monitor = ForgettingMonitor(
        known, tiny.tokenizer(), every_n_steps=2, items_per_eval=12, on_forgetting="rollback", seed=2
    )
    adapters = AdapterCheckpoint(dirpath=out / "adapters", save_top_k=-1, every_n_train_steps=2, save_last=True)
    with pytest.warns(Notice, match="The adapters are those of step 6 again, the newest kept look that holds"):
        run, student = fit(monitor, worsens, adapters, MergeOnFitEnd(out / "merged"), default_root_dir=out)
    return {"run": run, "student": student, "monitor": monitor, "seen": worsens.seen, "adapters": adapters, "out": out}


def test_rollback_leaves_the_newest_adapters_that_hold(rolled_back: dict[str, Any]) -> None:
    monitor, student = rolled_back["monitor"], rolled_back["student"]
    step = rolled_back["run"].global_step
    assert 6 < step < 16
    assert monitor.outcome == {"by": "rollback", "step": step, "rolled_back_to": 6, "holds": True, "items": 60}
    assert same(adapter_state_dict(student), rolled_back["seen"][6])
    look, verdict = monitor.history[-2:]
    assert (look.kind, look.step, look.outcome) == ("look", step, monitor.outcome)
    assert (verdict.kind, verdict.step, verdict.alarms) == ("verdict", step, [])
    assert verdict.pooled.delta >= -0.005
    assert monitor.report == verdict


def test_checkpoints_folders_and_merge_hold_what_was_rolled_back_to(rolled_back: dict[str, Any]) -> None:
    adapters, expected, monitor = rolled_back["adapters"], rolled_back["seen"][6], rolled_back["monitor"]
    for path in (adapters.last_model_path, adapters.best_model_path):
        checkpoint = torch.load(path, weights_only=True)
        assert same(checkpoint["state_dict"], expected)
        assert checkpoint["callbacks"][monitor.state_key]["response"]["outcome"] == monitor.outcome
        loaded = tiny.Student(dropout=0.0)
        load_adapter(loaded, path.removesuffix(".ckpt"))
        assert same(adapter_state_dict(loaded), expected)
    # a checkpoint of the steps between stays what it was
    earlier = torch.load(Path(adapters.last_model_path).with_name("epoch=0-step=8.ckpt"), weights_only=True)
    assert same(earlier["state_dict"], rolled_back["seen"][8])
    assert earlier["callbacks"][monitor.state_key]["response"]["outcome"] is None
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(rolled_back["out"] / "merged")
    ids = tiny.Sequences(4).rows
    with torch.no_grad():
        live = rolled_back["student"].eval().net(ids).logits
        assert torch.allclose(merged.eval()(ids).logits, live, atol=1e-4)


def test_a_run_that_was_rolled_back_goes_on_when_it_is_resumed(
    rolled_back: dict[str, Any], known: str, tmp_path: Path
) -> None:
    monitor = ForgettingMonitor(
        known, tiny.tokenizer(), every_n_steps=2, items_per_eval=12, on_forgetting="rollback", seed=2
    )
    step = rolled_back["run"].global_step
    run = L.Trainer(
        callbacks=[LoRA(r=4), Worsens(step=99), monitor], max_steps=step + 4, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    said = "this run was ended at step .* The adapters are those of step 6 again.*evidence for an alarm begins anew"
    with pytest.warns(Notice, match=said):
        run.fit(tiny.Student(dropout=0.0), tiny.loader(), ckpt_path=rolled_back["adapters"].last_model_path)
    assert run.global_step == step + 4
    assert monitor.outcome is None
    assert monitor.history[: len(rolled_back["monitor"].history) - 1] == rolled_back["monitor"].history[:-1]
    assert monitor.history[-1].e_value < 20


@pytest.mark.parametrize(("action", "lr"), [("rollback", 0.5), ("scale", 0.1)])
def test_a_trainer_that_may_not_stop_yet_acts_at_its_end(known: str, tmp_path: Path, action: Any, lr: float) -> None:
    worsens = Worsens(step=2, lr=lr)
    monitor = ForgettingMonitor(
        known,
        tiny.tokenizer(),
        every_n_steps=2,
        items_per_eval=12,
        on_forgetting=action,
        on_fit_end=False,
        tolerance=0.05 if action == "scale" else 0.005,
    )
    plain = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_last=True)
    run, student = fit(monitor, worsens, plain, min_steps=13, max_steps=20, limit_train_batches=4)
    assert run.global_step == 13
    assert monitor.outcome is not None
    assert monitor.outcome["step"] < 13
    assert monitor.outcome["holds"] or action == "scale"
    last = torch.load(plain.last_model_path, weights_only=True)
    assert last["callbacks"][monitor.state_key]["response"]["outcome"] == monitor.outcome
    assert same(last["state_dict"], adapter_state_dict(student))
    if action == "rollback":
        assert same(last["state_dict"], worsens.seen[monitor.outcome["rolled_back_to"]])
    else:
        strengths = {module.strength for _, module in adapter_modules(student)}
        assert strengths == {monitor.outcome["scale"]} == set(last["lightning_lora"]["strength"].values())


def test_scale_is_the_largest_that_holds(known: str, tmp_path: Path) -> None:
    monitor = ForgettingMonitor(
        known, tiny.tokenizer(), every_n_steps=2, items_per_eval=12, on_forgetting="scale", tolerance=0.02
    )
    adapters = AdapterCheckpoint(dirpath=tmp_path / "adapters", save_last=True, every_n_train_steps=1)
    with pytest.warns(Notice, match="The adapters were multiplied by .*, the largest scale that holds over 60 items"):
        run, student = fit(monitor, Worsens(step=0, lr=0.01), adapters, MergeOnFitEnd(tmp_path / "merged"))
    assert monitor.outcome is not None
    scale = monitor.outcome["scale"]
    assert 0 < scale < 1
    assert (scale * 32).is_integer()
    assert {module.strength for _, module in adapter_modules(student)} == {scale}
    verdict = monitor.report
    assert verdict is not None
    assert (verdict.kind, verdict.alarms) == ("verdict", [])
    assert max(-verdict.pooled.delta, -verdict.pooled.soft_delta) <= 0.02
    loaded = tiny.Student(dropout=0.0)
    load_adapter(loaded, adapters.last_adapter_path)
    ids = tiny.Sequences(4).rows
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        live = student.eval().net(ids).logits
        assert torch.allclose(loaded.eval().net(ids).logits, live, atol=1e-4)
        assert torch.allclose(merged.eval()(ids).logits, live, atol=1e-4)


@pytest.mark.parametrize("save_last", [True, "link"])
def test_an_alarm_of_the_verdict_alone_is_acted_on_before_fit_returns(
    known: str, tmp_path: Path, save_last: Any
) -> None:
    monitor = ForgettingMonitor(known, tiny.tokenizer(), on_forgetting="rollback")
    adapters = AdapterCheckpoint(dirpath=tmp_path, save_last=save_last)
    with pytest.warns(Notice, match="the verdict: below the base by more than 0.5 points.*those of step 0 again"):
        run, student = fit(monitor, Worsens(step=0), adapters, max_steps=4)
    assert [(r.kind, bool(r.alarms)) for r in monitor.history] == [
        ("look", False),
        ("verdict", True),
        ("verdict", False),
    ]
    assert monitor.outcome == {"by": "rollback", "step": 4, "rolled_back_to": 0, "holds": True, "items": 60}
    assert all(module.untrained() for _, module in adapter_modules(student))
    for path in (adapters.last_model_path, adapters.best_model_path):
        assert same(torch.load(path, weights_only=True)["state_dict"], adapter_state_dict(student))
        loaded = tiny.Student(dropout=0.0)
        load_adapter(loaded, path.removesuffix(".ckpt"))
        assert same(adapter_state_dict(loaded), adapter_state_dict(student))


@pytest.mark.parametrize("kind", [AdapterCheckpoint, ModelCheckpoint])
def test_where_only_checkpoints_of_a_metric_are_kept_what_is_left_is_written_too(
    known: str, tmp_path: Path, kind: Any
) -> None:
    monitor = ForgettingMonitor(known, tiny.tokenizer(), on_forgetting="rollback", gauges=False)
    (tmp_path / "last.ckpt").write_text("of another run")
    best = kind(dirpath=tmp_path, monitor="steps", mode="max", every_n_train_steps=1)
    with pytest.warns(Notice, match=r"no checkpoint was kept of its end: .*last-v1\.ckpt holds them as they are now"):
        run, student = fit(monitor, Worsens(step=0), best, max_steps=4)
    assert best.last_model_path == str(tmp_path / "last-v1.ckpt")
    assert best.save_last is None
    found = torch.load(best.last_model_path, weights_only=True)
    assert same(found["state_dict"], adapter_state_dict(student))
    assert found["callbacks"][monitor.state_key]["response"]["outcome"] == monitor.outcome
    assert not same(torch.load(best.best_model_path, weights_only=True)["state_dict"], found["state_dict"])
    assert (tmp_path / "last.ckpt").read_text() == "of another run"
    if kind is AdapterCheckpoint:
        loaded = tiny.Student(dropout=0.0)
        load_adapter(loaded, best.last_adapter_path)
        assert same(adapter_state_dict(loaded), adapter_state_dict(student))


def test_who_keeps_no_checkpoints_is_given_none(known: str, tmp_path: Path) -> None:
    monitor = ForgettingMonitor(known, tiny.tokenizer(), on_forgetting="rollback", gauges=False)
    fit(monitor, Worsens(step=0), ModelCheckpoint(dirpath=tmp_path / "kept", save_top_k=0), max_steps=4)
    assert monitor.outcome is not None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_rollback_is_refused_by_name_where_a_strategy_keeps_copies_of_the_adapters(known: str) -> None:
    class Own(FSDPStrategy):
        """Lightning refuses FSDP 1 itself on a CPU, and lets subclasses pass."""

    student = tiny.Student(tiny.adapted())
    trainer = L.Trainer(strategy=Own(), accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    monitor = ForgettingMonitor(known, tiny.tokenizer(), on_forgetting="rollback")
    with pytest.raises(UnsupportedError, match='`on_forgetting="rollback"` is not built under Own.*Use "scale"'):
        monitor.on_fit_start(trainer, student)


@pytest.mark.parametrize("action", ["rollback", "scale"])
def test_what_would_undo_a_remedy_is_refused_or_said(known: str, action: Any, tmp_path: Path) -> None:
    student = tiny.Student(tiny.adapted())
    monitor = ForgettingMonitor(known, tiny.tokenizer(), on_forgetting=action)
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    with pytest.raises(UnsupportedError, match=f"`WeightAveraging` puts its average.*`on_forgetting='{action}'`"):
        monitor.on_fit_start(L.Trainer(callbacks=[WeightAveraging()], **quiet), student)
    merge = MergeOnFitEnd(str(tmp_path / "merged"), weights="best")
    with pytest.warns(Notice, match=r"what `on_forgetting=.* leaves is that of the end, merged with weights=\"last\""):
        monitor.on_fit_start(L.Trainer(callbacks=[merge], **quiet), student)
