# SPDX-License-Identifier: Apache-2.0
"""The scale that is kept is in the live model, the merge, the files and the verdict; a scale of 1 leaves no trace."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.callbacks.scale_sweep import ScaleSweep
from lightning_lora.errors import ConfigError, Notice
from lightning_lora.forgetting.paired import PairedScores
from lightning_lora.forgetting.scales import compare_tasks
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.sweep import Sweep
from lightning_lora.forgetting.tasks import load_tasks
from lightning_lora.io.adapter import load_adapter
from lightning_lora.io.checkpoint import load_from_checkpoint
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.strategies.ddp import AdapterDDPStrategy
from tests.e2e.matrix import launch
from tests.forgetting import tiny

IDS = tiny.Sequences(4).rows


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task that the base knows by heart: whatever is learned costs something."""
    return str(tiny.write_task(tmp_path_factory.mktemp("known"), "known", tiny.known_items(tiny.llama(), 40, seed=3)))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def watch(task: str, **kwargs: Any) -> ForgettingMonitor:
    return ForgettingMonitor(task, tiny.tokenizer(), on_fit_start=False, **kwargs)


def fit(
    folder: Path,
    callbacks: list[L.Callback],
    lr: float = 0.01,
    ckpt_path: str | None = None,
    student: tiny.Student | None = None,
    **kwargs: Any,
) -> tuple[L.Trainer, tiny.Student]:
    L.seed_everything(7)
    values: dict[str, Any] = {"devices": 1, "max_steps": 6, "val_check_interval": 3, "logger": False}
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[LoRA(r=4), *callbacks], **{**values, **kwargs},
    )  # fmt: skip
    student = student or tiny.Student(lr=lr)
    trainer.fit(student, tiny.loader(), tiny.loader(8), ckpt_path=ckpt_path)
    return trainer, student


def logged(file: Path) -> list[dict[str, str]]:
    """A CSV logger's rows without what the sweep adds and what is time."""
    with file.open() as text:
        rows = [
            {k: x for k, x in row.items() if x and not k.startswith("scale_sweep/")} for row in csv.DictReader(text)
        ]
    times = ("forgetting/seconds", "step")
    return [row for row in rows if row.keys() - set(times) and row.pop("forgetting/seconds", "0")]


def test_what_is_kept_is_in_the_live_model_the_merge_the_files_and_the_verdict(known: str, tmp_path: Path) -> None:
    monitor, merge = watch(known, tolerance=0.08), MergeOnFitEnd(tmp_path / "merged")
    checkpoint = AdapterCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_last=True)
    sweep = ScaleSweep((0.0, 0.1, 0.3, 0.6), dirpath=tmp_path)
    trainer, student = fit(tmp_path, [monitor, sweep, checkpoint, merge])
    found = sweep.result
    assert found is not None
    assert [p.scale for p in found.points] == [0.0, 0.1, 0.3, 0.6, 1.0]
    assert found.points[0].pooled.delta == 0.0
    assert found.points[0].pooled.soft_delta == 0.0
    assert not found.points[-1].holds
    assert 0.0 < found.scale < 1.0
    assert found.holds
    assert found.chosen.target == min(p.target for p in found.points if p.holds and p.scale > 0)
    # the live model
    assert {m.strength for _, m in adapter_modules(student)} == {found.scale}
    (again,) = trainer.validate(student, tiny.loader(8), verbose=False)
    assert again["val_loss"] == pytest.approx(found.chosen.target, rel=1e-6)
    live = logits(student.net)
    # the merge
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), live, rtol=1e-4, atol=1e-4)
    # the files
    plain = tiny.Student()
    load_adapter(plain, tmp_path / "ckpt" / "last")
    assert torch.allclose(logits(plain.net), live, rtol=1e-5, atol=1e-5)
    loaded = load_from_checkpoint(tiny.Student, tmp_path / "ckpt" / "last.ckpt")
    assert torch.equal(logits(loaded.net), live)
    assert Sweep.from_dict(json.loads((tmp_path / "scale_sweep.json").read_text())) == found
    assert (tmp_path / "scale_sweep.png").read_bytes()[:4] == b"\x89PNG"
    # the verdict
    assert monitor.report is not None
    assert monitor.report.kind == "verdict"
    assert monitor.report.pooled == found.chosen.pooled


