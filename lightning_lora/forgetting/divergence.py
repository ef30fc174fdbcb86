# SPDX-License-Identifier: Apache-2.0
r"""Divergence: how far the model's next-token distributions are from its base's.

.. math::
    KL(p \,\|\, q) = \sum_v p_v (\log p_v - \log q_v), \qquad
    \frac{\partial KL}{\partial z_v} = q_v - p_v

with p the base's distribution, q the model's and z the model's logits; in nats a position. Without its target
token a distribution is that over the rest of the vocabulary, normalised anew: what the loss says of the target is
then not opposed ("Mask the Target", arXiv 2605.29498).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What a gradient that waits in float16 is multiplied by: it lies in [-1, 1], most of it near 1 / vocabulary, of which
#: float16 by itself would make 0 before a loss's scale could reach it. No product overflows.
_HALF_SCALE = 2.0**15

#: Numbers in one piece of work: what is held in float32 at a time, whatever the vocabulary and the batch.
PIECE = 1 << 22


def kl_sum(logits: Tensor, base: Tensor, keep: Tensor | None = None, masked: Tensor | None = None) -> Tensor:
    """KL(base || model), summed over positions; differentiable in ``logits``, once.

    Computed in float32 piece by piece. For a backward its gradient takes the place of ``base``, so that nothing
    else of the size of the logits is kept. What the loss is multiplied by (a scaler's scale in float16) is multiplied
    with it in float32 and rounded once, to the dtype of the logits.

    Args:
        logits: the model's, (positions, vocabulary).
        base: the base's, of the same shape and dtype; **overwritten** where ``logits`` needs a gradient.
        keep: which positions count, (positions,) bool; None for all.
        masked: a token at each position that is left out of both distributions, (positions,) int64; None for none.

    Returns:
        The sum, float32 [nats].
    """
    total: Tensor = _KLSum.apply(logits, base, keep, masked)
    return total


class _KLSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, base: Tensor, keep: Tensor | None, masked: Tensor | None) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        rows = max(1, PIECE // logits.shape[-1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            log_q, log_p = logits[part].float(), base[part].float()
            hole = None if masked is None else masked[part, None]
            if hole is not None:
                log_q, log_p = (x.scatter(1, hole, -torch.inf) for x in (log_q, log_p))
            log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
            p = log_p.exp()
            gap = log_p - log_q
            if hole is not None:
                gap.scatter_(1, hole, 0.0)  # it is inf less inf there
            kl = (p * gap).sum(-1)
            grad = log_q.exp_().sub_(p)
            if keep is not None:
                kl = kl * keep[part]
                grad *= keep[part, None]
            total += kl.sum()
            if ctx.needs_input_grad[0]:
                base[part] = (grad * _HALF_SCALE if base.dtype == torch.float16 else grad).to(base.dtype)
        ctx.save_for_backward(base)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        if grad.dtype != torch.float16:
            return grad * upstream.to(grad.dtype), None, None, None
        found, factor = torch.empty_like(grad), upstream.float() / _HALF_SCALE
        rows = max(1, PIECE // grad.shape[-1])
        for own, part in zip(found.split(rows), grad.split(rows), strict=True):
            own.copy_(part.float() * factor)
        return found, None, None, None
