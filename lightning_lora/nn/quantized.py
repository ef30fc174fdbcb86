# SPDX-License-Identifier: Apache-2.0
"""Packed frozen weights: `PackedWeight` (nf4, nf4-dq, fp4, int8) and `PackedLinear` over it.

4 bit (QLoRA, Dettmers et al. 2023): the flattened weight is cut into blocks of 64; each block keeps its
largest magnitude ``absmax`` and, per element, the index of the nearest of 16 levels in [-1, 1]:

    w ~ level[code] * absmax[block]            two codes a byte, the first in the high half

"nf4-dq" packs ``absmax`` once more: minus its mean, in blocks of 256, to 8-bit dynamic levels.
"int8" keeps a row's largest magnitude and ``round(127 w / absmax)`` (LLM.int8, without outliers).

Layout and 4-bit codes are those of bitsandbytes, whose kernels are called where it is installed; without it
the torch operations below give the same codes. The 8-bit codes of the scales are the nearest levels; its CPU
kernel takes the second nearest for about one scale in 700. Neither its modules nor their in-place repacking are used.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
import warnings
from types import ModuleType

import torch
from torch import Tensor, nn

from lightning_lora.errors import Notice, QuantizationError
from lightning_lora.nn.adapter import KeepsDType
from lightning_lora.nn.functional import lora_linear

BLOCK = 64
NESTED_BLOCK = 256
PIECE = 2**16  # weights packed at a time on a CPU: whole blocks; scratch that leaves no large holes in the heap
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what bitsandbytes' kernels read and write

# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two exponent bits, one mantissa bit, as bitsandbytes orders and scales them.
FP4 = (
    0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25,
    -0.0, -0.005208333333, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25,
)  # fmt: skip


class PackedWeight(KeepsDType):
    """A frozen matrix in packed form; its buffers keep their dtypes whatever the model is cast to.

    Args:
        weight: Floating matrix to pack, on the device where it will be used.
        quant_type: "nf4", "nf4-dq", "fp4" or "int8".

    Raises:
        QuantizationError: The weight is not a floating matrix, or the type is unknown.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor
    nested_offset: Tensor

    def __init__(self, weight: Tensor, quant_type: str) -> None:
        super().__init__()
        if quant_type not in ("nf4", "nf4-dq", "fp4", "int8"):
            raise QuantizationError(f"`quantize` must be nf4, nf4-dq, fp4 or int8, got {quant_type!r}")
        if weight.dim() != 2 or not weight.is_floating_point():
            raise QuantizationError(f"only floating matrices are packed, got {tuple(weight.shape)} of {weight.dtype}")
        self.quant_type = quant_type
        self.logical_shape = tuple(weight.shape)
        self.source_dtype = weight.dtype
        self._stored: dict[str, tuple[torch.dtype, int]] = {}  # see `as_parameters`
        with torch.no_grad():
            for name, tensor in _pack(weight.detach(), quant_type).items():
                self.register_buffer(name, tensor)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The dense weight, computed in fp32 and rounded once to ``dtype``."""
        with torch.no_grad():
            if self.quant_type == "int8":
                codes, scale = self._bits("codes").view(self.logical_shape), (self._bits("absmax") / 127).unsqueeze(1)
                return torch.mul(codes, scale, out=torch.empty_like(codes, dtype=dtype))
            return _dequantize_4bit(
                self._bits("codes"), self._block_absmax(), self.quant_type[:3], self.logical_shape, dtype
            )

    def _block_absmax(self) -> Tensor:
        absmax = self._bits("absmax")
        if self.quant_type != "nf4-dq":
            return absmax
        levels = _dynamic_levels(absmax.device)[absmax.int()]
        blocks = torch.repeat_interleave(self._bits("nested_absmax"), NESTED_BLOCK)[: levels.numel()]
        return levels * blocks + self.nested_offset

    @classmethod
    def adopt(
        cls, quant_type: str, logical_shape: tuple[int, int], source_dtype: torch.dtype, **tensors: Tensor
    ) -> PackedWeight:
        """A packed weight around codes and constants that exist already, without a copy."""
        packed = cls.__new__(cls)
        nn.Module.__init__(packed)
        packed.quant_type, packed.logical_shape, packed.source_dtype = quant_type, logical_shape, source_dtype
        packed._stored = {}
        for name, tensor in tensors.items():
            packed.register_buffer(name, tensor)
        return packed

    def as_parameters(self, storage: torch.dtype | None = None) -> None:
        """Make frozen parameters of the buffers, as sharding wants them; a single constant stays a buffer.

        Args:
            storage: Floating dtype to store the bits in, where only such parameters can be sharded.
        """
        for name, buffer in list(self.named_buffers(recurse=False)):
            if not buffer.dim():
                continue
            if storage is not None:
                self._stored[name] = (buffer.dtype, buffer.numel() * buffer.element_size())
                flat = buffer.reshape(-1).view(torch.uint8)
                buffer = torch.nn.functional.pad(flat, (0, -flat.numel() % storage.itemsize)).view(storage)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(buffer, requires_grad=False))

    def _bits(self, name: str) -> Tensor:
        """A buffer in its own dtype, flat, however it is stored."""
        tensor: Tensor = getattr(self, name)
        if name not in self._stored:
            return tensor
        dtype, nbytes = self._stored[name]
        return tensor.detach().view(torch.uint8)[:nbytes].view(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in use, constants included."""
        return sum(t.numel() * t.element_size() for t in [*self.parameters(), *self.buffers()])

    @property
    def logical_numel(self) -> int:
        """Number of weights that are packed here."""
        return math.prod(self.logical_shape)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.quant_type}, shape={self.logical_shape}"


