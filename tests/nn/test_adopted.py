# SPDX-License-Identifier: Apache-2.0
"""Layers that bitsandbytes quantized are taken over without a copy, and the CPU repacking fault with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from lightning_lora import LoRA, LoRAConfig, apply_lora, disable_adapters
from lightning_lora.errors import QuantizationError
from lightning_lora.nn.adopted import adopt_linear
from lightning_lora.nn.quantized import PackedLinear
from tests.helpers import LM, loader, make_trainer, tiny_llama

CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4-dq": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


def load(folder: Path, kind: str) -> nn.Module:
    """A model that transformers itself loads in 4 or 8 bit."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**CONFIGS[kind])
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": "cpu"}, dtype=torch.float32
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_loaded_in_few_bits_is_adopted_without_a_copy(folder: Path, kind: str) -> None:
    model, ids = load(folder, kind).train(), torch.randint(64, (2, 10))
    before = model(ids).logits  # in training mode bitsandbytes repacks nothing
    linears = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit | Linear8bitLt)}
    addresses = {name: linear.weight.data.data_ptr() for name, linear in linears.items()}
    assert len(addresses) == 14
    report = apply_lora(model, LoRAConfig(r=4))
    assert report.logical_params == 90_432
    base = model.model.layers[0].self_attn.q_proj.base_layer
    assert isinstance(base, PackedLinear)
    assert base.packed.quant_type == kind
    packed = {n: model.get_submodule(n).base_layer.packed.codes.data_ptr() for n in addresses}
    assert packed == addresses
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(m, Linear4bit | Linear8bitLt) for m in model.modules())


def test_layers_that_no_adapter_is_put_on_are_adopted_too(folder: Path) -> None:
    model = load(folder, "nf4")
    apply_lora(model, LoRAConfig(r=4, target_modules=["q_proj"]))
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)


def _gradients(model: nn.Module, validate: bool) -> dict[str, torch.Tensor]:
    """Gradients of one training batch, after a validation or without one."""
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(r=4))
    ids = torch.randint(64, (2, 16))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    if validate:
        with torch.no_grad():
            model.eval()(ids)
            with disable_adapters(model):
                model(ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_after_a_validation_are_those_without_one(folder: Path, kind: str) -> None:
    expected = _gradients(load(folder, kind), validate=False)
    found = _gradients(load(folder, kind), validate=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_validates_ends_as_one_that_does_not(folder: Path, tmp_path: Path) -> None:
    ends = []
    for validate in (False, True):
        L.seed_everything(3)
        module = LM(load(folder, "nf4-dq").train())
        trainer = make_trainer(tmp_path, [LoRA(r=4)], max_steps=4, val_check_interval=1, precision="bf16-true")
        trainer.fit(module, loader(), loader(size=8) if validate else None)
        ends.append({n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_what_cannot_be_taken_over_says_why() -> None:
    with pytest.raises(QuantizationError, match="`Linear4bit` holds a weight that is not quantized yet"):
        adopt_linear(Linear4bit(64, 64))
    with pytest.raises(QuantizationError, match="`Linear8bitLt` holds a weight that is not quantized yet"):
        adopt_linear(Linear8bitLt(64, 64, has_fp16_weights=False))


def test_a_layer_that_an_evaluation_repacked_is_refused_or_was_not_repacked() -> None:
    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    codes = layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(torch.randn(2, 64, dtype=torch.bfloat16))
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):  # a CPU with AVX512-BF16
        with pytest.raises(QuantizationError, match="repacked in place by an evaluation"):
            adopt_linear(layer)
    else:
        assert torch.equal(adopt_linear(layer).packed.codes, codes.view(-1))
