# SPDX-License-Identifier: Apache-2.0
r"""AdaLoRA's orthogonality term and its gradient, without a graph through the training step.

Over the n factors of all layers (the rows of every A and the columns of every B are to be orthonormal)::

    R = 1/n sum |M|_F        M = A A^T - 1   or   B^T B - 1
    dR/dA = 2/n M A / |M|_F        dR/dB = 2/n B M / |M|_F
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from lightning_lora.nn.adalora import Triplets


@torch.no_grad()
def orthogonality(layers: Iterable[Triplets]) -> Tensor:
    """R: 0 where all factors are orthonormal."""
    norms = [torch.linalg.matrix_norm(_excess(rows)).cpu() for triplets in layers for _, rows in _factors(triplets)]
    return torch.stack(norms).mean()


@torch.no_grad()
def add_orthogonality_gradient(layers: Collection[Triplets], weight: float, held: Collection[int]) -> None:
    """Add the gradient of ``weight R`` to the gradients that an optimizer is about to use.

    Args:
        layers: The updates of all layers.
        weight: Factor of R.
        held: The ids of the optimizer's parameters; others are left alone.
    """
    share = 2 * weight / (2 * len(layers))
    for triplets in layers:
        for factor, rows in _factors(triplets):
            if id(factor) not in held:
                continue
            excess = _excess(rows)
            size = torch.linalg.matrix_norm(excess)
            slope = excess @ rows * torch.where(size > 0, share / torch.where(size > 0, size, 1.0), 0.0)
            slope = (slope if factor is triplets.A else slope.t()).to(factor.dtype)
            factor.grad = slope.contiguous() if factor.grad is None else factor.grad.add_(slope)


def _factors(triplets: Triplets) -> list[tuple[Tensor, Tensor]]:
    """A and B as they are, and with their vectors as rows, in fp32 at least."""
    wide = torch.promote_types(triplets.A.dtype, torch.float32)
    return [(triplets.A, triplets.A.to(wide)), (triplets.B, triplets.B.to(wide).t())]


def _excess(rows: Tensor) -> Tensor:
    """M."""
    return rows @ rows.t() - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
