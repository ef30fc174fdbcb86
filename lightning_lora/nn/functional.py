# SPDX-License-Identifier: Apache-2.0
"""`lora_linear`: a frozen linear map plus its low-rank update as one `torch.autograd.Function`.

With x (N, in), the frozen W (out, in), A (r, in), B (out, r), s the scale, and D the dropout of the
adapter's input (D = identity outside training):

    forward     u  = D(x) A^T                        (N, r)
                y  = x W^T + b  (+)  u (s B)^T       (N, out)   added into the fresh output
    backward    v  = dy (s B)                        (N, r)
                dx = dy W  (+)  D^T(v A)             (N, in)    added into the fresh gradient
                dA = v^T D(x)                        (r, in)
                dB = s (u^T dy)^T                    (out, r)   as (r, N) x (N, out): the fast orientation
                db = sum of dy over N                (out,)     where the user trains the bias

(+) is an addition in place into a tensor that this function made itself; no input is ever written into.
Saved for backward: x and u, nothing else of the activations' width (where A is frozen, as in LoRA-FA, u alone: no
gradient needs x); and beside them a mark of which adapter this was.
Activation checkpointing runs the forward again, with the A and B of that moment, and finds the mark of that moment. A
and B are cast *down* to x's dtype; x is never cast up. The scale goes with B, which is small. W is not saved but asked
for again, so that a packed weight is dequantized once each way and never kept. The dropout mask is not stored: it is
drawn anew from a seed, which itself is drawn from torch's CPU generator, so that activation checkpointing draws the
same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_lora.errors import UnsupportedError

WeightOf = Callable[[torch.dtype], Tensor]

_PLAIN = (Tensor, torch.nn.Parameter)

_FROZEN_A = (
    "a gradient with `create_graph=True` through a layer whose factor A is frozen (`freeze_lora_A`): its input was not "
    "kept, by which such a gradient is differentiated; let A learn, or leave `create_graph` out"
)

RECOMPUTED = (
    "activation checkpointing ran a forward again for its backward, and the adapter in use, its values or its strength "
    "were others by then: the gradients would be of neither. Call `backward` before the adapter changes, and inside "
    "the same `use_adapter` as the forward"
)


def lora_linear(
    x: Tensor,
    weight: WeightOf,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scale: float | Tensor = 1.0,
    dropout: float = 0.0,
    use: int = 0,
) -> Tensor:
    """``x W^T + b + scale * D(x) A^T B^T``; without ``lora_A`` the frozen part alone.

    Dropout works on bytes: ``round(256 p)`` of 256 values drop (at least one), and the kept ones are
    divided by the true share that is kept (243/256 for p = 0.05), so that the mean is exact.

    Args:
        x: Input ``(..., in)``, of the dtype to compute in.
        weight: Gives the frozen weight ``(out, in)`` in the dtype that it is called with.
        bias: Bias ``(out,)``.
        lora_A: Factor ``(r, in)``, in any floating dtype.
        lora_B: Factor ``(out, r)``.
        scale: Factor of the update; a 0-dim tensor where compiled code must not depend on its value.
        dropout: Share of the adapter's input to drop; 0 outside training.
        use: A number that changes with the adapter; a backward whose saved tensors were recomputed under another
            number or scale raises `UnsupportedError`.

    Returns:
        Output ``(..., out)`` in ``x``'s dtype.
    """
    if needs_eager(x, lora_A, lora_B):
        return _eager(x, weight(x.dtype), bias, lora_A, lora_B, scale, dropout)
    seed = int(torch.randint(2**62, ())) if dropout > 0.0 and lora_A is not None else 0
    return _LoRALinear.apply(x, lora_A, lora_B, weight, bias, scale, dropout, seed, use)


def add_lora(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float | Tensor, dropout: float) -> Tensor:
    """``y + scale * D(x) A^T B^T`` by plain operations, for a base that computes ``y`` in its own way."""
    u = F.linear(F.dropout(x, dropout) if dropout > 0.0 else x, lora_A.to(x.dtype))
    return y + scale * F.linear(u, lora_B.to(x.dtype))


def dropout_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> Tensor:
    """The mask of ``seed``: bytes, 1 with probability `keep_probability` and else 0.

    Bytes and not bools: torch compares into them and multiplies by them several times faster on a CPU.
    """
    generator = torch.Generator(device).manual_seed(seed)
    count = math.prod(shape)
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits: eight independent bytes
    drawn = words.view(torch.uint8)[:count]
    return torch.ge(drawn, _dropped(dropout), out=drawn).view(shape)


def keep_probability(dropout: float) -> float:
    """The true share that is kept: dropout is rounded to 1/256."""
    return 1.0 - _dropped(dropout) / 256


def _dropped(dropout: float) -> int:
    return min(max(round(256 * dropout), 1), 255) if dropout > 0.0 else 0


def needs_eager(*tensors: Tensor | None) -> bool:
    """Whether plain operations are needed: `torch.compile`, `torch.func`, forward AD, subclasses, meta tensors."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    in_forward_ad = forward_ad._current_level >= 0  # torch has no public way to ask; a look into each tensor is slow
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.is_meta or type(tensor) not in _PLAIN:
            return True
        if in_forward_ad and forward_ad.unpack_dual(tensor).tangent is not None:
            return True
    return False


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scale: float | Tensor,
    dropout: float,
) -> Tensor:
    y = F.linear(x, weight, _cast(bias, x.dtype))
    if lora_A is None or lora_B is None:
        return y
    return add_lora(y, x, lora_A, lora_B, scale, dropout)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """Inside, dtypes are as they are given."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _LoRALinear(torch.autograd.Function):
    """The function of the module docstring. Without A it saves nothing at all."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        weight: WeightOf,
        bias: Tensor | None,
        scale: float,
        dropout: float,
        seed: int,
        use: int,
    ) -> Tensor:
        ctx.weight, ctx.scale, ctx.dropout, ctx.seed = weight, scale, dropout, seed
        ctx.device_type, ctx.bias_dtype = x.device.type, None if bias is None else bias.dtype
        with no_autocast(ctx.device_type):
            y = F.linear(x, weight(x.dtype), _cast(bias, x.dtype))
            if y._is_view():  # as with a bias and three dimensions: autograd would let nobody write into it
                y = torch.empty(0, dtype=y.dtype, device=y.device).set_(y.untyped_storage(), 0, y.shape, y.stride())
            if lora_A is None or lora_B is None:
                return y
            x2 = x.reshape(-1, x.shape[-1])
            ctx.shape, ctx.device = x2.shape, x2.device
            u = F.linear(_masked(x2, _mask(ctx)), lora_A.to(x.dtype))  # a third faster than `@ A.t()` on a CPU
            y.view(-1, y.shape[-1]).addmm_(u, _scaled(ctx, lora_B, x.dtype).t())
        ctx.mark = [use, 0 if isinstance(scale, Tensor) else hash(scale)]
        kept = x if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept, u, lora_A, lora_B, torch.tensor(ctx.mark, device="cpu"))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_bias = ctx.needs_input_grad[4]
        with no_autocast(ctx.device_type):
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if need_bias else None
            rest = (None, dbias, None, None, None, None)
            saved = ctx.saved_tensors  # read once: each access unpacks anew, a checkpoint refuses the second
            if not saved:
                return (dy @ ctx.weight(dy.dtype) if ctx.needs_input_grad[0] else None, None, None, *rest)
            x, u, lora_A, lora_B, mark = saved
            if mark.tolist() != ctx.mark:
                raise UnsupportedError(RECOMPUTED)
            if torch.is_grad_enabled():  # create_graph=True: the gradient is to be differentiated in turn
                if x is None:
                    raise UnsupportedError(_FROZEN_A)
                return (*_differentiable_backward(ctx, dy, x, lora_A, lora_B), *rest)
            return (*_fused_backward(ctx, dy, x, u, lora_A, lora_B), *rest)


