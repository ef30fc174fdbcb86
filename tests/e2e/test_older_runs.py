# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that hold the whole model, of a run without the callback, and how a run with it goes on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_lora import LoRA, LoRAConfig, adapter_state_dict, apply_lora
from lightning_lora.errors import OptimizerError
from tests.helpers import LM, TinyNet, loader, make_trainer


class Older(LM):
    """Adapts itself and saves everything."""

    def __init__(self, only_trained: bool) -> None:
        torch.manual_seed(0)
        super().__init__(TinyNet())
        self.only_trained = only_trained

    def configure_model(self) -> None:
        if not adapter_state_dict(self):
            apply_lora(self, LoRAConfig(r=4))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad or not self.only_trained], lr=1e-2)


class Start(L.Callback):
    """What the run begins with."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.adapters = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}
        state, step = trainer.optimizers[0].state, trainer.global_step
        self.moments = [state[p]["exp_avg"].clone() for p in pl_module.parameters() if p.requires_grad]
        self.step = step


def older(tmp_path: Path, only_trained: bool) -> tuple[Older, list[Tensor], Path]:
    module = Older(only_trained)
    trainer = make_trainer(tmp_path, max_steps=6)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "full.ckpt")
    assert torch.load(tmp_path / "full.ckpt")["state_dict"].keys() > adapter_state_dict(module).keys()
    state = trainer.optimizers[0].state
    return module, [state[p]["exp_avg"].clone() for p in module.parameters() if p.requires_grad], tmp_path / "full.ckpt"


@pytest.mark.parametrize("only_trained", [True, False], ids=["optimizer of adapters", "optimizer of everything"])
def test_weights_moments_and_steps_go_on(only_trained: bool, tmp_path: Path) -> None:
    before, moments, path = older(tmp_path, only_trained)
    torch.manual_seed(0)
    module, start = LM(TinyNet()), Start()
    trainer = make_trainer(tmp_path, [LoRA(r=4), start], max_steps=10)
    trainer.fit(module, loader(), ckpt_path=path)
    assert (start.step, trainer.global_step) == (6, 10)
    assert all(torch.equal(t, start.adapters[name]) for name, t in adapter_state_dict(before).items())
    assert all(torch.equal(a, b) for a, b in zip(moments, start.moments, strict=True))
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    assert torch.load(tmp_path / "new.ckpt")["state_dict"].keys() == adapter_state_dict(module).keys()


def test_another_optimizer_is_told_by_its_groups(tmp_path: Path) -> None:
    class Groups(LM):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(
                [{"params": self.net.first.parameters()}, {"params": self.net.second.parameters()}]
            )

    _, _, path = older(tmp_path, only_trained=True)
    torch.manual_seed(0)
    with pytest.raises(OptimizerError, match=r"has groups of \[4\] parameters, this run's of \[2, 2\]: make"):
        make_trainer(tmp_path, [LoRA(r=4)], max_steps=10).fit(Groups(TinyNet()), loader(), ckpt_path=path)