class Cut(L.Callback):
    """Ends a run, or has one that is resumed end at once."""

    def __init__(self, where: str) -> None:
        self.where, self.validated = where, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = self.where == "at once"

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self.validated += 1
            if (self.where, self.validated) == ("sweep", 2):
                raise KeyError("cut")


def test_a_resume_keeps_the_scale_and_sweeps_nothing_twice(known: str, tmp_path: Path) -> None:
    def run(folder: str, cut: str = "", **kwargs: Any) -> tuple[ScaleSweep, Cut, tiny.Student]:
        sweep, stops = ScaleSweep((0.1, 0.3), dirpath=tmp_path), Cut(cut)
        checkpoint = AdapterCheckpoint(tmp_path / folder, every_n_train_steps=3, save_last=True)
        callbacks = [stops, watch(known, tolerance=0.08, gauges=False), sweep, checkpoint]
        _, student = fit(tmp_path, callbacks, **kwargs)
        return sweep, stops, student

    last = str(tmp_path / "a" / "last.ckpt")
    first, cut, student = run("a")
    found = first.result
    assert found is not None
    assert 0 < found.scale < 1
    assert cut.validated == 3
    kept = {name: tensor.clone() for name, tensor in adapter_state_dict(student).items()}
    # nothing to train, and nothing trained
    for where, steps in (("", 6), ("at once", 8)):
        again, cut, student = run("b", where, ckpt_path=last, max_steps=steps)
        assert again.result == found
        assert cut.validated == 0
        assert {m.strength for _, m in adapter_modules(student)} == {found.scale}
        assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter_state_dict(student).items())
    # trained on: another sweep, of what the adapters are then
    with pytest.warns(Notice, match=rf"at the scale of {found.scale:g} that was kept at step 6. Training goes on"):
        again, cut, student = run("c", ckpt_path=last, max_steps=8)
    assert again.result is not None
    assert (again.result.step, cut.validated) == (8, 3)
    (strength,) = {m.strength for _, m in adapter_modules(student)}
    assert strength == pytest.approx(found.scale * again.result.scale)


def test_a_run_that_was_cut_inside_its_sweep_says_what_is_to_be_done(known: str, tmp_path: Path) -> None:
    def run(cut: str, **kwargs: Any) -> tuple[ScaleSweep, tiny.Student]:
        sweep = ScaleSweep((0.1, 0.3), dirpath=tmp_path)
        checkpoint = AdapterCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_last=True, save_top_k=-1)
        callbacks = [Cut(cut), watch(known, tolerance=0.08, gauges=False), sweep, checkpoint]
        return sweep, fit(tmp_path, callbacks, **kwargs)[1]

    with pytest.raises(KeyError, match="cut"):
        run("sweep")
    (earlier,) = [str(path) for path in (tmp_path / "ckpt").glob("*step=3.ckpt")]
    with pytest.warns(
        Notice, match="over when it was resumed at step 6.*no scale is tried now, and all of the adapter"
    ):
        sweep, student = run("", ckpt_path=str(tmp_path / "ckpt" / "last.ckpt"))
    assert sweep.result is None
    assert {m.strength for _, m in adapter_modules(student)} == {1.0}
    sweep, student = run("", ckpt_path=earlier)
    assert sweep.result is not None
    assert sweep.result.scale < 1
    assert {m.strength for _, m in adapter_modules(student)} == {sweep.result.scale}