def _fused_backward(
    ctx: Any, dy: Tensor, x: Tensor | None, u: Tensor, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_A, need_B = ctx.needs_input_grad[:3]
    dy2 = dy.reshape(-1, dy.shape[-1])
    dx = dA = dB = None
    mask = _mask(ctx)
    if need_B:  # laid out as B is, in one copy: autograd would make another of any other layout
        dB = torch.empty_like(lora_B).copy_((u.t() @ dy2).t()).mul_(_scale(ctx))
    if need_x or need_A:
        v = dy2 @ _scaled(ctx, lora_B, dy.dtype)
    if x is not None and need_A:
        dA = (v.t() @ _masked(x.reshape(ctx.shape), mask)).to(lora_A.dtype)
    if need_x:
        dx2 = dy2 @ ctx.weight(dy.dtype)
        if mask is None:
            dx2.addmm_(v, lora_A.to(dy.dtype))
        else:
            dx2.addcmul_(v @ lora_A.to(dy.dtype), mask.to(dy.dtype))
        dx = dx2.view(*dy.shape[:-1], ctx.shape[-1])
    return dx, dA, dB


def _differentiable_backward(
    ctx: Any, dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients by operations that autograd can follow, from x, A, B and dy alone."""
    A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
    dy2, x2 = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    mask = _mask(ctx)
    xd = _masked(x2, mask)
    v = _scale(ctx) * (dy2 @ B)
    dx2 = dy2 @ ctx.weight(dy.dtype) + _masked(v @ A, mask)
    dB = _scale(ctx) * (dy2.t() @ (xd @ A.t()))
    return dx2.view(x.shape), (v.t() @ xd).to(lora_A.dtype), dB.to(lora_B.dtype)


def _mask(ctx: Any) -> Tensor | None:
    return dropout_mask(ctx.shape, ctx.dropout, ctx.seed, ctx.device) if ctx.dropout > 0.0 else None


def _masked(x2: Tensor, mask: Tensor | None) -> Tensor:
    """``x2`` with dropped elements at zero; the division by the kept share is in `_scale`."""
    return x2 if mask is None else x2 * mask


def _scaled(ctx: Any, lora_B: Tensor, dtype: torch.dtype) -> Tensor:
    """``s B`` in ``dtype``, multiplied in the wider of the two dtypes."""
    wide = lora_B.to(dtype) if dtype.itemsize > lora_B.dtype.itemsize else lora_B
    return (wide * _scale(ctx)).to(dtype)


def _scale(ctx: Any) -> float:
    return ctx.scale / keep_probability(ctx.dropout) if ctx.dropout > 0.0 else ctx.scale
