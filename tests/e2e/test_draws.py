# SPDX-License-Identifier: Apache-2.0
"""Saving and validating draw what they will: a run trains the same weights with them and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRA, adapter_state_dict
from tests.helpers import LM, TinyNet, loader, make_trainer


class Drawing(LM):
    """Noise on the gradients, as private training adds it, and draws in the last hook of a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(TinyNet(dropout=0.1))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad += 1e-2 * torch.randn_like(parameter.grad)

    def on_train_batch_end(self, *args: Any) -> None:
        torch.rand(1)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.rand(1)
        super().validation_step(batch, batch_idx)


def trained(folder: Path, *saves: ModelCheckpoint, **kwargs: Any) -> dict[str, Tensor]:
    module = Drawing()
    torch.manual_seed(1)
    values = {"max_steps": 8, "num_sanity_val_steps": 0, **kwargs}
    trainer = make_trainer(folder, [LoRA(r=4, lora_dropout=0.1), *saves], **values)
    data: tuple[DataLoader, DataLoader] = loader(24, shuffle=True), loader(8)
    trainer.fit(module, *data)
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}


@pytest.mark.parametrize("kind", ["validates", "saves", "saves and validates", "monitors"])
def test_the_same_weights_with_and_without(kind: str, tmp_path: Path) -> None:
    saves = {
        "saves": [ModelCheckpoint(tmp_path / "a", every_n_train_steps=1)],
        "saves and validates": [ModelCheckpoint(tmp_path / "a", every_n_train_steps=2)],
        "monitors": [ModelCheckpoint(tmp_path / "a", monitor="val_loss", save_top_k=-1)],
    }
    plain = trained(tmp_path, limit_val_batches=0)
    validation = {"limit_val_batches": 0} if kind == "saves" else {"val_check_interval": 3}
    found = trained(tmp_path, *saves.get(kind, []), **validation)
    assert all(torch.equal(tensor, found[name]) for name, tensor in plain.items())