def test_a_scale_of_one_leaves_no_trace(known: str, tmp_path: Path) -> None:
    """Weights, random state, checkpoints, metrics and what the run's own code logs are those of a run without."""
    seen = {}
    for name in ("without", "with"):
        folder = tmp_path / name
        callbacks: list[L.Callback] = [watch(known, tolerance=0.99)]
        sweep = ScaleSweep((0.5,))
        checkpoint = AdapterCheckpoint(folder / "ckpt", monitor="val_loss", save_top_k=2, save_last=True)
        callbacks += [sweep] if name == "with" else []
        logger = CSVLogger(folder, name="log", version=0)
        trainer, student = fit(folder, [*callbacks, checkpoint], logger=logger, log_every_n_steps=1)
        draws = torch.rand(3).tolist()
        saved = torch.load(folder / "ckpt" / "last.ckpt", weights_only=True)
        seen[name] = {
            "weights": {key: tensor.tolist() for key, tensor in adapter_state_dict(student).items()},
            "draws": draws,
            "files": sorted(str(p.relative_to(folder / "ckpt")) for p in (folder / "ckpt").rglob("*")),
            "saved": (saved["global_step"], {key: tensor.tolist() for key, tensor in saved["state_dict"].items()}),
            "best": (Path(checkpoint.best_model_path).name, float(checkpoint.best_model_score or 0)),
            "metrics": {key: float(x) for key, x in trainer.callback_metrics.items()},
            "logged": logged(folder / "log" / "version_0" / "metrics.csv"),
            "modes": [module.training for module in student.modules()],
            "strengths": {m.strength for _, m in adapter_modules(student)},
        }
    assert sweep.result is not None
    assert sweep.result.scale == 1.0
    assert seen["with"]["strengths"] == {1.0}
    for key, value in seen["without"].items():
        assert seen["with"][key] == value, key
    assert seen["with"]["logged"]
    assert "val_loss" in seen["with"]["metrics"]


def test_linear_in_depth_keeps_the_last_block_and_scales_the_first(known: str, tmp_path: Path) -> None:
    sweep = ScaleSweep((0.25,), shape="linear", tolerance=0.0)
    with pytest.warns(Notice, match="at no scale above 0"):
        _, student = fit(tmp_path, [watch(known), sweep])
    assert sweep.result is not None
    assert (sweep.result.scale, sweep.result.holds) == (0.25, False)
    strengths = {name.split("layers.")[1][0]: m.strength for name, m in adapter_modules(student) if "layers." in name}
    assert strengths == {"0": 0.25, "1": 1.0}


