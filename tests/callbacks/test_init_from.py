# SPDX-License-Identifier: Apache-2.0
"""`init_from` with a checkpoint: the weights of an earlier run, and nothing else of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, CheckpointError, Notice
from tests.helpers import LM, TinyNet, loader, make_trainer


class Start(L.Callback):
    """What a run begins with."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = {name: t.clone() for name, t in adapter_state_dict(pl_module).items()}
        self.step, self.moments = trainer.global_step, len(trainer.optimizers[0].state)


def begin(module: LM, path: Path, r: int = 4) -> None:
    make_trainer(path.parent, [LoRA(r=r, init_from=str(path))]).fit(module, loader())


def trained(tmp_path: Path, net: nn.Module, **lora: Any) -> tuple[LM, Path]:
    module = LM(copy.deepcopy(net))
    trainer = make_trainer(tmp_path, [LoRA(r=4, **lora)], max_steps=6)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return module, tmp_path / "run.ckpt"


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_and_nothing_else(weights_only: bool, tmp_path: Path) -> None:
    net = TinyNet()
    module, path = trained(tmp_path, net, modules_to_save=["head"])
    module.trainer.save_checkpoint(path, weights_only=weights_only)
    other, look = LM(copy.deepcopy(net)), Start()
    trainer = make_trainer(tmp_path, [LoRA(r=4, modules_to_save=["head"], init_from=str(path)), look])
    trainer.fit(other, loader())
    assert look.state.keys() == adapter_state_dict(module).keys()
    assert all(torch.equal(look.state[name], t) for name, t in adapter_state_dict(module).items())
    assert (look.step, look.moments) == (0, 0)
    assert not any(torch.equal(look.state[name], t) for name, t in adapter_state_dict(other).items())


def test_over_another_packing(tmp_path: Path) -> None:
    net = TinyNet()
    module, path = trained(tmp_path, net)
    other, look = LM(copy.deepcopy(net)), Start()
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize="nf4", init_from=str(path)), look])
    with pytest.warns(Notice, match="were trained over a base packed as 'none', this one is 'nf4'"):
        trainer.fit(other, loader())
    assert all(torch.equal(look.state[name], t) for name, t in adapter_state_dict(module).items())


def test_what_does_not_fit(tmp_path: Path) -> None:
    net = TinyNet()
    _, path = trained(tmp_path, net)
    with pytest.raises(AdapterMismatchError, match="another LoRA configuration .r: checkpoint 4, model 8"):
        begin(LM(copy.deepcopy(net)), path, r=8)
    torch.manual_seed(9)
    with pytest.raises(BaseMismatchError, match="were trained on another base"):
        begin(LM(TinyNet()), path)
    trainer = make_trainer(tmp_path)
    trainer.fit(LM(copy.deepcopy(net)), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="holds no adapters"):
        begin(LM(copy.deepcopy(net)), tmp_path / "plain.ckpt")
