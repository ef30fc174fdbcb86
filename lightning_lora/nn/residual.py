# SPDX-License-Identifier: Apache-2.0
"""`ResidualLoRALinear`: a low-rank update over what is left of the base when its start was taken out.

    W_res = W - s B0 A0                                   frozen, packed perhaps; see `starts`
    y = x W_res^T + b + s D(x) A^T B^T                    trained, from B = B0 and A = A0 on
    y = x W_res^T + b + s x A0^T B0^T                     switched off: the base, to rounding

So the update of the base is ``s (B A - B0 A0)``, a plain LoRA of rank 2r: ``[B, -B0]`` and ``[A; A0]``. Folders hold
that one. A0 and B0 are buffers, kept in checkpoints beside A and B. A strength of lambda multiplies the update:
``W_res + lambda s B A + (1 - lambda) s B0 A0``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.errors import AdapterMismatchError, Notice, UnsupportedError
from lightning_lora.nn.adapter import AdapterModule, Held, torch_dtype
from lightning_lora.nn.functional import add_lora
from lightning_lora.nn.layers import is_conv1d, is_transparent
from lightning_lora.nn.linear import LoRAAdapter, LoRALinear
from lightning_lora.nn.quantized import PackedLinear, PackedWeight
from lightning_lora.nn.starts import Start, start_of

START_A, START_B = "adapter.start_A", "adapter.start_B"

_SAME = 1e-5  # relative difference of two starts that rounding explains


class ResidualAdapter(LoRAAdapter):
    """The factors, and those that they began as."""

    start_A: Tensor
    start_B: Tensor
    rest: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("start_A", torch.zeros_like(self.lora_A))
        self.register_buffer("start_B", torch.zeros_like(self.lora_B))
        self.rest_factor = 0.0
        # The factor of B0 A0 once more as a tensor, for compiled code: see `LoRAAdapter.scale`.
        self.register_buffer("rest", torch.zeros((), device=self.lora_A.device), persistent=False)

    @torch.no_grad()
    def begin(self, start: Start) -> None:
        """Take a start in."""
        self.start_A.copy_(start.A)
        self.start_B.copy_(start.B)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B as they began."""
        if "start_A" not in self._buffers:  # not yet in the base class's constructor
            super().reset_parameters()
            return
        self.lora_A.copy_(self.start_A)
        self.lora_B.copy_(self.start_B)
        self.scale.fill_(self.factor)
        self.rest.fill_(self.rest_factor)