class PackedLinear(nn.Module):
    """A frozen linear layer over a `PackedWeight`; the backward keeps nothing and dequantizes again.

    Args:
        packed: ``(out, in)``, or ``(in, out)`` with ``fan_in_fan_out`` (transformers' ``Conv1D``).
        bias: ``(out,)`` or None; kept as it is, frozen.
        fan_in_fan_out: Whether the weight is stored transposed.
        compute_dtype: Dtype to compute in when narrower than the activations', None for theirs.
    """

    def __init__(
        self,
        packed: PackedWeight,
        bias: nn.Parameter | None,
        fan_in_fan_out: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.fan_in_fan_out = fan_in_fan_out
        self.compute_dtype = compute_dtype
        out, inn = reversed(self.packed.logical_shape) if fan_in_fan_out else self.packed.logical_shape
        self.in_features, self.out_features = inn, out

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dense weight as ``(out, in)``."""
        dense = self.packed.dequantize(dtype)
        return dense.t() if self.fan_in_fan_out else dense

    @property
    def weight(self) -> Tensor:
        """The dense weight in its own layout and former dtype, made anew at each access."""
        return self.packed.dequantize(self.packed.source_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b`` in the activations' dtype. ``x``: ``(..., in)``."""
        inner = compute_dtype(x, self.compute_dtype)
        return lora_linear(x.to(inner), self.matrix, self.bias).to(output_dtype(x))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def is_autocast(x: Tensor) -> bool:
    """Whether autocast acts on ``x``: float64 it leaves alone, meta tensors it does not know."""
    return not x.is_meta and x.dtype is not torch.float64 and torch.is_autocast_enabled(x.device.type)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `torch.nn.functional.linear` would give: autocast's, or ``x``'s own."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def compute_dtype(x: Tensor, narrower: torch.dtype | None) -> torch.dtype:
    """`output_dtype`, or ``narrower`` where that has fewer bytes: activations are never cast up."""
    dtype = output_dtype(x)
    return narrower if narrower is not None and narrower.itemsize < dtype.itemsize else dtype


def bitsandbytes_functional() -> ModuleType | None:
    """``bitsandbytes.functional``, or None (said once) where it is not installed."""
    return _load_bitsandbytes()


@functools.lru_cache(maxsize=1)
def _load_bitsandbytes() -> ModuleType | None:
    if importlib.util.find_spec("bitsandbytes") is None:
        warnings.warn(
            "bitsandbytes is not installed: 4-bit weights are packed and unpacked by plain torch operations, "
            "with the same codes but slower; `pip install lightning-lora[quant]` brings its kernels",
            Notice,
            stacklevel=2,
        )
        return None
    # On import it looks for a matrix-product kernel on a model hub, which is not used here, and warns.
    noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        import bitsandbytes.functional
    finally:
        noisy.setLevel(level)
    return bitsandbytes.functional


def _pack(weight: Tensor, quant_type: str) -> dict[str, Tensor]:
    if quant_type == "int8":
        return _quantize_rows(weight)
    codes, absmax = _quantize_4bit(weight, quant_type[:3])
    if quant_type != "nf4-dq":
        return {"codes": codes, "absmax": absmax}
    offset = absmax.mean()
    packed, nested = _quantize_blockwise(absmax - offset)
    return {"codes": codes, "absmax": packed, "nested_absmax": nested, "nested_offset": offset}


def _quantize_rows(weight: Tensor) -> dict[str, Tensor]:
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if not weight.is_meta:
        rows = max(_piece(weight) // max(weight.shape[1], 1), 1)
        for start in range(0, weight.shape[0], rows):
            part = weight[start : start + rows].float()
            absmax[start : start + rows] = largest = part.abs().amax(dim=1)
            scale = (127 / largest.clamp(min=1e-36)).unsqueeze(1)  # finite for a row of zeros
            codes[start : start + rows] = (part * scale).round_()
    return {"codes": codes, "absmax": absmax}


def _piece(weight: Tensor) -> int:
    return PIECE if weight.device.type == "cpu" else 64 * PIECE


def _quantize_4bit(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    functional = bitsandbytes_functional() if weight.device.type == "cuda" else None
    if functional is not None:
        codes, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type=kind, compress_statistics=False
        )
        return codes.view(-1), state.absmax.float()
    # bitsandbytes has no CPU kernel for this; the same codes piece by piece need no scratch of the weight's size. What
    # stays is allocated before what goes: else the heap of a whole model is left with holes of twice its size.
    flat = weight.reshape(-1)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=weight.device)
    if not weight.is_meta:
        size = _piece(weight)
        for start in range(0, flat.numel(), size):
            piece = quantize_4bit_reference(flat[start : start + size], kind)
            for whole, part, per in zip((codes, absmax), piece, (2, BLOCK), strict=True):
                whole[start // per : start // per + part.numel()] = part
    return codes, absmax


def quantize_4bit_reference(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes ``(ceil(n / 2),)`` uint8 and absmax ``(ceil(n / 64),)`` fp32 by torch operations alone."""
    levels = _levels(kind, weight.device)
    order = levels.argsort(stable=True)
    bounds = (levels[order][:-1] + levels[order][1:]) / 2
    scaled, absmax = _scaled_blocks(weight, BLOCK)
    if scaled.numel() % 2:
        scaled = torch.cat([scaled, scaled.new_zeros(1)])
    codes = order.to(torch.uint8)[torch.bucketize(scaled, bounds, out_int32=True)]
    return (codes[::2] << 4) | codes[1::2], absmax


def _quantize_blockwise(values: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit dynamic codes of a vector and the absmax of its blocks of 256."""
    levels = _dynamic_levels(values.device)
    scaled, absmax = _scaled_blocks(values, NESTED_BLOCK)
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8), absmax


def _scaled_blocks(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The flattened values, each divided by the largest magnitude of its block, and these magnitudes."""
    flat = values.reshape(-1).float()
    count = flat.numel()
    padded = torch.nn.functional.pad(flat, (0, -count % block)).view(-1, block)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1, 1)
    return scaled.view(-1)[:count], absmax


def _dequantize_4bit(codes: Tensor, absmax: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # bitsandbytes' CPU kernel walks row by row: rows of whole blocks only; other dtypes go by torch.
    fits = shape[-1] % BLOCK == 0 and dtype in KERNEL_DTYPES
    usable = fits and not codes.is_meta and not torch.compiler.is_compiling()
    if usable and bitsandbytes_functional() is not None:
        return torch.ops.bitsandbytes.dequantize_4bit(codes.view(-1, 1), absmax, BLOCK, kind, list(shape), dtype)
    return dequantize_4bit_reference(codes, absmax, kind, shape, dtype)


def dequantize_4bit_reference(
    codes: Tensor, absmax: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The dense weight by torch operations alone: a table of both halves of a byte, then the scales."""
    levels = _levels(kind, codes.device)
    table = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    count = math.prod(shape)
    dense = table.index_select(0, codes.int()).view(-1)[:count]
    padded = torch.nn.functional.pad(dense, (0, -count % BLOCK)).view(-1, BLOCK)
    return (padded * absmax.unsqueeze(1)).view(-1)[:count].view(shape).to(dtype)


def _levels(kind: str, device: torch.device) -> Tensor:
    return torch.tensor(NF4 if kind == "nf4" else FP4, dtype=torch.float32, device=device)


def _dynamic_levels(device: torch.device) -> Tensor:
    return torch.tensor(_dynamic_level_values(), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=1)
def _dynamic_level_values() -> list[float]:
    """The 256 signed 8-bit levels of Dettmers et al. 2022 (8-bit optimizers), sorted.

    Seven decades: decade i (10^(i-6)) holds 2^i linear steps, the midpoints of [0.1, 1] cut so, both
    signs; with 0 and 1.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32)
        means = ((edges[:-1] + edges[1:]) / 2.0) * 10 ** (exponent - 6)
        values += [sign * mean for mean in means.tolist() for sign in (1.0, -1.0)]
    return sorted(values)