class Slow(tiny.Student):
    """Takes a fixed time for a step and for a batch of validation."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if self.trainer.state.fn == "validate":
            time.sleep(0.1)
        self.log("val_loss", super().training_step(batch, batch_idx))


def test_a_sweep_is_held_to_the_monitors_time_budget(known: str, tmp_path: Path) -> None:
    """Its validation neither earns nor costs, its comparisons leave the second verdict something."""
    monitor = watch(known, max_time_fraction=0.3, gauges=False)
    sweep, begun = ScaleSweep((0.1, 0.2, 0.3), dirpath=tmp_path, tolerance=0.0), time.perf_counter()
    fit(tmp_path, [monitor, sweep], student=Slow(lr=0.5), max_steps=40, val_check_interval=16)
    seconds, ledger = time.perf_counter() - begun, monitor.state_dict()["budget"]
    assert sweep.result is not None
    assert sweep.result.scale < 1.0
    (items,) = {p.pooled.n_items for p in sweep.result.points}
    assert 8 <= items <= 40
    assert ledger["trained"] < seconds - 4 * 2 * 0.1  # four scales, two batches each
    assert ledger["spent"] <= 0.3 * (ledger["spent"] + ledger["trained"])


def test_a_verdict_that_has_to_be_left_out_after_a_sweep_is_said(known: str, tmp_path: Path) -> None:
    monitor = watch(known, max_time_fraction=0.001, gauges=False, at_steps=[1])
    sweep = ScaleSweep((0.1,), dirpath=tmp_path, tolerance=0.0, items=40)
    monitor.look_at_start = True
    text = r"too short for a verdict.*been changed since the look of step 0.*no longer there"
    with pytest.warns(Notice, match=text):
        fit(tmp_path, [monitor, sweep])
    assert sweep.result is not None
    assert {p.pooled.n_items for p in sweep.result.points} == {40}


def test_tasks_of_its_own_need_no_monitor(known: str, tmp_path: Path) -> None:
    sweep = ScaleSweep((0.5,), tasks=known, tokenizer=tiny.tokenizer(), items=10, tolerance=0.99, mode="max")
    fit(tmp_path, [sweep])
    assert sweep.result is not None
    assert {p.pooled.n_items for p in sweep.result.points} == {10}
    assert list(sweep.result.points[0].tasks) == ["known"]
    assert sweep.result.chosen.target == max(p.target for p in sweep.result.points)
    assert (tmp_path / "scale_sweep.json").exists()


def test_scales_multiply_what_the_adapters_had(known: str, tmp_path: Path) -> None:
    class Halves(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for _, module in adapter_modules(pl_module):
                module.strength = 0.5

    sweep = ScaleSweep((0.5,), tolerance=0.0)
    with pytest.warns(Notice, match="0.5"):
        _, student = fit(tmp_path, [Halves(), watch(known), sweep])
    assert {m.strength for _, m in adapter_modules(student)} == {0.25}


def test_what_cannot_work_is_refused_before_training(known: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scales"):
        ScaleSweep((2.0,))
    for alone in ((), (0,), (0.0, 1.0)):
        with pytest.raises(ConfigError, match="`scales` must hold at least one share between 0 and 1, such as 0.5"):
            ScaleSweep(alone)
    for wrong in (0.5, "0.5", None):
        with pytest.raises(ConfigError, match=r"`scales` must be a list of shares.*such as \[0.25, 0.5, 0.75\]: got"):
            ScaleSweep(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='`monitor` must be the name of a metric.*"val_loss": got 3'):
        ScaleSweep(monitor=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="shape"):
        ScaleSweep(shape="cubic")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mode"):
        ScaleSweep(mode="lower")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tolerance"):
        ScaleSweep(tolerance=-0.1)
    with pytest.raises(ConfigError, match="there are 0"):
        fit(tmp_path, [ScaleSweep()])
    with pytest.raises(ConfigError, match="put it after"):
        fit(tmp_path, [ScaleSweep(), watch(known)])
    with pytest.raises(ConfigError, match="validation"):
        fit(tmp_path, [watch(known), ScaleSweep()], limit_val_batches=0)
    checkpoint = AdapterCheckpoint(tmp_path / "ckpt", monitor="val_loss")
    merge = MergeOnFitEnd(tmp_path / "merged", weights="best")
    callbacks = [watch(known), ScaleSweep(monitor="val_los"), checkpoint, merge]
    with pytest.warns(Notice, match='weights="last"'), pytest.raises(ConfigError, match=r"no `val_los`.*val_loss"):
        fit(tmp_path, callbacks, max_steps=3)
    assert not (tmp_path / "merged").exists()


def test_two_ranks_keep_one_scale_and_one_process_finds_the_same(known: str, tmp_path: Path) -> None:
    def work() -> None:
        warnings.simplefilter("ignore")
        sweep, merge = ScaleSweep((0.0, 0.1, 0.5)), MergeOnFitEnd(tmp_path / "merged")
        checkpoint = AdapterCheckpoint(tmp_path / "ckpt", every_n_train_steps=3, save_last=True)
        _, student = fit(
            tmp_path, [watch(known, tolerance=0.08), sweep, checkpoint, merge], devices=2,
            strategy=AdapterDDPStrategy(process_group_backend="gloo"),
        )  # fmt: skip
        assert sweep.result is not None
        strengths = sorted({m.strength for _, m in adapter_modules(student)})
        (tmp_path / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps([sweep.result.to_dict(), strengths]))

    assert launch(2, work) == [0, 0]
    (first, strengths), second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [first, strengths] == second
    found = Sweep.from_dict(first)
    assert 0 < found.scale < 1
    assert strengths == [found.scale]
    alone = tiny.Student()
    load_adapter(alone, tmp_path / "ckpt" / "last")
    tasks = load_tasks([known])
    picked = {name: list(range(task.n_docs)) for name, task in tasks.items()}
    pooled, _ = compare_tasks(Scorer(alone, tiny.tokenizer()), PairedScores(tasks), picked)
    assert dataclasses.asdict(pooled) == pytest.approx(dataclasses.asdict(found.chosen.pooled), abs=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(alone.net), rtol=1e-4, atol=1e-4)
