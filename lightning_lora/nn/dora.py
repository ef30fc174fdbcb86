# SPDX-License-Identifier: Apache-2.0
r"""`DoRALinear`: a frozen linear layer whose weight is parted into magnitude and direction (Liu et al. 2024).

With ``V = W + s B A`` and ``m`` (out,) trained, one magnitude for each output::

    W' = m V / |V|             |V|: the norm of each row of V, a constant to the gradient
    y  = x W'^T + b = z + (c - 1)(z - b),    z = x V^T + b as `LoRALinear` gives it,    c = m / |V|

``m`` begins as ``|W|``, so that c is exactly 1 and y is z, bit for bit. V is never made for the norm::

    |V|^2 = |W|^2 + 2 s sum_k B (A W^T)^T + s^2 sum_k B (B (A A^T))        sums over the r columns of B

``|W|`` (fp32) is computed once. In backward, with g the gradient of y::

    dz = c g        dm = sum over N of g (z - b) / |V| = sum over N of g (y - b) / m

For it y is kept, which what comes next often saves too (an activation, say). A layer as wide as it is long makes z anew
from x instead: what follows projections of queries and outputs keeps them not. Where y is kept, the gradient of a
magnitude loses digits as c goes to zero, and at ``m = 0`` there is none.
A strength of lambda takes both parts back: ``V = W + lambda s B A`` and ``|W| + lambda (m - |W|)``; 0 is the base.
Dropout is PEFT's: ``y = x W^T + b + (c - 1) D(x) W^T + c s D(x) A^T B^T``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.adapter import AdapterModule, Held
from lightning_lora.nn.functional import WeightOf, needs_eager, no_autocast
from lightning_lora.nn.layers import is_transparent
from lightning_lora.nn.linear import LoRAAdapter, LoRALinear
from lightning_lora.nn.quantized import PackedLinear

MAGNITUDE = "adapter.lora_magnitude_vector"
_BYTES = 2**19  # of a tensor that backward looks at a time on a CPU: they stay in its cache

_OVERWRITTEN = (
    "the output of a DoRA layer was changed in place, and the gradient of its magnitude needs it: use the form of the "
    "operation behind it that makes a new tensor, such as `nn.ReLU(inplace=False)`"
)


class DoRAAdapter(LoRAAdapter):
    """The factors, the magnitudes, and the norms of the base's rows that these began as."""

    base_norm: Tensor
    share: Tensor

    def __init__(self, base_norm: Tensor, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.strength = 1.0
        self.register_buffer("base_norm", base_norm, persistent=False)
        # The strength once more as a tensor, for compiled code: see `LoRAAdapter.scale`.
        self.register_buffer("share", torch.ones((), device=base_norm.device), persistent=False)
        self.lora_magnitude_vector = nn.Parameter(base_norm.to(self.lora_A.dtype, copy=True))

    def reset_parameters(self) -> None:
        """The factors as `LoRAAdapter` has them, the magnitudes those of the base."""
        super().reset_parameters()
        if "lora_magnitude_vector" in self._parameters:  # not yet in the base class's constructor
            with torch.no_grad():
                self.lora_magnitude_vector.copy_(self.base_norm)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, m={tuple(self.lora_magnitude_vector.shape)}"


class DoRALinear(LoRALinear):
    """A `LoRALinear` with trained magnitudes.

    Args:
        base_layer: See `LoRALinear`; its values are needed, to begin with their norms.
        record: See `LoRALinear`.
        r: Rank; 0 for a vacant module.
        lora_alpha: Numerator of the scale.

    Raises:
        UnsupportedError: The base is on the meta device.
    """

    title = "DoRA (`use_dora`)"
    built_for = frozenset({"fsdp2", "beside"})

    def _new_adapter(self, **kwargs: Any) -> LoRAAdapter:
        weight = self.base_weight(torch.promote_types(self.weight.dtype, torch.float32))
        if weight.is_meta:
            raise UnsupportedError(
                "`use_dora=True`: magnitudes begin as norms of the base's weights, which have no values on the meta "
                "device; load the weights before the adapters are put in"
            )
        norm = torch.linalg.vector_norm(weight, dim=0 if self.fan_in_fan_out else 1)
        return DoRAAdapter(norm, **kwargs)

    @property
    def lora_magnitude_vector(self) -> nn.Parameter:
        """``(out,)``."""
        return self.adapter.lora_magnitude_vector  # type: ignore[return-value]

    def own_names(self) -> list[str]:
        """Those of the factors, and ``adapter.lora_magnitude_vector``."""
        return [*super().own_names(), MAGNITUDE]

    def held(self) -> Held | None:
        """See `AdapterModule.held`."""
        held = super().held()
        if held is not None:
            held.tensors[MAGNITUDE] = self.live(MAGNITUDE)
        return held

    def hold(self, held: Held | None, in_place: bool = True) -> None:
        """See `AdapterModule.hold`."""
        words = held or Held({})
        self.r, self.lora_alpha, self.use_rslora = words.r, words.lora_alpha, words.use_rslora
        self.lora_dropout = words.lora_dropout
        AdapterModule.hold(self, held, in_place)

    def exchange(self, held: Held | None, changed: list[Tensor]) -> Held | None:
        """See `AdapterModule.exchange`."""
        return AdapterModule.exchange(self, held, changed)

    def live(self, name: str) -> Tensor:
        """See `AdapterModule.live`."""
        return AdapterModule.live(self, name) if name == MAGNITUDE else super().live(name)

    def _nothing(self) -> dict[str, Tensor]:
        return {**super()._nothing(), MAGNITUDE: self.lora_magnitude_vector.new_empty(0)}

    def _rescale(self) -> None:
        super()._rescale()
        adapter: Any = self._modules["adapter"]
        if adapter.strength != self._strength:
            adapter.strength = self._strength
            adapter.share.fill_(self._strength)

    def untrained(self) -> bool:
        """Whether B is exactly zero and every magnitude the base's."""
        adapter: Any = self.adapter
        start: Tensor = adapter.base_norm.to(adapter.lora_magnitude_vector.dtype)
        return super().untrained() and torch.equal(adapter.lora_magnitude_vector, start)

    @torch.no_grad()
    def magnitudes(self) -> Tensor:
        """The magnitudes in use, ``|W| + strength (m - |W|)``."""
        adapter: Any = self.adapter
        return torch.lerp(adapter.base_norm, adapter.lora_magnitude_vector.to(adapter.base_norm), self.strength)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """See `LoRALinear.merged_weight`."""
        if not self.enabled or self.strength == 0.0:
            return self.base_weight(dtype)
        return self._weight(dtype)

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W' - W`` in the base layer's own layout; computed in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        return self._weight(wide).sub_(self.base_weight(wide)).to(dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """W'."""
        direction = self.base_weight(dtype) + super().delta_weight(dtype)
        return magnified(direction, self.magnitudes(), self.fan_in_fan_out)

    def _compute(self, x: Tensor, active: bool) -> Tensor:
        if not active:
            return super()._compute(x, active=False)
        adapter: Any = self.adapter
        magnitude, norm = self._magnitude(), self._norm()
        dropout = self.lora_dropout if self.training else 0.0
        if dropout == 0.0:
            z = super()._compute(x, active=True)
            again = self._again(x) if self.in_features == self.out_features and x.dtype == z.dtype else None
            return rescaled(z, magnitude, norm, self.bias, again)
        dropped = F.dropout(x, dropout)
        y, p = super()._compute(x, active=False), super()._compute(dropped, active=False)
        if self.bias is not None:
            p = p - self.bias.to(p.dtype)
        c = ratio(magnitude, norm)
        scale = adapter.scale if torch.compiler.is_compiling() else adapter.factor
        with no_autocast(x.device.type):
            u = F.linear(dropped.to(y.dtype), self.lora_A.to(y.dtype))
            update = F.linear(u, (scale * c.unsqueeze(1) * self.lora_B).to(y.dtype))
        return y + (c - 1).to(y.dtype) * p + update

    def _again(self, x: Tensor) -> Again | None:
        """What makes z anew from x; None for a base that computes in its own way, or under compiled code."""
        base: Any = self.base_layer
        if torch.compiler.is_compiling():
            return None
        if isinstance(base, PackedLinear):
            weight: WeightOf = base.matrix
        elif is_transparent(base):
            weight = self.dense_matrix
        else:
            return None
        return x, self.lora_A, self.lora_B, weight, self.adapter.factor

    def _magnitude(self) -> Tensor:
        """`magnitudes` with their gradient."""
        adapter: Any = self.adapter
        compiling = torch.compiler.is_compiling()
        if not compiling and adapter.strength == 1.0:
            return adapter.lora_magnitude_vector
        share = adapter.share if compiling else adapter.strength
        wide = adapter.lora_magnitude_vector.to(adapter.base_norm.dtype)
        return torch.lerp(adapter.base_norm, wide, share)

    @torch.no_grad()
    def _norm(self) -> Tensor:
        """``|V|``."""
        adapter: Any = self.adapter
        base, scale = self.base_layer, adapter.scale if torch.compiler.is_compiling() else adapter.factor
        with no_autocast(adapter.lora_A.device.type):
            if isinstance(base, PackedLinear):
                weight = base.matrix(base.compute_dtype or base.packed.source_dtype)
            else:
                weight = self.dense_matrix(self.weight.dtype)
            return row_norm(weight, adapter.base_norm, adapter.lora_A, adapter.lora_B, scale)


def row_norm(weight: Tensor, base_norm: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float | Tensor) -> Tensor:
    """The norm of each row of ``W + s B A`` from that of W, by the identity of the module.

    Args:
        weight: W ``(out, in)``.
        base_norm: ``(out,)``, in the dtype to sum in.
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scale: s.
    """
    wide = base_norm.dtype
    A, B = lora_A.to(wide), scale * lora_B.to(wide)
    cross = F.linear(lora_A.to(weight.dtype), weight).to(wide)  # (r, out): the fast orientation
    added = torch.linalg.vecdot(B, torch.addmm(cross.t(), B, A @ A.t(), beta=2))
    grown = base_norm * (added / base_norm.square()).add_(1).clamp_(min=0).sqrt_()  # the base's own where B is zero
    return torch.where(base_norm > 0, grown, added.clamp(min=0).sqrt())


def ratio(magnitude: Tensor, norm: Tensor) -> Tensor:
    """``c = m / |V|``; 1 in a row of zeros, which has no direction."""
    return torch.where(norm > 0, magnitude / torch.where(norm > 0, norm, 1.0), 1.0)


def magnified(direction: Tensor, magnitude: Tensor, transposed: bool) -> Tensor:
    """``m V / |V|``.

    Args:
        direction: V ``(out, in)``; it is written into.
        magnitude: m ``(out,)``.
        transposed: Whether V is ``(in, out)``.
    """
    norm = torch.linalg.vector_norm(direction, dim=0 if transposed else 1)
    c = ratio(magnitude.to(norm), norm)
    return direction.mul_(c if transposed else c.unsqueeze(1))


#: x, A, B, what gives W, and s.
Again = tuple[Tensor, Tensor, Tensor, WeightOf, float]


def rescaled(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None, again: Again | None = None
) -> Tensor:
    """``z + (c - 1)(z - b)`` with ``c = m / |V|``.

    Args:
        z: ``(..., out)``, of the caller's making and read by nobody else: it is written into.
        magnitude: m ``(out,)``.
        norm: ``|V|`` ``(out,)``, without gradient.
        bias: b ``(out,)``.
        again: What z was made of, to make it anew in backward instead of keeping the result.
    """
    if needs_eager(z, magnitude, norm) or z._is_view():
        more = (ratio(magnitude, norm) - 1).to(z.dtype)
        return z + more * (z if bias is None else z - bias.to(z.dtype))
    return _Rescaled.apply(z, magnitude, norm, bias, *(again or (None,) * 5))


class _Rescaled(torch.autograd.Function):
    """The last step of the module docstring, in place. Saved is the output, or what z was made of."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        x: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        weight: WeightOf | None,
        scale: float | None,
    ) -> Tensor:
        ctx.mark_dirty(z)
        ctx.weight, ctx.scale = weight, scale
        more = torch.where(norm > 0, magnitude / norm, 1.0).sub_(1).to(z.dtype)
        z.addcmul_(z, more)
        if bias is not None:
            z.sub_(more * bias.to(z.dtype))
        ctx.save_for_backward(z if x is None else None, magnitude, norm, more, bias, x, lora_A, lora_B)
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        try:
            y, magnitude, norm, more, bias, x, lora_A, lora_B = ctx.saved_tensors
        except RuntimeError as error:
            if "inplace operation" in str(error):
                raise UnsupportedError(_OVERWRITTEN) from error
            raise
        need_z, need_m, _, need_bias = ctx.needs_input_grad[:4]
        divisor, own_bias = magnitude.to(norm.dtype), bias
        if x is not None:
            y, divisor, own_bias = None if not need_m else _direction(ctx, x, lora_A, lora_B), norm, None
        g2 = g.reshape(-1, g.shape[-1])
        y2 = g2 if y is None else y.reshape(-1, y.shape[-1])
        wide = norm.dtype
        if torch.is_grad_enabled():  # create_graph=True
            more = (ratio(magnitude, norm) - 1).to(g.dtype)
            dz2, product = g2 + g2 * more, (g2 * y2).sum(0, dtype=wide)
        else:
            dz2, product = _fused(g2, y2, more, wide, need_z, need_m)
        total = g2.sum(0, dtype=wide) if bias is not None and (need_m or need_bias) else None
        dm = db = None
        if need_m:
            product = product if own_bias is None or total is None else product - own_bias.to(wide) * total
            dm = torch.where(divisor != 0, product / torch.where(divisor != 0, divisor, 1.0), 0.0).to(magnitude.dtype)
        if need_bias and bias is not None and total is not None:
            db = ((1 - ratio(magnitude, norm)) * total).to(bias.dtype)
        return (dz2.view(g.shape) if need_z else None), dm, None, db, *(None,) * 5


def _direction(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """``x V^T`` once more, (N, out)."""
    x = x.reshape(-1, x.shape[-1])
    with no_autocast(x.device.type):
        z, u = F.linear(x, ctx.weight(x.dtype)), F.linear(x, lora_A.to(x.dtype))
        scaled = (ctx.scale * lora_B).to(x.dtype)
        return z + F.linear(u, scaled) if torch.is_grad_enabled() else z.addmm_(u, scaled.t())


def _fused(g: Tensor, y: Tensor, more: Tensor, wide: torch.dtype, need_z: bool, need_m: bool) -> tuple[Tensor, Tensor]:
    """``g + g (c - 1)`` and the sum of ``g y`` over N; on a CPU some rows at a time, so that each is read once."""
    dz, products = torch.empty_like(g), [torch.zeros(g.shape[1], dtype=wide, device=g.device)]
    row = g.shape[1] * g.element_size()
    count = max(1, _BYTES // max(1, row)) if g.device.type == "cpu" else max(1, g.shape[0])
    for rows, own, out in zip(g.split(count), y.split(count), dz.split(count), strict=True):
        if need_z:
            torch.addcmul(rows, rows, more, out=out)
        if need_m and g.device.type == "cpu":  # sums in fp32, and rounds each part once
            products.append(torch.linalg.vecdot(rows, own, dim=0).to(wide))
        elif need_m:
            products.append((rows * own).sum(0, dtype=wide))
    return dz, torch.stack(products).sum(0)
