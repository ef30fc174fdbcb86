# SPDX-License-Identifier: Apache-2.0
"""Starts that take a part of the base over into the factors: PiSSA, OLoRA and LoftQ.

    W = W_res + s B0 A0           W_res stays behind, frozen (and packed); B and A begin as B0 and A0

    PiSSA    s B0 A0 = the best approximation of W of rank r, its singular values shared out to both factors
             (Meng et al. 2024)
    OLoRA    B0 = Q_r, A0 = R_r of W = Q R (Buyukakyuz 2024)
    LoftQ    W_res = q(W - s B A) and s B0 A0 = the best approximation of W - W_res of rank r, in turns, so that
             the packed base and the factors together are nearest to W (Li et al. 2023)

Matrices are ``(out, in)``. The factors are rounded to the dtype that they are kept in before anything is taken from W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError, UnsupportedError

#: Below this share of the largest singular value there is nothing left for a pair of factors to begin with.
_NOTHING = 1e-6
_OVERSAMPLING = 8  # columns more than asked for, from which the randomized decomposition takes the best


@dataclass(frozen=True)
class Start:
    """Where a layer begins.

    Args:
        A: A0 ``(r, in)``.
        B: B0 ``(out, r)``.
        residual: What the base keeps ``(out, in)``; of LoftQ what is packed to give it.
    """

    A: Tensor
    B: Tensor
    residual: Tensor


@torch.no_grad()
def start_of(
    init: str,
    weight: Tensor,
    r: int,
    scale: float,
    dtype: torch.dtype = torch.float32,
    packed: Callable[[Tensor], Tensor] | None = None,
    iterations: int = 1,
) -> Start:
    """The start that ``init_lora_weights`` names.

    Args:
        init: "pissa", "pissa_niter_N", "olora" or "loftq".
        weight: W ``(out, in)``.
        r: Rank.
        scale: s.
        dtype: Of the factors.
        packed: For LoftQ: what a matrix is once it was packed.
        iterations: For LoftQ: how many turns.

    Raises:
        ConfigError: The rank is larger than a side of the matrix.
        UnsupportedError: The weight has no values (meta device), or its rank is below ``r``.
    """
    if weight.is_meta:
        raise UnsupportedError(
            f'`init_lora_weights="{init}"`: the start is taken from the base\'s weights, which have no values on the '
            "meta device; load the weights before the adapters are put in"
        )
    if r > min(weight.shape):
        raise ConfigError(
            f'`init_lora_weights="{init}"`: `r` is {r}, and a layer of {tuple(weight.shape)} has no more than '
            f"{min(weight.shape)} directions; give it a smaller rank by `rank_pattern`, or name it in `exclude_modules`"
        )
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "loftq":
        if packed is None:
            raise ConfigError('`init_lora_weights="loftq"` needs a packed base: give `quantize`, such as "nf4"')
        return _loftq(wide, r, scale, dtype, packed, iterations)
    if init == "olora":
        A, B = _olora(wide, r, dtype)
    else:
        A, B = _principal(wide, r, scale, dtype, sweeps(init))
    return Start(A, B, torch.addmm(wide, B.to(wide), A.to(wide), alpha=-scale))


def sweeps(init: str) -> int | None:
    """The N of "pissa_niter_N"; None for the exact decomposition."""
    number = init.removeprefix("pissa_niter_")
    return int(number) if number.isdecimal() else None


def _olora(weight: Tensor, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # The first r columns of Q are those of the first r columns of W alone, and R follows from them.
    Q, R = torch.linalg.qr(weight[:, :r])
    _check_rank("olora", R.diagonal().abs(), r)
    B = Q.to(dtype)
    return (Q.t() @ weight).to(dtype), B


def _principal(
    weight: Tensor, r: int, scale: float, dtype: torch.dtype, niter: int | None, init: str = "pissa"
) -> tuple[Tensor, Tensor]:
    """A and B with ``scale B A`` the best approximation of rank r, the singular values shared out evenly."""
    U, S, V = top_singular(weight, r) if niter is None else top_singular_randomized(weight, r, niter)
    _check_rank(init, S, r)
    root = (S / scale).sqrt()
    return (root.unsqueeze(1) * V.t()).to(weight.dtype).to(dtype), (U * root).to(weight.dtype).to(dtype)


def _loftq(
    weight: Tensor, r: int, scale: float, dtype: torch.dtype, packed: Callable[[Tensor], Tensor], iterations: int
) -> Start:
    residual = weight
    for turn in range(iterations):
        left = weight - packed(residual).to(weight)
        A, B = _principal(left, r, scale, dtype, None, "loftq")
        if turn + 1 < iterations:
            residual = torch.addmm(weight, B.to(weight), A.to(weight), alpha=-scale)
    return Start(A, B, residual)


def top_singular(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """The r largest singular values and their vectors, ``(rows, r), (r,), (columns, r)``.

    By the eigenvectors of the smaller Gram matrix in fp64: several times faster than all of the decomposition, and the
    same to fp32's last digits for values that are not below 1e-7 of the largest.
    """
    wide = matrix.double()
    turned = wide.shape[0] < wide.shape[1]
    tall = wide.t() if turned else wide
    _, vectors = torch.linalg.eigh(tall.t() @ tall)
    V = vectors[:, -r:].flip(1)
    U = tall @ V
    S = torch.linalg.vector_norm(U, dim=0)
    U = U / S.clamp(min=torch.finfo(torch.float64).tiny)
    return (V, S, U) if turned else (U, S, V)


def top_singular_randomized(matrix: Tensor, r: int, niter: int) -> tuple[Tensor, Tensor, Tensor]:
    """`top_singular` by ``niter`` rounds of subspace iteration from seeded noise (Halko et al. 2011).

    The random state of the process stays as it is: `torch.svd_lowrank` would draw from it.
    """
    rows, columns = matrix.shape
    width = min(r + _OVERSAMPLING, rows, columns)
    generator = torch.Generator(matrix.device).manual_seed(0)
    noise = torch.randn(columns, width, generator=generator, device=matrix.device, dtype=matrix.dtype)
    Q = torch.linalg.qr(matrix @ noise)[0]
    for _ in range(niter):
        Q = torch.linalg.qr(matrix.t() @ Q)[0]
        Q = torch.linalg.qr(matrix @ Q)[0]
    U, S, Vh = torch.linalg.svd(Q.t() @ matrix, full_matrices=False)
    return Q @ U[:, :r], S[:r], Vh[:r].t()


def _check_rank(init: str, values: Tensor, r: int) -> None:
    """See that each of the r pairs has something to begin with: of a pair of zeros neither half learns."""
    if not bool(values.min() > _NOTHING * values.max()):
        found = int((values > _NOTHING * values.max()).sum())
        raise UnsupportedError(
            f'`init_lora_weights="{init}"`: what the start is taken from has rank {found}, below the {r} that is asked '
            "for (a layer that begins at zero, or one that packing does not change?); give it a smaller rank by "
            "`rank_pattern`, or name it in `exclude_modules`"
        )
