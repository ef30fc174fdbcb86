# SPDX-License-Identifier: Apache-2.0
r"""`VeRALinear`: a frozen linear layer and two trained vectors between random matrices (Kopiczko et al. 2024).

::

    y = x W^T + b + lambda_b * (lambda_d * u) B^T,    u = D(x) A^T        *: element by element

    A (r, in), B (out, r)              frozen; parts of two matrices that all layers share, drawn from a seed
    lambda_d (r,), lambda_b (out,)     trained; lambda_b begins at zero, so that the layer is its base

In backward, with g the gradient of y and one product ``G = g^T u`` (out, r) for both vectors::

    d lambda_b = (G * B) lambda_d        d lambda_d = (G * B)^T lambda_b        du = g (lambda_b * B * lambda_d)

No gradient needs x, since A is frozen: of the activations' kind u alone is kept, ``(N, r)``. A strength of lambda goes
with lambda_b; dropout's mask is drawn anew, as in `lightning_lora.nn.functional`.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, VeRAConfig
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.adapted import AdaptedLinear, LowRank
from lightning_lora.nn.adapter import KeepsDType, torch_dtype
from lightning_lora.nn.functional import (
    RECOMPUTED,
    dropout_mask,
    keep_probability,
    lora_linear,
    needs_eager,
    no_autocast,
)
from lightning_lora.nn.layers import device_of
from lightning_lora.nn.quantized import output_dtype

#: Names inside the module that keeps the shared matrices for files.
PROJECTIONS = ("adapter.projections.vera_A", "adapter.projections.vera_B")


class Projections(KeepsDType):
    """The two random matrices, one pair for all layers of a model.

    Args:
        r: Rank.
        in_features: Largest of the adapted layers.
        out_features: Largest of the adapted layers.
        key: Seed.
        dtype: That of the adapters.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, in_features: int, out_features: int, key: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keeper: int | None = None  # slot of the module by which files know them
        generator = torch.Generator("cpu").manual_seed(key)
        self.register_buffer("vera_A", _uniform(r, in_features, generator).to(dtype), persistent=False)
        self.register_buffer("vera_B", _uniform(out_features, r, generator).to(dtype), persistent=False)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"A={tuple(self.vera_A.shape)}, B={tuple(self.vera_B.shape)}"


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Kaiming's start as PEFT draws it, so that a seed gives the same bits."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


