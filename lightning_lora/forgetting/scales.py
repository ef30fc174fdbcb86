# SPDX-License-Identifier: Apache-2.0
r"""Scales: forgetting as a function of how much of the adapter is kept.

.. math:: W(\lambda) = W_0 + \lambda \, s B A, \qquad drop(\lambda) = -\Delta(\lambda)

At :math:`\lambda = 0` the model is its base and the drop is exactly 0. The base's scores are asked once for all scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.paired import PairedScores
from lightning_lora.forgetting.report import TaskReport, compare_pooled
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.model.apply import adapter_modules


def multiply_scale(model: nn.Module, lam: float) -> None:
    """Multiply every adapter of ``model`` by ``lam``, on top of the strength that each has.

    Args:
        model: a model with adapters.
        lam: what to multiply by.
    """
    for _, module in adapter_modules(model):
        module.strength = module.strength * lam


@contextmanager
def at_scale(model: nn.Module, lam: float) -> Iterator[None]:
    """Inside, every adapter is multiplied by ``lam``; the strengths are put back, on exceptions too.

    Args:
        model: a model with adapters.
        lam: what to multiply by.
    """
    before = [(module, module.strength) for _, module in adapter_modules(model)]
    try:
        multiply_scale(model, lam)
        yield
    finally:
        for module, strength in before:
            module.strength = strength


def drop_at(scorer: Scorer, pairs: PairedScores, picked: Mapping[str, Sequence[int]], lam: float = 1.0) -> TaskReport:
    """The model with its adapters multiplied by ``lam`` against its base, over all these documents together.

    Every rank takes part.

    Args:
        scorer: the model.
        pairs: the tasks, and what is known of the base.
        picked: documents by task, ascending.
        lam: what the adapters are multiplied by.

    Raises:
        ConfigError: if no document has a right choice.
    """
    with at_scale(scorer.module, lam), scorer.quietly():
        model, base = pairs.score(scorer, picked)
    if not model:
        raise ConfigError("Forgetting: no item of any task has a right choice, so nothing can be compared.")
    return compare_pooled([(model[name], base[name]) for name in model])


def largest_that_holds(holds: Callable[[float], bool], parts: int = 32) -> float | None:
    r"""The largest of the scales :math:`1/p, 2/p, \dots, (p - 1)/p` that holds, by halving.

    More of the adapter forgets more, so a scale is not asked about when a smaller one has failed. Five questions find
    one of 31 scales.

    Args:
        holds: whether the model holds at a scale.
        parts: p, into how many the way from the base to the adapter is cut.

    Returns:
        The scale; None when not even the smallest one holds.
    """
    low, high = 0, parts  # `low` holds: at 0 the model is its base. `high` does not, or was not asked for.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle / parts) else (low, middle)
    return low / parts if low else None
