# SPDX-License-Identifier: Apache-2.0
"""Cut between two batches whose gradients are accumulated, a run goes on exactly, whoever accumulates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from lightning_lora import LoRA, adapter_state_dict
from tests.helpers import LM, TinyNet, loader, make_trainer

EVERY, CUT = 4, 6


class Manual(LM):
    """Accumulates by itself."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % EVERY == 0:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class Save(L.Callback):
    """Saves once, in the middle of an accumulation."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, i: int) -> None:
        if i + 1 == CUT and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def trained(folder: Path, kind: str, *callbacks: L.Callback, ckpt: Path | None = None, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    module = (Manual if kind == "manual" else LM)(TinyNet())
    scheduler = [GradientAccumulationScheduler({0: EVERY})] if kind == "scheduler" else []
    values = {"max_steps": -1, "max_epochs": 2, **kwargs}
    trainer = make_trainer(folder, [LoRA(r=4), *scheduler, *callbacks], **values)
    trainer.fit(module, loader(32), loader(8), ckpt_path=ckpt)
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}


@pytest.mark.parametrize("kind", ["scheduler", "manual"])
@pytest.mark.parametrize("validation", [{"limit_val_batches": 0}, {"val_check_interval": CUT}])
def test_exact(kind: str, validation: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    uncut = trained(tmp_path, kind, Save(path), **validation)
    assert torch.load(path)["lightning_lora"]["gradients"][0].keys() == uncut.keys()
    resumed = trained(tmp_path, kind, ckpt=path, **validation)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in uncut.items())
