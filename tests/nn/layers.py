# SPDX-License-Identifier: Apache-2.0
"""One adapted layer of any kind, and the map that it should compute, in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.nn.layers import is_conv1d
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear, PackedWeight

BASES = ("none", "nf4", "nf4-dq", "fp4", "int8")


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
