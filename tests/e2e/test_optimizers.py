# SPDX-License-Identifier: Apache-2.0
"""Optimizers of bitsandbytes, whose states have few bits or lie in paged memory, and LoRA+ in a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import LoRA, adapter_state_dict, loraplus_param_groups
from lightning_lora.errors import CheckpointError, OptimizerError
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.nn.linear import LoRALinear
from tests.e2e.runs import Module, Scenario, fit
from tests.helpers import LM, TinyNet, loader, make_trainer

#: Those of bitsandbytes that train on a CPU; its AdEMAMix32bit raises there.
FEW_BITS = ["Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit", "AdEMAMix8bit"]
MANY_BITS = ["Adam", "AdamW", "PagedAdam", "PagedAdamW", "Lion", "PagedLion"]


class Early(LM):
    """Makes its optimizer in ``__init__``, over the whole model, before there are adapters."""

    def __init__(self, name: str, loraplus_lr: float | None = None) -> None:
        from bitsandbytes import optim

        torch.manual_seed(0)
        super().__init__(TinyNet())
        few = {"min_8bit_size": 16} if "8bit" in name else {}
        self.made = getattr(optim, name)(self.parameters(), lr=5e-3, **few)
        self.loraplus_lr = loraplus_lr

    def configure_optimizers(self) -> Any:
        if self.loraplus_lr is None:
            return self.made
        return torch.optim.SGD(loraplus_param_groups(self, self.loraplus_lr))


def _states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Each parameter's state, which bitsandbytes nests so that FSDP does not look inside."""
    (optimizer,) = checkpoint["optimizer_states"]
    return [state["__bnb_optimizer_quant_state__"] for state in optimizer["state"].values()]


@pytest.mark.parametrize("name", [*FEW_BITS, *MANY_BITS])
@pytest.mark.parametrize("ratio", [None, 16])
def test_every_optimizer_of_bitsandbytes_trains_the_adapters(name: str, ratio: float | None, tmp_path: Path) -> None:
    module = Early(name)
    trainer = make_trainer(tmp_path, [LoRA(r=4, loraplus_lr_ratio=ratio), ModelCheckpoint(tmp_path, "end")])
    trainer.fit(module, loader())
    layers = [m for m in module.modules() if isinstance(m, LoRALinear)]
    assert all(layer.lora_B.abs().sum() > 0 for layer in layers)
    assert [g["lr"] for g in module.made.param_groups] == ([5e-3] if ratio is None else [5e-3, 5e-3 * ratio])
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == adapter_state_dict(module).keys()
    states = _states(checkpoint)
    assert len(states) == 4
    few = torch.uint8 if name in FEW_BITS else torch.float32
    assert {state["state1"].dtype for state in states} == {few}


def test_a_changed_byte_of_a_state_of_few_bits_is_found(tmp_path: Path) -> None:
    s = Scenario(str(tmp_path), optimizer="AdamW8bit", steps=8, cut=4, size=80)
    fit(s, "cut", 4, seed=7)
    path = tmp_path / "cut" / "cut.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    _states(checkpoint)[1]["state1"].view(-1)[5] ^= 1
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"is damaged: 1 of .*__bnb_optimizer_quant_state__.*state1"):
        fit(s, "resumed", 8, seed=7, ckpt=path)


def test_a_checkpoint_of_another_ratio_does_not_resume_and_its_weights_do(tmp_path: Path) -> None:
    s = Scenario(str(tmp_path), steps=8, cut=4, size=80, loraplus_lr_ratio=16)
    fit(s, "cut", 4, seed=7)
    path = tmp_path / "cut" / "cut.ckpt"
    for ratio, told in ((4, "4"), (None, "null")):
        s.loraplus_lr_ratio = ratio
        message = f"was made with `loraplus_lr_ratio` 16, this run's with {told}: resume with the same, or start anew"
        with pytest.raises(OptimizerError, match=message):
            fit(s, "other", 8, seed=7, ckpt=path)
        module = Module()
        trainer = make_trainer(tmp_path, [LoRA(r=4, loraplus_lr_ratio=ratio, init_from=str(path))])
        trainer.validate(module, loader(), verbose=False)
        stored = read_checkpoint(path)["state_dict"]
        assert all(torch.equal(p, stored[name]) for name, p in adapter_state_dict(module).items())


def test_groups_that_the_module_makes_take_the_ratio_of_the_callback(tmp_path: Path) -> None:
    module = Early("AdamW", loraplus_lr=0.1)
    trainer = make_trainer(tmp_path, [LoRA(r=4, loraplus_lr_ratio=8)])
    trainer.fit(module, loader())
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == pytest.approx([0.1, 0.8])


class Named(LM):
    """Groups with names, a schedule of steps."""

    def configure_optimizers(self) -> Any:
        rest = [*self.net.second.parameters(), *self.net.head.parameters()]
        groups = [
            {"params": self.net.first.parameters(), "name": "first"},
            {"params": rest, "name": "rest", "lr": 1e-3},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 10),
                "interval": "step",
            },
        }


def test_rates_are_logged_under_names_of_their_own(tmp_path: Path) -> None:
    monitor = LearningRateMonitor("step")
    lora = LoRA(r=4, loraplus_lr_ratio=16)
    trainer = make_trainer(tmp_path, [lora, monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Named(TinyNet()), loader())
    assert set(monitor.lrs) == {f"lr-AdamW/{n}" for n in ("first", "rest", "first_lora_B", "rest_lora_B")}
    for group in ("first", "rest"):
        assert monitor.lrs[f"lr-AdamW/{group}_lora_B"] == pytest.approx(
            [16 * lr for lr in monitor.lrs[f"lr-AdamW/{group}"]]
        )
    assert monitor.lrs["lr-AdamW/first"] == pytest.approx([0.01, 0.009, 0.008, 0.007])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdamW8bit"])
def test_paged_states_on_a_gpu_resume_to_the_same_bits(name: str, tmp_path: Path) -> None:
    """On a CPU bitsandbytes pages nothing."""

    class Wide(LM):
        def __init__(self) -> None:
            torch.manual_seed(0)
            super().__init__(TinyNet(width=512))  # factors large enough to be paged

        def configure_optimizers(self) -> Any:
            from bitsandbytes import optim

            return getattr(optim, name)(self.parameters(), lr=1e-3)

    def run(steps: int, folder: Path, ckpt: Path | None = None) -> tuple[L.Trainer, dict[str, Tensor]]:
        module = Wide()
        callbacks: list[L.Callback] = [LoRA(r=256), ModelCheckpoint(folder, "{step}", every_n_train_steps=4)]
        trainer = make_trainer(tmp_path, callbacks, accelerator="gpu", max_steps=steps)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return trainer, {name: tensor.cpu() for name, tensor in adapter_state_dict(module).items()}

    trainer, whole = run(8, tmp_path / "whole")
    states = [v for state in trainer.optimizers[0].state.values() for v in state.values() if isinstance(v, Tensor)]
    assert any(getattr(value, "is_paged", False) for value in states)
    run(4, tmp_path / "cut")
    _, resumed = run(8, tmp_path / "resumed", next((tmp_path / "cut").glob("*.ckpt")))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
