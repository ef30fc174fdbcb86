# SPDX-License-Identifier: Apache-2.0
"""`LoRA` beside other callbacks, tuners and plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, BitsandbytesPrecision
from lightning.pytorch.tuner import Tuner

from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.errors import OptimizerError, UnsupportedError
from tests.callbacks.test_lora import assert_only_adapters_moved, fit
from tests.helpers import LM, TinyNet, loader, make_trainer


def test_second_lora(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="2 `LoRA` callbacks; one model takes one"):
        make_trainer(tmp_path, [LoRA(r=4), LoRA(r=8)]).fit(LM(TinyNet()), loader())


def test_second_owner_of_quantization(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize="nf4")])
    # The Trainer takes the plugin on CUDA only; the strategy that it is given to takes it anywhere.
    trainer.strategy.precision_plugin = BitsandbytesPrecision(mode="nf4", dtype=torch.float32)
    with pytest.raises(UnsupportedError, match=r"`BitsandbytesPrecision` and `LoRA\(quantize='nf4'\)` would both"):
        trainer.fit(LM(TinyNet()), loader())


def test_averaging_before_lora(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="`EMAWeightAveraging` stands before `LoRA`.*put `LoRA` first"):
        make_trainer(tmp_path, [EMAWeightAveraging(), LoRA(r=4)]).fit(LM(TinyNet()), loader())


def test_averaging_after_lora(tmp_path: Path) -> None:
    module = LM(TinyNet())
    before = fit(module, tmp_path, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert_only_adapters_moved(before, module)


def test_lr_find(tmp_path: Path) -> None:
    module = LM(TinyNet())
    trainer = make_trainer(tmp_path, [LoRA(r=4)], max_steps=40)
    found = Tuner(trainer).lr_find(module, loader(), num_training=12, min_lr=1e-4, max_lr=0.1)
    assert found is not None
    assert len(found.results["lr"]) >= 12
    assert all(float(t.abs().sum()) == 0 for n, t in adapter_state_dict(module).items() if n.endswith("lora_B"))
    trainer.fit(module, loader())
    assert all(float(t.abs().sum()) > 0 for t in adapter_state_dict(module).values())


def test_lr_finder_callback(tmp_path: Path) -> None:
    module = LM(TinyNet())
    fit(module, tmp_path, callbacks=[LearningRateFinder(num_training_steps=8)], max_steps=4)
    assert all(float(t.abs().sum()) > 0 for t in adapter_state_dict(module).values())


def test_async_checkpoints(tmp_path: Path) -> None:
    module = LM(TinyNet())
    saver = ModelCheckpoint(tmp_path / "async", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    fit(module, tmp_path, callbacks=[saver], plugins=[AsyncCheckpointIO()])
    files = sorted((tmp_path / "async").glob("*.ckpt"))
    assert [f.name for f in files] == ["step=2.ckpt", "step=4.ckpt"]
    last = torch.load(files[-1], weights_only=True)
    assert last["state_dict"].keys() == adapter_state_dict(module).keys()
    assert all(torch.equal(t, last["state_dict"][n]) for n, t in adapter_state_dict(module).items())


def test_fork_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [LoRA(r=4)], strategy="ddp_fork", devices=1)
    with pytest.raises(Exception, match="starts its processes by spawn or fork: the trained adapters would be lost"):
        trainer.fit(LM(TinyNet()), loader())


def test_stochastic_weight_averaging_is_refused_by_name(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    trainer = make_trainer(tmp_path, [LoRA(r=2), StochasticWeightAveraging(swa_lrs=1e-2)])
    with pytest.raises(UnsupportedError, match="`StochasticWeightAveraging` copies the model before the adapters"):
        trainer.fit(LM(TinyNet()), loader())


def test_a_base_that_another_callback_unfreezes_is_an_error(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import BaseFinetuning

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: L.LightningModule) -> None:
            pass

        def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.embed, optimizer)

    trainer = make_trainer(tmp_path, [LoRA(r=2), Unfreeze()], max_steps=40)
    with pytest.raises(OptimizerError, match="frozen base would be trained, 'net.embed.weight' first"):
        trainer.fit(LM(TinyNet()), loader(size=16))
    assert trainer.current_epoch == 1
