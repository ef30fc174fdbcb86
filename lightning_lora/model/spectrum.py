# SPDX-License-Identifier: Apache-2.0
r"""What the singular values of an adapter's update say, from its r x r core.

With :math:`B = Q_B R_B` and :math:`A^T = Q_A R_A` (thin QR), the update has the singular values of a small matrix:

.. math:: \Delta W = s\, B A = Q_B\, (s\, R_B R_A^T)\, Q_A^T, \qquad \sigma(\Delta W) = \sigma(s\, R_B R_A^T)

so that nothing of the size of W is ever made (of DoRA, s B A is the move of the direction alone). From them:

.. math::
    \text{stable rank} = \frac{\sum_i \sigma_i^2}{\sigma_1^2}, \qquad
    \text{effective rank} = \exp\Bigl(-\sum_i p_i \ln p_i\Bigr),\; p_i = \frac{\sigma_i}{\sum_j \sigma_j}, \qquad
    \text{condition} = \frac{\sigma_1}{\sigma_r}

(Rudelson and Vershynin 2007; Roy and Vetterli 2007). Both ranks lie between 1, one direction carries everything, and r,
all carry the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.model.inner import clean_name
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adapted import AdaptedLayer, AdaptedLinear
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lowrank import LowRankModule, Site
from lightning_lora.nn.quantized import PackedLinear
from lightning_lora.nn.residual import ResidualLoRALinear
from lightning_lora.nn.sharded import is_sharded, whole

#: A direction is dead when its singular value is below this share of the largest.
DEAD = 1e-2


@dataclass(frozen=True)
class Spectrum:
    """The update of one module.

    Args:
        r: Rank of the adapter.
        singular_values: Of :math:`s B A`, strength included, largest first.
        base_norm: Frobenius norm of the frozen weight; NaN where it cannot be had.
        grad_norm_A: Frobenius norm of the gradient of A at this step; NaN where none was looked at.
        grad_norm_B: The same of B.
    """

    r: int
    singular_values: tuple[float, ...]
    base_norm: float = math.nan
    grad_norm_A: float = math.nan
    grad_norm_B: float = math.nan

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return math.sqrt(math.fsum(s * s for s in self.singular_values))

    @property
    def relative_update(self) -> float:
        """|dW| / |W|."""
        return self.norm / self.base_norm if self.base_norm > 0 else math.nan

    @property
    def stable_rank(self) -> float:
        """See the module; NaN where the update is zero."""
        top = self._top
        return (self.norm / top) ** 2 if top > 0 else math.nan

    @property
    def effective_rank(self) -> float:
        """See the module; NaN where the update is zero."""
        total = math.fsum(self.singular_values)
        if not total > 0:
            return math.nan
        shares = [s / total for s in self.singular_values if s > 0]
        return math.exp(-math.fsum(p * math.log(p) for p in shares))

    @property
    def condition(self) -> float:
        """See the module; infinite where a direction is exactly zero, NaN where the update is."""
        top, last = self._top, self.singular_values[-1] if self.singular_values else 0.0
        if not top > 0:
            return math.nan
        return top / last if last > 0 else math.inf

    @property
    def dead_ranks(self) -> int:
        """Directions below `DEAD` of the largest; all of them where the update is zero."""
        return self.r - sum(s > DEAD * self._top for s in self.singular_values)

    def rank_for(self, energy: float = 0.99) -> int:
        """The least rank that keeps a share of the update's squared norm (Eckart and Young 1936)."""
        wanted, kept = energy * self.norm**2, 0.0
        for count, value in enumerate(self.singular_values):
            if kept >= wanted:
                return count
            kept += value**2
        return len(self.singular_values)

    @property
    def _top(self) -> float:
        return self.singular_values[0] if self.singular_values else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything above in primitives; what is not finite is None, as JSON has it."""
        numbers: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                *("norm", "base_norm", "relative_update", "stable_rank", "effective_rank", "condition"),
                *("grad_norm_A", "grad_norm_B"),
            )
        }
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"r": self.r, "dead_ranks": self.dead_ranks, **finite, "singular_values": list(self.singular_values)}


@torch.no_grad()
def singular_values(lora_A: Tensor, lora_B: Tensor, scale: float = 1.0) -> tuple[float, ...]:
    r"""The singular values of :math:`s\, B A`, largest first.

    Args:
        lora_A: ``(r, in)``.
        lora_B: ``(out, r)``.
        scale: s.
    """
    wide = torch.promote_types(lora_A.dtype, torch.float32)
    core_B, core_A = (torch.linalg.qr(f.to(wide), mode="r").R for f in (lora_B, lora_A.t()))
    found = torch.linalg.svdvals((core_B @ core_A.t()).double().cpu()) * abs(scale)
    return tuple(found.tolist())


def adapter_spectra(
    model: nn.Module,
    base_norms: Mapping[str, float] | None = None,
    grad_norms: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Spectrum]:
    """The spectrum of every low-rank adapter in use, by the module's name.

    Sharded factors are gathered, one at a time: call it on every process then.

    Args:
        model: A converted model.
        base_norms: What `base_norms` gave.
        grad_norms: Norms of the gradients of A and B, by name.

    Raises:
        AdapterMismatchError: The model has no low-rank adapters.
    """
    found = {}
    for name, module in adapter_modules(model):
        update = module.low_rank() if isinstance(module, AdaptedLayer) else None
        if update is None:
            continue
        own = clean_name(name)
        gradient_A, gradient_B = (grad_norms or {}).get(own, (math.nan, math.nan))
        values = singular_values(whole(update.A), whole(update.B), update.factor)
        base = math.nan if base_norms is None else base_norms.get(own, math.nan)
        found[own] = Spectrum(update.A.shape[0], values, base, gradient_A, gradient_B)
    for own, module, site in _other_updates(model):
        gradient_A, gradient_B = (grad_norms or {}).get(own, (math.nan, math.nan))
        A, B = (factor.flatten(1) for factor in module.factors(site))
        base = math.nan if base_norms is None else base_norms.get(own, math.nan)
        found[own] = Spectrum(module.r, singular_values(A, B, module.factor(site)), base, gradient_A, gradient_B)
    if not found:
        others = sorted({module.title for _, module in adapter_modules(model)})
        raise AdapterMismatchError(
            f"the model has no low-rank adapters to look at, {' and '.join(others)} changes it in another way: leave "
            "`AdapterDiagnostics` out"
            if others
            else "the model has no low-rank adapters to look at; add the `LoRA` callback"
        )
    return found


@torch.no_grad()
def base_norms(model: nn.Module) -> dict[str, float]:
    """The Frobenius norm of every adapted layer's frozen weight, by name; it does not change in a run.

    A packed weight is dequantized for it, one at a time. One that is sharded and packed has none, NaN.
    """
    found = {clean_name(n): _norm(m) for n, m in adapter_modules(model) if isinstance(m, AdaptedLinear)}
    for own, module, site in _other_updates(model):
        weight = module.base_layer.get_parameter(site.parameter).detach()
        found[own] = math.nan if weight.is_meta else float(torch.linalg.vector_norm(weight, dtype=torch.float32))
    return found


def _other_updates(model: nn.Module) -> Iterator[tuple[str, LowRankModule, Site]]:
    """Those beside linears by name, but such as are no one product: of experts, and of convolutions with groups."""
    for name, module in adapter_modules(model):
        if isinstance(module, LowRankModule) and module.one_product:
            for site in module.sites:
                yield f"{clean_name(name)}.{site.parameter}".removesuffix(".weight"), module, site


def _norm(module: AdaptedLinear) -> float:
    base = module.base_layer
    tensors = [*base.parameters(), *base.buffers()]
    if any(t.is_meta for t in tensors):
        return math.nan
    if isinstance(base, PackedLinear):
        if any(is_sharded(t) for t in tensors):
            return math.nan
        return float(module.base_weight(torch.float32).norm())
    weight = module.base_weight() if isinstance(module, ResidualLoRALinear) else module.weight.detach()
    return float(whole(torch.linalg.vector_norm(weight, dtype=torch.float32)))


@torch.no_grad()
def gradient_norms(
    model: nn.Module, gradient: Callable[[nn.Parameter], Tensor | None] = lambda parameter: parameter.grad
) -> dict[str, tuple[float, float]]:
    """The Frobenius norms of the gradients of A and B, by the module's name; NaN where there is none.

    Args:
        model: A converted model.
        gradient: Gives a parameter's gradient, where it does not lie in ``.grad``.
    """

    def norm(parameter: nn.Parameter) -> float:
        found = gradient(parameter)
        return math.nan if found is None else float(whole(torch.linalg.vector_norm(found.detach().float())))

    found = {
        clean_name(name): (norm(module.lora_A), norm(module.lora_B))
        for name, module in adapter_modules(model)
        if isinstance(module, LoRALinear)
    }
    for own, other, site in _other_updates(model):
        A, B = other.factors(site)
        found[own] = norm(A), norm(B)
    return found