class ResidualLoRALinear(LoRALinear):
    """A `LoRALinear` whose base lost its start.

    Args:
        base_layer: What is left of the user's layer, see `residual_base`.
        record: See `LoRALinear`.
        r: Rank.
        lora_alpha: Numerator of the scale.
        start: What was taken.
    """

    title = "a start that is taken out of the base (PiSSA, OLoRA, LoftQ)"
    built_for = frozenset({"portable"})

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, r: int, lora_alpha: float, start: Start) -> None:
        super().__init__(base_layer, record, r, lora_alpha)
        self.init = cast(LoRAConfig, record.config).init_lora_weights
        own: Any = self.adapter
        own.begin(start)

    def _new_adapter(self, **kwargs: Any) -> LoRAAdapter:
        return ResidualAdapter(**kwargs)

    @property
    def start(self) -> tuple[Tensor, Tensor]:
        """A0 and B0."""
        adapter: Any = self.adapter
        return adapter.start_A, adapter.start_B

    @property
    def update_rank(self) -> int:
        """See `LoRALinear.update_rank`: that of the start counts too."""
        return 2 * self.r

    @property
    def update_alpha(self) -> float:
        """See `LoRALinear.update_alpha`."""
        return self.lora_alpha * (math.sqrt(2.0) if self.use_rslora else 2.0)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """See `LoRALinear.update_factors`: ``[A; A0]`` and ``[B, -B0]``."""
        (A0, B0), (A, B) = self.start, super().update_factors()
        return torch.cat([A, A0.to(A)]), torch.cat([B, -B0.to(B)], dim=1)

    def own_names(self) -> list[str]:
        """Those of the factors and of their start."""
        return [*super().own_names(), START_A, START_B]

    def base_names(self) -> list[str]:
        """See `AdapterModule.base_names`: the start is what the base lacks."""
        return [START_A, START_B]

    def held(self) -> Held | None:
        """See `AdapterModule.held`."""
        held = super().held()
        if held is not None:
            held.tensors.update({name: self.live(name) for name in (START_A, START_B)})
        return held

    def hold(self, held: Held | None, in_place: bool = True) -> None:
        """See `AdapterModule.hold`; the same adapter alone comes back, since the base is what it left.

        Raises:
            UnsupportedError: Another adapter, or none, is to take its place.
        """
        if held is None or set(held.tensors) != set(self.own_names()):
            raise UnsupportedError(alone(self.init))
        AdapterModule.hold(self, held, in_place)

    def exchange(self, held: Held | None, changed: list[Tensor]) -> Held | None:
        """See `AdapterModule.exchange`."""
        return AdapterModule.exchange(self, held, changed)

    def live(self, name: str) -> Tensor:
        """See `AdapterModule.live`."""
        return AdapterModule.live(self, name) if name in (START_A, START_B) else super().live(name)

    def _rescale(self) -> None:
        super()._rescale()
        adapter: Any = self._modules["adapter"]
        self._whole = self._strength == 1.0  # compiled code looks at this, and not at the strength itself
        adapter.rest_factor = self.scaling * (1.0 - self._strength)
        adapter.rest.fill_(adapter.rest_factor)

    def untrained(self) -> bool:
        """Whether both factors are still what they began as."""
        A0, B0 = self.start
        return torch.equal(self.lora_A.detach(), A0) and torch.equal(self.lora_B.detach(), B0)

    def base_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """See `LoRALinear.base_weight`: with the start in it."""
        return self._mixture(0.0, dtype)

    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """See `LoRALinear.merged_weight`."""
        return self._mixture(self.strength if self.enabled else 0.0, dtype)

    @torch.no_grad()
    def _mixture(self, strength: float, dtype: torch.dtype | None) -> Tensor:
        """``W_res + lambda s B A + (1 - lambda) s B0 A0``, summed in fp32 at least and rounded once."""
        residual = super().base_weight()
        total = residual.to(torch.promote_types(residual.dtype, torch.float32))
        pairs = [(strength, self.lora_A, self.lora_B), (1.0 - strength, *self.start)]
        for share, A, B in pairs:
            if share != 0.0:
                part = (B.to(total) @ A.to(total)).mul_(self.scaling * share)
                total = total + (part.t() if self.fan_in_fan_out else part)
        return total.to(dtype or residual.dtype)

    def _compute(self, x: Tensor, active: bool) -> Tensor:
        y = super()._compute(x, active)
        if active and self._whole:
            return y
        adapter: Any = self.adapter
        rest = adapter.rest if torch.compiler.is_compiling() else adapter.rest_factor
        A0, B0 = self.start
        return add_lora(y, x.to(y.dtype), A0, B0, rest if active else self.scaling, 0.0)

    @torch.no_grad()
    def restoring(self, values: Mapping[str, Tensor]) -> Callable[[], None] | None:
        """See `AdapterModule.restoring`: a base that was made by another start is made by this one.

        Raises:
            AdapterMismatchError: The base is packed, and the other start is not the same but for rounding.
        """
        mine, theirs = self.start, (values[START_A].to(self.start[0]), values[START_B].to(self.start[1]))
        if all(torch.equal(own, other) for own, other in zip(mine, theirs, strict=True)):
            return None
        if not isinstance(self.base_layer, PackedLinear):
            return lambda: self._take_back(mine, theirs)
        difference = _distance(mine, theirs) / _distance(mine)
        if not difference <= _SAME:
            raise AdapterMismatchError(
                f"the start of {self.init!r} comes out by {difference:.1e} (relative) "
                "another here than in the run that the file is of, and the packed base with it: use the same version "
                "of torch and the same kind of device as that run, or carry its adapter on as a folder (`save_adapter`)"
            )
        warnings.warn(
            f"the start of {self.init!r} was computed with other rounding than in the run "
            "that the file is of (another number of threads, another machine): the packed base is the same but for "
            "single codes, and what follows is not the same to the bit",
            Notice,
            stacklevel=2,
        )
        return None

    def _take_back(self, mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
        weight: Any = self.base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        (A, B), (A1, B1) = ((A.to(wide), B.to(wide)) for A, B in (mine, theirs))
        change = (B @ A).sub_(B1 @ A1).mul_(self.scaling)
        weight.copy_(weight.to(wide) + (change.t() if self.fan_in_fan_out else change))


def alone(init: str) -> str:
    """Why another adapter cannot stand beside one that begins so."""
    return (
        f'an adapter that begins with a part of the base (`init_lora_weights="{init}"`) shares a model with no other: '
        "others do not fit what is left of the base. Write it as a folder (`save_adapter` makes plain LoRA over the "
        "base as it was of it) and load that beside others into a fresh base"
    )


@torch.no_grad()
def residual_base(
    layer: nn.Module, config: LoRAConfig, r: int, scale: float, device: torch.device | str | None = None
) -> tuple[nn.Module, Start]:
    """What is left of a linear layer, packed as ``config.quantize`` says, and the start that was taken.

    A dense layer gets a new weight; the old one stays as it is, for what else may be tied to it.

    Args:
        layer: `torch.nn.Linear` or transformers' ``Conv1D``, frozen.
        config: A `LoRAConfig`.
        r: Rank of this layer.
        scale: s of this layer.
        device: Where to compute, and where packed weights stay; where the weight is if None.

    Raises:
        ConfigError: The rank is larger than a side of the weight.
        UnsupportedError: The weight has no values, or no such rank, or the layer is packed already or computes in a
            way of its own.
    """
    init = config.init_lora_weights
    if not is_transparent(layer):
        raise UnsupportedError(
            f'`init_lora_weights="{init}"`: a {type(layer).__name__} is packed already, or has a forward or hooks of '
            "its own, and nothing can be taken out of its weight: load the base in full precision (`quantize` packs "
            "it then), or name the layer in `exclude_modules`"
        )
    transposed, weight = is_conv1d(layer), cast(Tensor, layer.weight).detach()
    there = weight if device is None else weight.to(device)
    dtype = torch_dtype(config.adapter_dtype)

    def own_layout(matrix: Tensor) -> Tensor:
        return (matrix.t() if transposed else matrix).to(weight.dtype).contiguous()

    def packed(matrix: Tensor) -> Tensor:
        dense = PackedWeight(own_layout(matrix), config.quantize).dequantize(matrix.dtype)
        return dense.t() if transposed else dense

    matrix = there.t() if transposed else there
    start = start_of(init, matrix, r, scale, dtype, packed if config.quantize != "none" else None, config.loftq_iter)
    residual = own_layout(start.residual)
    if config.quantize == "none":
        layer.weight = nn.Parameter(residual.to(weight.device), requires_grad=False)
        return layer, start
    narrow = None if config.compute_dtype == "auto" else torch_dtype(config.compute_dtype)
    bias: Any = layer.bias
    return PackedLinear(PackedWeight(residual, config.quantize), bias, transposed, narrow), start


def _distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor] | None = None) -> float:
    """The norm of ``B A``, or of ``B A - B1 A1``, from the factors."""
    A, B = (factor.double() for factor in first)
    if second is not None:
        A1, B1 = (factor.double() for factor in second)
        A, B = torch.cat([A, A1]), torch.cat([B, -B1], dim=1)
    return float(((A @ A.t()) * (B.t() @ B)).sum().clamp(min=0).sqrt())
