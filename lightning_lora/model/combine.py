# SPDX-License-Identifier: Apache-2.0
r"""`add_weighted_adapter`: a new adapter out of some that the model holds.

With ``c_i = weight_i * scaling_i * strength_i`` and ``dW_i = c_i B_i A_i``, layer by layer::

    cat      A = (c_1 A_1; c_2 A_2; ...)   B = (B_1, B_2, ...)            dW = sum dW_i, exactly; ranks add up
    svd      the nearest dW of rank svd_rank to that sum; the error is the root of the sum of the dropped squares
    linear   A = sum sign(c_i) sqrt|c_i| A_i,  B = sum sqrt|c_i| B_i      cross terms: no sum of the updates
    ties, dare_linear, dare_ties      `linear` over factors that were pruned to ``density`` first

    ties     keeps the largest magnitudes; each place goes to the sign that weighs more, others are left out
    dare     keeps values at random and divides them by ``density``

The words and formulas are PEFT's. The result has ``lora_alpha = r``, a scale of 1. For svd the sum is never formed:
of the stacked factors B = Q_b R_b and A^T = Q_a R_a only the small core R_b R_a^T is decomposed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig, scaling
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.model.residents import check_name, keep_adapter, known, parts_of, record_of
from lightning_lora.model.slots import adapter_slots
from lightning_lora.nn.adapter import Held
from lightning_lora.nn.saved import SavedModule

Combination = Literal["svd", "linear", "cat", "ties", "dare_linear", "dare_ties"]
SignMethod = Literal["total", "frequency"]

Term = tuple[float, Tensor, Tensor]  # c, A, B


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: Combination = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    seed: int = 0,
) -> None:
    """Combine resident adapters into a new one that waits under ``name``; an adapter of that name is replaced.

    Args:
        model: A converted model, or a LightningModule around one.
        adapters: Names of resident adapters, at the strength that each has.
        weights: A finite factor for each, negative ones too.
        name: What the new one is called.
        combination_type: "svd", "cat", "linear", "ties", "dare_linear" or "dare_ties", see above.
        svd_rank: For "svd": rank of the result; the largest one among ``adapters`` if null.
        density: For "ties" and "dare_...": share of the values of each factor that is kept, in (0, 1].
        majority_sign_method: For "..ties": "total" weighs signs by magnitude, "frequency" counts them.
        seed: For "dare_...": of the choice of values; no global generator is touched.

    Raises:
        ConfigError: A name is unknown, an argument is out of its range or not one of ``combination_type``, or ranks
            differ where factors are added up.
        UnsupportedError: An adapter holds modules that are trained in full, or is DoRA.
    """
    record = record_of(model)
    check_name(record, name)
    for adapter in adapters:
        known(record, adapter)
    _check_arguments(adapters, weights, combination_type, svd_rank, density, majority_sign_method)
    held = [parts_of(model, adapter) for adapter in adapters]
    slots = dict(adapter_slots(model))
    largest = max(part.r for _, parts in held for part in parts.values())
    generator = torch.Generator().manual_seed(seed)
    combined: dict[str, tuple[Tensor, Tensor]] = {}
    for layer, module in slots.items():
        present = [(w, parts[module.slot]) for w, (_, parts) in zip(weights, held, strict=True) if module.slot in parts]
        if present and isinstance(module, SavedModule):
            raise UnsupportedError(f"{layer!r} is trained in full: only low-rank adapters are combined; merge instead")
        if present and "combining" not in module.built_for:
            raise UnsupportedError(
                f"{layer!r} is {module.title}, whose update has no two factors to combine: merge the adapters into "
                "models and average those"
            )
        terms = [_term(weight, part) for weight, part in present]
        if terms and combination_type == "cat":
            combined[layer] = _cat(terms)
        elif terms and combination_type == "svd":
            combined[layer] = _truncated(*_cat(terms), svd_rank or largest)
        elif terms:
            _check_ranks(layer, terms, combination_type)
            combined[layer] = _summed(terms, combination_type, density, majority_sign_method, generator)
    rank = max(A.shape[0] for A, _ in combined.values())
    config = _config(
        model,
        [c for c, _ in held if isinstance(c, LoRAConfig)],
        [set(p) for _, p in held],
        {slots[n].slot: n for n in combined},
        rank,
    )
    parts = {slots[layer].slot: _padded(A, B, rank, config) for layer, (A, B) in combined.items()}
    keep_adapter(model, name, config, parts)


def _check_arguments(
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str,
    svd_rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> None:
    if not adapters or isinstance(adapters, str) or len(adapters) != len(weights):
        raise ConfigError(f"`adapters` and `weights` must be lists of one length, got {adapters!r} and {weights!r}")
    for weight in weights:
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError(f"`weights` must be finite numbers, got {weight!r}")
    if combination_type not in get_args(Combination):
        raise ConfigError(f"`combination_type` must be one of {list(get_args(Combination))}, got {combination_type!r}")
    if majority_sign_method not in get_args(SignMethod):
        raise ConfigError(f"`majority_sign_method` must be one of {list(get_args(SignMethod))}")
    prunes = combination_type in ("ties", "dare_linear", "dare_ties")
    if prunes != (density is not None):
        need = "needs" if prunes else "takes no"
        raise ConfigError(f"`combination_type={combination_type!r}` {need} `density`, got {density!r}")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"`density` must be in (0, 1], got {density!r}")
    if svd_rank is not None and (combination_type != "svd" or not isinstance(svd_rank, int) or svd_rank < 1):
        raise ConfigError(f'`svd_rank` must be an integer of at least 1, for "svd" only, got {svd_rank!r}')
    if majority_sign_method != "total" and not combination_type.endswith("ties"):
        raise ConfigError(f"`combination_type={combination_type!r}` takes no `majority_sign_method`")


def _term(weight: float, part: Held) -> Term:
    c = weight * part.strength * scaling(part.r, part.lora_alpha, part.use_rslora)
    A, B = (part.tensors[f"adapter.lora_{x}"] for x in "AB")
    wide = torch.promote_types(A.dtype, torch.float32)
    return c, A.to(wide), B.to(wide)


def _cat(terms: list[Term]) -> tuple[Tensor, Tensor]:
    return torch.cat([c * A for c, A, _ in terms]), torch.cat([B for _, _, B in terms], dim=1)


def _truncated(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``(rank, in)`` and ``(out, rank)`` of the best approximation of ``B A``, the singular values in B."""
    Qa, Ra = torch.linalg.qr(A.double().t())
    Qb, Rb = torch.linalg.qr(B.double())
    U, S, Vh = torch.linalg.svd(Rb @ Ra.t(), full_matrices=False)
    return (Vh[:rank] @ Qa.t()).to(A.dtype), (Qb @ (U[:, :rank] * S[:rank])).to(B.dtype)


