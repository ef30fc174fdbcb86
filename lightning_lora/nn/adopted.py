# SPDX-License-Identifier: Apache-2.0
"""Linear layers that bitsandbytes quantized, taken over as `PackedLinear`, without a copy.

A model loaded by transformers in 4 or 8 bit holds ``bitsandbytes.nn.Linear4bit`` or ``Linear8bitLt``. On a
CPU with AVX512-BF16 the 4-bit layer's forward in evaluation repacks its weight in place, and every later
gradient through it is garbage, silently. Over a `PackedLinear` its forward is never run again. An 8-bit
layer's activations are not quantized here: its weight is dequantized, which is closer to the original.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import QuantizationError
from lightning_lora.nn.quantized import BLOCK, NESTED_BLOCK, PackedLinear, PackedWeight


def quantized_elsewhere(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that bitsandbytes quantized."""
    kinds = _layers()
    return kinds is not None and isinstance(module, kinds.Linear4bit | kinds.Linear8bitLt)


def adopt_linear(layer: nn.Module, compute_dtype: torch.dtype | None = None) -> PackedLinear:
    """The same codes and constants in a `PackedLinear`.

    Args:
        layer: A ``Linear4bit`` or ``Linear8bitLt`` whose weight is quantized.
        compute_dtype: See `PackedLinear`.

    Raises:
        QuantizationError: The layer is not quantized yet, was repacked by an evaluation, or uses blocks of
            another size than 64.
    """
    kinds = _layers()
    four_bit = kinds is not None and isinstance(layer, kinds.Linear4bit)
    packed = _adopt_4bit(layer) if four_bit else _adopt_8bit(layer)
    return PackedLinear(packed, layer.bias, compute_dtype=compute_dtype)  # type: ignore[arg-type]


def _layers() -> Any:
    # Not loaded: no such layer can exist.
    package: ModuleType | None = sys.modules.get("bitsandbytes")
    return None if package is None else package.nn


def _adopt_4bit(layer: Any) -> PackedWeight:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        raise QuantizationError(
            "a `Linear4bit` holds a weight that is not quantized yet: move the model to its device first, "
            'or load it in full precision with `quantize="nf4"`'
        )
    if getattr(state, "packing_format_for_cpu", False):
        raise QuantizationError(
            "a `Linear4bit` was repacked in place by an evaluation on this CPU, and its gradients would be wrong: "
            "load the model again and add the adapters before anything is evaluated"
        )
    if state.blocksize != BLOCK:
        raise QuantizationError(f"a `Linear4bit` uses blocks of {state.blocksize}; only blocks of {BLOCK} are known")
    codes = layer.weight.data.view(torch.uint8).view(-1)
    shape = tuple(state.shape)
    if not state.nested:
        return PackedWeight.adopt(state.quant_type, shape, state.dtype, codes=codes, absmax=state.absmax.float())
    if state.quant_type != "nf4" or state.state2.blocksize != NESTED_BLOCK:
        raise QuantizationError(
            f"a `Linear4bit` has doubly quantized {state.quant_type} constants in blocks of {state.state2.blocksize}; "
            f"only nf4 in blocks of {NESTED_BLOCK} is known"
        )
    return PackedWeight.adopt(
        "nf4-dq",
        shape,
        state.dtype,
        codes=codes,
        absmax=state.absmax.view(-1),
        nested_absmax=state.state2.absmax.float(),
        nested_offset=state.offset.float(),
    )


def _adopt_8bit(layer: Any) -> PackedWeight:
    weight = layer.weight
    codes = weight.data if weight.data.dtype == torch.int8 else layer.state.CB
    absmax = getattr(weight, "SCB", None)
    absmax = layer.state.SCB if absmax is None else absmax
    if codes is None or absmax is None:
        raise QuantizationError(
            "a `Linear8bitLt` holds a weight that is not quantized yet: move the model to its device first, "
            'or load it in full precision with `quantize="int8"`'
        )
    return PackedWeight.adopt("int8", tuple(codes.shape), torch.float16, codes=codes, absmax=absmax.float())
