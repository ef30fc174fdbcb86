# SPDX-License-Identifier: Apache-2.0
"""One adapted layer of any kind, the map that it should compute, in float64, and what is asked of all kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.nn.adapted import AdaptedLinear
from lightning_lora.nn.layers import is_conv1d
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear, PackedWeight

BASES = ("none", "nf4", "nf4-dq", "fp4", "int8")
#: Every packing, of a linear and of a Conv1D.
LAYOUTS = [(quantize, conv1d) for quantize in BASES for conv1d in (False, True)]


def make_base(
    inn: int = 64, out: int = 48, bias: bool = True, conv1d: bool = False, quantize: str = "none"
) -> nn.Module:
    """A frozen linear map with random weight and bias."""
    base = Conv1D(out, inn) if conv1d else nn.Linear(inn, out, bias=bias)
    nn.init.normal_(base.weight, std=inn**-0.5)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    base.requires_grad_(False)
    if quantize == "none":
        return base
    return PackedLinear(PackedWeight(base.weight, quantize), base.bias, is_conv1d(base)).requires_grad_(False)


def make_layer(
    inn: int = 64,
    out: int = 48,
    *,
    r: int = 4,
    lora_alpha: float = 8.0,
    bias: bool = True,
    conv1d: bool = False,
    quantize: str = "none",
    zero: bool = False,
    **config: Any,
) -> LoRALinear:
    """A `LoRALinear` in training, with a random update unless ``zero``."""
    base = make_base(inn, out, bias, conv1d, quantize)
    layer = LoRALinear(base, AdapterRecord(LoRAConfig(r=r, lora_alpha=lora_alpha, **config)), r, lora_alpha)
    if not zero:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def exact(layer: LoRALinear, x: Tensor, A: Tensor, B: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What ``layer``, computing in ``dtype``, should give without dropout; from float64 leaves."""
    weight = layer.base_weight(dtype).double()
    weight = weight.t() if layer.fan_in_fan_out else weight
    return _map(x, weight, layer.bias, layer.strength * layer.scaling, A, B)


def magnitude(layer: LoRALinear, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The same with every term's magnitude: what rounding errors are to be measured against."""
    weight = layer.base_weight(torch.float32).double().abs()
    weight = weight.t() if layer.fan_in_fan_out else weight
    bias = None if layer.bias is None else layer.bias.abs()
    return _map(x, weight, bias, abs(layer.strength * layer.scaling), A, B)


def _map(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, A: Tensor, B: Tensor) -> Tensor:
    y = x @ weight.t() + scale * (x @ A.t() @ B.t())
    return y if bias is None else y + bias.double()


def grads_of(layer: LoRALinear) -> tuple[Tensor, Tensor]:
    """Gradients of A and B, which are then cleared."""
    grads = (layer.lora_A.grad.clone(), layer.lora_B.grad.clone())
    layer.zero_grad()
    return grads


def relative(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``, against 1 where nothing is wanted."""
    got, want = got.detach().double(), want.detach().double()
    error, size = (got - want).norm(), want.norm()
    return float(error / size.clamp(min=1e-3)) if got.numel() else 0.0


def check_it_changes_no_bit(layer: AdaptedLinear, moves: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """Fresh, switched off and at strength 0, ``layer`` [.., 64] -> [.., 48] is its base; not with ``moves`` drawn."""
    layer, x = layer.to(dtype), torch.randn(3, 7, 64).to(dtype)
    assert layer.untrained()
    assert torch.equal(layer(x), layer.base_layer(x))
    nn.init.normal_(moves, std=size)
    check_off_it_is_the_base(layer, x)


def check_off_it_is_the_base(layer: AdaptedLinear, x: Tensor) -> None:
    """A layer that was trained is its base, bit for bit, switched off and at strength 0, and not before."""
    base = layer.base_layer(x)
    assert not layer.untrained()
    assert not torch.equal(layer(x), base)
    layer.enabled = False
    assert torch.equal(layer(x), base)
    layer.enabled, layer.strength = True, 0.0
    assert torch.equal(layer(x), base)
    assert torch.equal(layer.merged_weight(torch.float32), layer.base_weight(torch.float32))


def check_equation(layer: AdaptedLinear, trained: Sequence[Tensor], equation: Callable[..., Tensor]) -> None:
    """Output, gradients of the input and of what is trained, and merge: all of ``equation(layer, x, *trained)``."""
    x = torch.randn(3, 7, layer.in_features, requires_grad=True)
    g = torch.randn(3, 7, layer.out_features)
    y = layer(x)
    found = torch.autograd.grad(y, [x, *trained], g)
    leaves = [t.detach().double().requires_grad_() for t in (x, *trained)]
    want = equation(layer, *leaves)
    assert relative(y, want) < 1e-6
    for own, theirs in zip(found, torch.autograd.grad(want, leaves, g.double()), strict=True):
        assert relative(own, theirs) < 1e-5
    merged, bias = layer.merged_weight(torch.float32), layer.merged_bias()
    plain = x @ (merged if layer.fan_in_fan_out else merged.t()) + (0 if bias is None else bias)
    assert relative(y, plain) < 1e-6
    assert relative(layer.base_weight(torch.float32) + layer.delta_weight(), merged) < 1e-6


def check_low_precision(
    layer: AdaptedLinear, trained: Callable[[Any], Sequence[Tensor]], equation: Callable[..., Tensor]
) -> None:
    """Under autocast and in bf16 it is near ``equation``, and what is trained stays in fp32."""
    x, g = torch.randn(64, 64), torch.randn(64, 48)
    leaves = [t.detach().double().requires_grad_() for t in (x, *trained(layer))]
    wants = torch.autograd.grad(equation(layer, *leaves), leaves[1:], g.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    low = copy.deepcopy(layer).bfloat16()
    for module, value in ((layer, y), (low, low(x.bfloat16()))):
        founds = torch.autograd.grad(value, trained(module), g.bfloat16())
        assert relative(value, equation(layer, *leaves)) < 1e-2
        assert {t.dtype for t in (*founds, *trained(module))} == {torch.float32}
        assert all(relative(found, want) < 2e-2 for found, want in zip(founds, wants, strict=True))
