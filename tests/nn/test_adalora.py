# SPDX-License-Identifier: Apache-2.0
"""`AdaLoRALinear` as a layer: its equation, gradients, bits at the start and when off, dtypes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.config import AdaLoRAConfig, AdapterRecord
from lightning_lora.nn.adalora import AdaLoRALinear
from tests.nn.layers import BASES, make_base, relative

LAYOUTS = [(quantize, conv1d) for quantize in BASES for conv1d in (False, True)]


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
    layer = make(quantize=quantize, conv1d=conv1d, zero=True, dropout=0.5).to(dtype)
    x = torch.randn(3, 7, 64).to(dtype)
    base = layer.base_layer(x)
    assert layer.untrained()
    assert torch.equal(layer(x), base)
    nn.init.normal_(layer.adapter.lora_E, std=100.0)
    assert not layer.untrained()
    assert not torch.equal(layer(x), base)
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.enabled, layer.strength = True, 0.0
    assert torch.equal(layer(x), base)
    assert torch.equal(layer.merged_weight(torch.float32), layer.base_weight(torch.float32))


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_and_gradients_are_the_formulas(quantize: str, conv1d: bool, strength: float) -> None:
    layer = make(quantize=quantize, conv1d=conv1d, bias=not conv1d or quantize == "none")
    layer.strength = strength
    x = torch.randn(3, 7, 64, requires_grad=True)
    g = torch.randn(3, 7, 48)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *layer.triplets], g)
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.triplets)]
    want = equation(layer, *leaves)
    assert relative(y, want) < 1e-6
    for own, theirs in zip(found, torch.autograd.grad(want, leaves, g.double()), strict=True):
        assert relative(own, theirs) < 1e-5
    merged = layer.merged_weight(torch.float32)
    plain = x @ (merged if conv1d else merged.t()) + (0 if layer.bias is None else layer.bias)
    assert relative(y, plain) < 1e-6


def test_under_autocast_and_in_bf16_it_is_near() -> None:
    layer = make()
    x, g = torch.randn(64, 64), torch.randn(64, 48)
    leaves = [t.detach().double().requires_grad_() for t in (x, *layer.triplets)]
    wants = torch.autograd.grad(equation(layer, *leaves), leaves[1:], g.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    low = copy.deepcopy(layer).bfloat16()
    for module, value in ((layer, y), (low, low(x.bfloat16()))):
        founds = torch.autograd.grad(value, module.triplets, g.bfloat16())
        assert relative(value, equation(layer, *leaves)) < 1e-2
        assert {t.dtype for t in (*founds, *module.triplets)} == {torch.float32}
        assert all(relative(found, want) < 2e-2 for found, want in zip(founds, wants, strict=True))


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
