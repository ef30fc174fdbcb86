# SPDX-License-Identifier: Apache-2.0
"""`AdaLoRALinear` as a layer: its equation, gradients, bits at the start and when off, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.config import AdaLoRAConfig, AdapterRecord
from lightning_lora.nn.adalora import AdaLoRALinear
from tests.nn.layers import (
    LAYOUTS,
    check_equation,
    check_it_changes_no_bit,
    check_low_precision,
    make_base,
    relative,
)


def make(
    inn: int = 64, out: int = 48, *, bias: bool = True, conv1d: bool = False, quantize: str = "none",
    zero: bool = False, dropout: float = 0.0,
) -> AdaLoRALinear:  # fmt: skip
    """A layer in training, with random values, some zero, unless ``zero``."""
    config = AdaLoRAConfig(init_r=6, target_r=3, lora_alpha=8.0, lora_dropout=dropout)
    layer = AdaLoRALinear(make_base(inn, out, bias, conv1d, quantize), AdapterRecord(config), 6, 8.0)
    if not zero:
        for tensor in layer.triplets:
            nn.init.normal_(tensor)
        with torch.no_grad():
            layer.adapter.lora_E[1::2] = 0
    return layer


def equation(layer: AdaLoRALinear, x: Tensor, A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """PEFT's formula, in the dtype of its arguments."""
    weight = layer.base_weight(torch.float32)
    weight = (weight.t() if layer.fan_in_fan_out else weight).to(x)
    y = x @ weight.t() + layer.strength * (x @ (A * E).t() @ B.t()) * 8.0 / (6 + 1e-5)
    return y if layer.bias is None else y + layer.bias.to(x)


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fresh_off_or_at_strength_zero_it_changes_no_bit(quantize: str, conv1d: bool, dtype: torch.dtype) -> None:
    layer = make(quantize=quantize, conv1d=conv1d, zero=True, dropout=0.5)
    check_it_changes_no_bit(layer, layer.adapter.lora_E, dtype, size=100.0)


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_and_gradients_are_the_formulas(quantize: str, conv1d: bool, strength: float) -> None:
    layer = make(quantize=quantize, conv1d=conv1d, bias=not conv1d or quantize == "none")
    layer.strength = strength
    check_equation(layer, layer.triplets, equation)


def test_under_autocast_and_in_bf16_it_is_near() -> None:
    check_low_precision(make(), lambda layer: layer.triplets, equation)


def test_checkpointed_compiled_hooked_and_with_dropout() -> None:
    layer = make(dropout=0.3)
    x = torch.randn(6, 64, requires_grad=True)
    grads = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads.append(torch.autograd.grad(run(x).square().sum(), [x, *layer.triplets]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    layer.eval()
    want = layer(x)
    torch.compiler.reset()
    assert relative(torch.compile(layer, backend="eager", fullgraph=True)(x), want) < 1e-6
    layer.base_layer.register_forward_hook(lambda module, inputs, output: None)
    assert relative(layer(x), want) < 1e-6
    assert "r=6, lora_alpha=8.0, scaling=1.333" in repr(layer)