class VeRAAdapter(KeepsDType):
    """The two vectors, and the matrices that they stand between."""

    def __init__(
        self, projections: Projections, out_features: int, start: float, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.start = start
        self.projections = projections
        self.vera_lambda_b = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.vera_lambda_d = nn.Parameter(torch.empty(len(projections.vera_A), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The update starts at exactly zero."""
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.start)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"b={tuple(self.vera_lambda_b.shape)}, d={tuple(self.vera_lambda_d.shape)}, {self.vera_lambda_b.dtype}"


class VeRALinear(AdaptedLinear):
    """A frozen ``base_layer`` and two vectors.

    Args:
        base_layer: See `AdaptedLinear`; not on the meta device.
        record: Shared by all modules of one conversion; its config gives dtype, dropout and start.
        projections: Shared by them too.

    Raises:
        UnsupportedError: The base is on the meta device.
    """

    title = "VeRA"

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, projections: Projections) -> None:
        super().__init__(base_layer, record)
        config, device = cast(VeRAConfig, record.config), device_of(base_layer)
        if device.type == "meta":
            raise UnsupportedError(
                "VeRA over a base on the meta device: the shared matrices would be lost with it; load the weights "
                "before the adapters are put in"
            )
        if projections.keeper is None:
            projections.keeper = self.slot
            projections.to(device)
        self.vera_dropout = config.vera_dropout
        self.adapter: VeRAAdapter = VeRAAdapter(
            projections, self.out_features, config.d_initial, device, torch_dtype(config.adapter_dtype)
        )

    @property
    def vera_A(self) -> Tensor:
        """``(r, in)``, a part of what is shared."""
        return self.adapter.projections.vera_A[:, : self.in_features].to(self.adapter.vera_lambda_d.device)

    @property
    def vera_B(self) -> Tensor:
        """``(out, r)``, a part of what is shared."""
        return self.adapter.projections.vera_B[: self.out_features].to(self.adapter.vera_lambda_b.device)

    def trained_names(self) -> list[str]:
        """See `AdapterModule.trained_names`; one module of a model has the shared matrices too, if they are kept."""
        names, config = super().trained_names(), cast(VeRAConfig, self.record.config)
        keeps = config.save_projection and self.adapter.projections.keeper == self.slot
        return [*names, *PROJECTIONS] if keeps else names

    def drawn(self) -> dict[str, Tensor]:
        """See `AdapterModule.drawn`: the shared matrices, of one module, if they are not kept."""
        projections = self.adapter.projections
        if cast(VeRAConfig, self.record.config).save_projection or projections.keeper != self.slot:
            return {}
        return {"vera_A": projections.vera_A, "vera_B": projections.vera_B}

    def watched(self) -> list[nn.Parameter]:
        """lambda_b: while it is zero, the gradient of lambda_d is too."""
        return [self.adapter.vera_lambda_b]

    def low_rank(self) -> LowRank:
        """See `AdaptedLayer.low_rank`."""
        b, d = self.adapter.vera_lambda_b, self.adapter.vera_lambda_d
        return LowRank(d.unsqueeze(1) * self.vera_A, b.unsqueeze(1) * self.vera_B, self.strength)

    def untrained(self) -> bool:
        """Whether lambda_b is exactly zero."""
        return not bool(self.adapter.vera_lambda_b.detach().any())

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `AdaptedLayer.delta_weight`: ``strength * diag(lambda_b) B diag(lambda_d) A``."""
        own = (self.adapter.vera_lambda_b, self.adapter.vera_lambda_d, self.vera_A, self.vera_B)
        b, d, A, B = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in own)
        delta = ((self.strength * b).unsqueeze(1) * B) @ (d.unsqueeze(1) * A)
        return (delta.t() if self.fan_in_fan_out else delta).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in)``; the output ``(..., out)`` has the dtype that the base layer would give it."""
        base: Any = self.base_layer
        if not self.in_use:
            return base(x)
        form = self.frozen_form(x)
        y = base(x) if form is None else lora_linear(x.to(form[0]), form[1], base.bias)
        b, d, A, B = self.adapter.vera_lambda_b, self.adapter.vera_lambda_d, self.vera_A, self.vera_B
        dropout = self.vera_dropout if self.training else 0.0
        use = 0 if torch.compiler.is_compiling() else self.record.use
        y = add_vera(y, x.to(y.dtype), b, d, A, B, self.strength, dropout, use, form is not None)
        return y if form is None else y.to(output_dtype(x))


def add_vera(
    y: Tensor,
    x: Tensor,
    lambda_b: Tensor,
    lambda_d: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    dropout: float = 0.0,
    use: int = 0,
    in_place: bool = False,
) -> Tensor:
    """``y + scale * lambda_b * (lambda_d * D(x) A^T) B^T``.

    Args:
        y: ``(..., out)``.
        x: ``(..., in)``, in y's dtype.
        lambda_b: ``(out,)``.
        lambda_d: ``(r,)``.
        A: ``(r, in)``, without gradient.
        B: ``(out, r)``, without gradient.
        scale: Factor of the update.
        dropout: Share of x to drop; 0 outside training.
        use: See `lora_linear`.
        in_place: Whether y is of the caller's making and read by nobody else, and may be written into.
    """
    if needs_eager(x, y, lambda_b, lambda_d):
        u = F.linear(F.dropout(x, dropout) if dropout > 0.0 else x, A.to(x.dtype))
        return y + (scale * lambda_b).to(y.dtype) * F.linear(lambda_d.to(y.dtype) * u, B.to(y.dtype))
    seed = int(torch.randint(2**62, ())) if dropout > 0.0 else 0
    u = _Down.apply(x, A, dropout, seed)
    return _Up.apply(y, u, lambda_b, lambda_d, B, scale, use, in_place and not y._is_view())


class _Down(torch.autograd.Function):
    """``u = D(x) A^T`` with A frozen: nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, dropout: float, seed: int) -> Tensor:
        ctx.shape, ctx.dropout, ctx.seed, ctx.device = x.shape, dropout, seed, x.device
        ctx.save_for_backward(A)
        with no_autocast(x.device.type):
            mask = _mask(ctx, x.dtype)
            return F.linear(x if mask is None else x * mask, A.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        (A,) = ctx.saved_tensors
        with no_autocast(du.device.type):
            dx, mask = du @ A.to(du.dtype), _mask(ctx, du.dtype)
            return dx if mask is None else dx * mask, None, None, None


def _mask(ctx: Any, dtype: torch.dtype) -> Tensor | None:
    """What x is multiplied by: 0, or one over the share that is kept."""
    if ctx.dropout == 0.0:
        return None
    return dropout_mask(ctx.shape, ctx.dropout, ctx.seed, ctx.device).to(dtype).div_(keep_probability(ctx.dropout))


class _Up(torch.autograd.Function):
    """``y + scale * lambda_b * (lambda_d * u) B^T`` by one product; the gradients of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, u: Tensor, b: Tensor, d: Tensor, B: Tensor, scale: float, use: int, in_place: bool
    ) -> Tensor:
        ctx.scale, ctx.mark = scale, [use, hash(scale)]
        ctx.save_for_backward(u, b, d, B, torch.tensor(ctx.mark, device="cpu"))
        with no_autocast(y.device.type):
            if not in_place:
                return y + F.linear(u, _inner(scale, b, d, B, y.dtype))
            ctx.mark_dirty(y)
            y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), _inner(scale, b, d, B, y.dtype).t())
            return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, b, d, B, mark = ctx.saved_tensors
        if mark.tolist() != ctx.mark:
            raise UnsupportedError(RECOMPUTED)
        _, need_u, need_b, need_d = ctx.needs_input_grad[:4]
        du = db = dd = None
        with no_autocast(g.device.type):
            if need_b or need_d:
                G = u.reshape(-1, u.shape[-1]).t() @ g.reshape(-1, g.shape[-1])  # (r, out), the fast orientation
                wide = torch.promote_types(b.dtype, B.dtype)
                H = ctx.scale * (G.to(wide) * B.t())
                db, dd = (d.to(wide) @ H).to(b.dtype), (H @ b.to(wide)).to(d.dtype)
            if need_u:
                du = g @ _inner(ctx.scale, b, d, B, g.dtype)
        return g, du, db, dd, None, None, None, None


def _inner(scale: float, b: Tensor, d: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * lambda_b * B * lambda_d`` ``(out, r)``, multiplied in the wider dtype and rounded once."""
    return ((scale * b).unsqueeze(1) * B * d).to(dtype)
