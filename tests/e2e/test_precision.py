# SPDX-License-Identifier: Apache-2.0
"""Under every `precision`: dtypes stay as they were made, the base stays bit for bit, the adapters learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRA, adapter_state_dict, load_from_checkpoint
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedWeight
from tests.helpers import LM, loader, make_trainer, tiny_llama


class Llama(LM):
    """Built in ``__init__`` or late; the base is the same whatever the default dtype is then."""

    def __init__(self, late: bool = False) -> None:
        super().__init__(None, lr=3e-2, build_late=True)
        self.save_hyperparameters()
        if not late:
            self.configure_model()

    def configure_model(self) -> None:
        if self.net is None:
            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float32)
            self.net = tiny_llama()
            self.net.lm_head.weight.data.mul_(20)  # as random it would give hardly anything but equal logits
            torch.set_default_dtype(default)


class Record(L.Callback):
    """What the module is made of after conversion (at setup's end) and when training starts."""

    def __init__(self) -> None:
        self.made: dict[str, torch.dtype] = {}
        self.start: dict[str, torch.dtype] = {}
        self.base: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = kept_dtypes(pl_module)
        self.base = base_weights(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def kept_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Dtypes of A, B, codes and quantization constants."""
    found = {name: tensor.dtype for name, tensor in adapter_state_dict(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight):
            found.update({f"{name}.{own}": buffer.dtype for own, buffer in module.named_buffers()})
    return found


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The dequantized base in fp32, and every frozen tensor as it is."""
    found = {n: m.base_weight(torch.float32).clone() for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    trained = adapter_state_dict(model)
    found.update({n: t.clone() for n, t in model.state_dict().items() if n not in trained})
    return found


CODES = {"nf4": torch.uint8, "nf4-dq": torch.uint8, "fp4": torch.uint8, "int8": torch.int8, "none": None}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4-dq"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_dtypes_and_base_stay(precision: Any, quantize: Any, late: bool, tmp_path: Path) -> None:
    module, record = Llama(late), Record()
    lora = LoRA(r=4, lora_dropout=0.1, quantize=quantize)
    trainer = make_trainer(tmp_path, [lora, record], precision=precision, max_steps=24)
    trainer.fit(module, loader(8, 8), loader(8))
    for name, dtype in record.start.items():
        last = name.rpartition(".")[2]
        if last in ("lora_A", "lora_B", "nested_absmax", "nested_offset"):
            assert dtype is torch.float32, name
        elif last == "codes":
            assert dtype is CODES[quantize], name
        else:
            assert dtype is (torch.uint8 if quantize == "nf4-dq" else torch.float32), name
    assert kept_dtypes(module) == record.start
    for name, tensor in base_weights(module).items():
        assert tensor.dtype is record.base[name].dtype
        assert torch.equal(tensor, record.base[name]), name
    assert record.losses[-1] < record.losses[0] - 0.5  # the same batch at each step

    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert all(t.dtype is torch.float32 for t in stored["state_dict"].values())
    assert all(t.dtype is torch.float32 for s in stored["optimizer_states"][0]["state"].values() for t in s.values())
    again = load_from_checkpoint(Llama, tmp_path / "x.ckpt")
    assert kept_dtypes(again) == record.start
    assert all(torch.equal(adapter_state_dict(again)[n], t) for n, t in adapter_state_dict(module).items())

    resumed, second = Llama(late), Record()
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize=quantize), second], precision=precision, max_steps=26)
    trainer.fit(resumed, loader(8, 8), ckpt_path=tmp_path / "x.ckpt")
    assert kept_dtypes(resumed) == record.start
    assert all(torch.equal(t, record.base[n]) for n, t in base_weights(resumed).items())


@pytest.mark.parametrize("precision", ["16-true", "64-true"])
def test_other_precisions(precision: Any, tmp_path: Path) -> None:
    module, record = Llama(), Record()
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize="nf4"), record], precision=precision, max_steps=24)
    trainer.fit(module, loader(8, 8))
    assert kept_dtypes(module) == record.start
    assert {t.dtype for t in adapter_state_dict(module).values()} == {torch.float32}
    assert record.losses[-1] < record.losses[0] - 0.5  # the same batch at each step


def test_masters_of_another_dtype_keep_it(tmp_path: Path) -> None:
    module = Llama()
    make_trainer(tmp_path, [LoRA(r=4, adapter_dtype="bf16")], precision="32-true").fit(module, loader())
    assert {t.dtype for t in adapter_state_dict(module).values()} == {torch.bfloat16}
