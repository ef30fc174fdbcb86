# SPDX-License-Identifier: Apache-2.0
r"""Scales: forgetting as a function of how much of the adapter is kept.

.. math:: W(\lambda) = W_0 + \lambda(\ell) \, s B A, \qquad drop(\lambda) = -\Delta(\lambda), \qquad
    \lambda(\ell) = \lambda \quad or \quad \lambda(\ell) = \lambda + (1 - \lambda)\, \ell, \quad \ell \in [0, 1]

One scalar for all layers ("uniform"), or linear in depth ("linear"): the last block keeps all of its adapter and the
first one :math:`\lambda` of it, since low layers hold what is general (K. Wang et al., "LiNeS", arXiv 2410.17146). At a
uniform 0 the model is its base and the drop is exactly 0. The base's scores are asked once for all scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.forgetting.paired import PairedScores
from lightning_lora.forgetting.report import TaskReport, compare, compare_pooled
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.model.depth import adapter_depths
from lightning_lora.model.slots import adapter_modules

SHAPES = ("uniform", "linear")


def check_divisible(model: nn.Module, what: str, instead: str) -> None:
    """See that less of the adapters than all is something that they can be.

    Args:
        model: a model with adapters.
        what: who wants to try it.
        instead: what to use.

    Raises:
        UnsupportedError: An adapter of the model is there or not.
    """
    for _, module in adapter_modules(model):
        if module.indivisible:
            raise UnsupportedError(
                f"{what} keeps a part of what was trained, and of {module.title} there is none: "
                f"{module.indivisible}. {instead}"
            )


def multiply_scale(model: nn.Module, lam: float, shape: str = "uniform") -> None:
    """Multiply every adapter of ``model`` by ``lam``, on top of the strength that each has; 1 changes nothing.

    Args:
        model: a model with adapters.
        lam: what to multiply by.
        shape: "uniform", or "linear" in depth.
    """
    if lam == 1.0:
        return
    depths = adapter_depths(model) if shape == "linear" else {}
    for name, module in adapter_modules(model):
        module.strength = module.strength * (lam + (1.0 - lam) * depths.get(name, 0.0))


@contextmanager
def at_scale(model: nn.Module, lam: float, shape: str = "uniform") -> Iterator[None]:
    """Inside, every adapter is multiplied by ``lam``; the strengths are put back, on exceptions too.

    Args:
        model: a model with adapters.
        lam: what to multiply by.
        shape: "uniform", or "linear" in depth.
    """
    before = [(module, module.strength) for _, module in adapter_modules(model)]
    try:
        multiply_scale(model, lam, shape)
        yield
    finally:
        for module, strength in before:
            module.strength = strength


def compare_tasks(
    scorer: Scorer, pairs: PairedScores, picked: Mapping[str, Sequence[int]]
) -> tuple[TaskReport, dict[str, TaskReport]]:
    """The model as it stands against its base: all these documents together, and by task.

    Every rank takes part.

    Args:
        scorer: the model.
        pairs: the tasks, and what is known of the base.
        picked: documents by task, ascending.

    Raises:
        ConfigError: if no document has a right choice.
    """
    with scorer.quietly():
        model, base = pairs.score(scorer, picked)
    if not model:
        raise ConfigError("Forgetting: no item of any task has a right choice, so nothing can be compared.")
    pooled = compare_pooled([(model[name], base[name]) for name in model])
    return pooled, {name: compare(model[name], base[name]) for name in model}


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