def _check_ranks(layer: str, terms: list[Term], combination_type: str) -> None:
    ranks = [A.shape[0] for _, A, _ in terms]
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"{layer!r} has ranks {ranks} in these adapters: {combination_type!r} adds factors up and needs one rank; "
            'use "svd" or "cat"'
        )


def _summed(
    terms: list[Term], combination_type: str, density: float | None, sign_method: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A and B apart: pruned, weighted by the root of their term's factor, added up."""
    roots = [math.sqrt(abs(c)) for c, _, _ in terms]
    signed = [math.copysign(root, c) for root, (c, _, _) in zip(roots, terms, strict=True)]
    sums = []
    for factors, factor_weights in ((([A for _, A, _ in terms]), signed), ([B for _, _, B in terms], roots)):
        values = torch.stack([_pruned(f, combination_type, density, generator) for f in factors])
        weighted = values * values.new_tensor(factor_weights).view(-1, 1, 1)
        if combination_type.endswith("ties"):
            weight_of_signs = values if sign_method == "total" else values.sign()
            elected = torch.where(weight_of_signs.sum(0) >= 0, 1.0, -1.0)
            agrees = values.sign() == elected
            sums.append((weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1))
        else:
            sums.append(weighted.sum(0))
    return sums[0], sums[1]


def _pruned(factor: Tensor, combination_type: str, density: float | None, generator: torch.Generator) -> Tensor:
    if density is None or density == 1:
        return factor
    if combination_type == "ties":
        places = factor.abs().flatten().topk(int(density * factor.numel())).indices
        mask = torch.zeros_like(factor).flatten().index_fill_(0, places, 1).view_as(factor)
        return factor * mask
    drawn = torch.rand(factor.shape, generator=generator).to(factor.device)
    return factor * (drawn < density) / density


def _config(
    model: nn.Module, configs: list[LoRAConfig], covered: list[set[int]], layers: dict[int, str], rank: int
) -> LoRAConfig:
    """That of the adapter which has the same layers, or one that names them, with one rank and a scale of 1."""
    like = next((c for c, slots in zip(configs, covered, strict=True) if slots == set(layers)), None)
    config = dataclasses.replace(
        like or configs[0], r=rank, lora_alpha=float(rank), rank_pattern=None, alpha_pattern=None, use_rslora=False
    )
    if like is not None:
        return config
    names = "|".join(re.escape(name) for name in layers.values())
    return dataclasses.replace(
        config, target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None
    )


def _padded(A: Tensor, B: Tensor, rank: int, config: LoRAConfig) -> Held:
    missing = rank - A.shape[0]
    tensors = {
        "adapter.lora_A": torch.nn.functional.pad(A, (0, 0, 0, missing)),
        "adapter.lora_B": torch.nn.functional.pad(B, (0, missing)),
    }
    return Held(tensors, 1.0, rank, float(rank), False, config.lora_dropout)
