# SPDX-License-Identifier: Apache-2.0
"""Every method beside the callbacks that mend what it forgets, and in the commands that look at it without training."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    BaseKL,
    ForgettingMonitor,
    ReplayMix,
    ScaleSweep,
    adapter_state_dict,
    apply_adapters,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.cli.main import main
from lightning_lora.errors import UnsupportedError
from lightning_lora.model.slots import adapter_modules
from tests.cli.small import BASE, tasks
from tests.forgetting import tiny
from tests.helpers import random_adapters
from tests.methods.table import ROWS, Row

#: Whose strength lies between 0 and 1.
DIVISIBLE = [row for row in ROWS if row.divisible and not row.kin]
WHOLE = [row for row in ROWS if not row.divisible]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty questions that the untouched model answers right: whatever is learned costs something."""
    folder = tmp_path_factory.mktemp("tasks")
    return str(tiny.write_task(folder, "known", tiny.known_items(tiny.llama(), 40, seed=3)))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=tiny.Sequences(4).rows).logits


def watch(task: str, **kwargs: Any) -> ForgettingMonitor:
    return ForgettingMonitor(task, tiny.tokenizer(), on_fit_start=False, **kwargs)


def fit(row: Row, folder: Path, *callbacks: L.Callback, lr: float, **kwargs: Any) -> tuple[L.Trainer, tiny.Student]:
    """A run with `last.ckpt` in ``folder``."""
    L.seed_everything(7, verbose=False)
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[row.make(), *callbacks, saver], **kwargs,
    )  # fmt: skip
    student = tiny.Student(lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(student, tiny.loader(), tiny.loader(8))
    return trainer, student


@pytest.mark.slow
@pytest.mark.parametrize("row", DIVISIBLE, ids=str)
def test_a_sweep_keeps_a_scale_that_the_checkpoint_holds(row: Row, known: str, tmp_path: Path) -> None:
    sweep = ScaleSweep((0.1, 0.5), dirpath=tmp_path)
    remedies = [BaseKL(0.1), ReplayMix(tiny.loader(16), share=0.25), watch(known, tolerance=0.08, gauges=False), sweep]
    _, student = fit(row, tmp_path, *remedies, lr=4 * row.learns_at, max_steps=6)
    assert sweep.result is not None
    assert {module.strength for _, module in adapter_modules(student)} == {sweep.result.scale}
    again = load_from_checkpoint(tiny.Student, tmp_path / "last.ckpt")
    assert torch.equal(logits(again.net), logits(student.net))


@pytest.mark.slow
@pytest.mark.parametrize("action", ["rollback", "scale"])
@pytest.mark.parametrize("row", DIVISIBLE, ids=str)
def test_an_alarm_leaves_less_of_it(row: Row, action: Literal["rollback", "scale"], known: str, tmp_path: Path) -> None:
    monitor = watch(known, every_n_steps=2, items_per_eval=12, on_forgetting=action, seed=2, gauges=False)
    trainer, student = fit(row, tmp_path, monitor, lr=50 * row.learns_at, max_steps=16)
    outcome = monitor.outcome
    assert outcome is not None
    assert outcome["by"] == action
    assert trainer.global_step < 16
    again = load_from_checkpoint(tiny.Student, tmp_path / "last.ckpt")
    assert torch.equal(logits(again.net), logits(student.net))
    if action == "rollback":
        assert outcome["holds"]
    else:
        assert {module.strength for _, module in adapter_modules(student)} == {outcome["scale"]}


@pytest.mark.parametrize("row", WHOLE, ids=str)
def test_what_has_no_parts_is_refused_before_training(row: Row, known: str, tmp_path: Path) -> None:
    text = f"keeps a part of what was trained, and of {row.config().title} there is none: virtual tokens are there or"
    sweep = ScaleSweep((0.1, 0.5), dirpath=tmp_path)
    for callbacks, who in (([watch(known), sweep], "ScaleSweep"), ([watch(known, on_forgetting="scale")], "scale")):
        with pytest.raises(UnsupportedError, match=f'{who}"?`? {text}.*rollback"'):
            fit(row, tmp_path, *callbacks, lr=row.learns_at, max_steps=2)
        assert not (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [("ia3", "6 linears adapted"), ("embedding", "modules adapted"), ("prompt", "1 module adapted"),
     ("norms", "5 modules adapted")],
)  # fmt: skip
def test_a_run_says_what_it_adapts(name: str, text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (row,) = [row for row in ROWS if row.name == name]
    with caplog.at_level("INFO"):
        fit(row, tmp_path, lr=row.learns_at, max_steps=1)
    assert f"{row.config().title}: " in caplog.text
    assert text in caplog.text


class Begun(L.Callback):
    """What is trained as training begins."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = {name: tensor.clone() for name, tensor in adapter_state_dict(pl_module).items()}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if not row.kin], ids=str)
def test_a_run_begins_with_what_another_learned(row: Row, tmp_path: Path) -> None:
    _, first = fit(row, tmp_path, lr=row.learns_at, max_steps=4)
    learned = adapter_state_dict(first)
    starting = dataclasses.replace(row, settings={**row.settings, "init_from": str(tmp_path / "last.ckpt")})
    begun = Begun()
    fit(starting, tmp_path / "second", begun, lr=row.learns_at, max_steps=4)
    assert begun.state.keys() == learned.keys()
    assert [name for name, tensor in learned.items() if not torch.equal(tensor, begun.state[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if not row.kin and (row.peft or row.own_folder)], ids=str)
def test_the_commands_look_at_its_folder(row: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_adapters(model, row.config())
        save_adapter(random_adapters(model, std=0.02), tmp_path / "adapter")
    adapter, task = str(tmp_path / "adapter"), tasks(tmp_path / "tasks")[0]
    capsys.readouterr()
    packing = row.settings.get("quantize", "none")
    asked = [BASE, adapter, "--tasks", task, "--limit=4", f"--quantize={packing}", "--json"]
    assert main(["eval", *asked]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["tasks"]
    swept = main(["sweep", *asked, "--target_tasks", task, "--scales", "0.5", "--tolerance=0.9"])
    said = capsys.readouterr()
    if row.divisible:
        assert swept in (0, 1)
        assert {point["scale"] for point in json.loads(said.out)["points"]} == {0.5, 1.0}
    else:
        assert swept == 2
        assert "virtual tokens are there or not" in said.err
    assert main(["inspect", adapter, "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)
