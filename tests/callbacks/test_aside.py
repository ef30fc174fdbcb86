# SPDX-License-Identifier: Apache-2.0
"""Validation aside gives what `Trainer.validate` gives, and the run does not notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora.callbacks.aside import validate_aside
from tests.helpers import LM, TinyNet, Tokens, make_trainer


class Aside(L.Callback):
    """Validates aside when training ends, the model changed for that time."""

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self.found: dict[str, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on:
            with torch.no_grad():
                pl_module.net.head.weight.mul_(2.0)
                self.found = validate_aside(trainer)
                pl_module.net.head.weight.div_(2.0)


class Talks(LM):
    """A module whose validation uses the logger and a random number."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        torch.rand(1)
        if self.logger is not None:
            self.logger.experiment.log_metrics({"by_hand": 1.0})


def run(folder: Path, callback: L.Callback, kind: type[LM] = Talks) -> dict[str, Any]:
    L.seed_everything(3)
    checkpoint = ModelCheckpoint(folder / "ckpt", monitor="val_loss", save_top_k=-1)
    stop = EarlyStopping("val_loss", patience=1)
    module = kind(TinyNet(dropout=0.1))
    trainer = make_trainer(
        folder, [checkpoint, stop, callback], logger=CSVLogger(folder, "log", 0), max_steps=4, val_check_interval=2,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    train, val = DataLoader(Tokens(16), batch_size=4), DataLoader(Tokens(8), batch_size=4, shuffle=True)
    trainer.fit(module, train, val)
    return {
        "rng": torch.rand(2).tolist(),
        "files": sorted(p.name for p in (folder / "ckpt").iterdir()),
        "waited": stop.wait_count,
        "metrics": {name: float(x) for name, x in trainer.callback_metrics.items()},
        "shown": {name: float(x) for name, x in trainer.progress_bar_metrics.items()},
        "logged": {name: float(x) for name, x in trainer.logged_metrics.items()},
        "csv": (folder / "log" / "version_0" / "metrics.csv").read_text(),
        "state": (str(trainer.state.fn), str(trainer.state.status)),
        "modes": [m.training for m in module.modules()],
        "trainer": trainer,
        "module": module,
    }


def test_the_run_does_not_notice_and_the_metrics_are_those_of_validate(tmp_path: Path) -> None:
    without, callback = run(tmp_path / "without", Aside(on=False)), Aside()
    with_it = run(tmp_path / "with", callback)
    for key in without.keys() - {"trainer", "module"}:
        assert with_it[key] == without[key], key
    trainer, module = with_it["trainer"], with_it["module"]
    assert callback.found["val_loss"] != pytest.approx(with_it["metrics"]["val_loss"], rel=1e-3)
    with torch.no_grad():
        module.net.head.weight.mul_(2.0)
    (expected,) = trainer.validate(module, DataLoader(Tokens(8), batch_size=4), verbose=False)
    assert callback.found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-6)


def test_what_was_changed_is_put_back_when_validation_fails(tmp_path: Path) -> None:
    class Fails(Talks):
        broken = False

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            if self.broken:
                raise RuntimeError("no more data")
            super().validation_step(batch, batch_idx)

    class Catches(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.broken = True
            with pytest.raises(RuntimeError, match="no more data"):
                validate_aside(trainer)

    without = run(tmp_path / "without", Aside(on=False), Fails)
    with_it = run(tmp_path / "with", Catches(), Fails)
    for key in without.keys() - {"trainer", "module"}:
        assert with_it[key] == without[key], key
