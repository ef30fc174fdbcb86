# SPDX-License-Identifier: Apache-2.0
r"""Forgetting and backward transfer over a run's looks, as continual learning defines them.

With :math:`R_{t,j}` the score of task j at look t of T, and :math:`t_j` the look after which j counts as learnt (the
first, for what the base could do),

.. math::
    F_j = \max_{t < T} R_{t,j} - R_{T,j}, \qquad
    BWT = \frac{1}{J} \sum_j \left(R_{T,j} - R_{t_j,j}\right), \qquad
    FG = \frac{1}{J} \sum_j \frac{R_{t_j,j} - R_{T,j}}{R_{t_j,j}}

Sources: F from A. Chaudhry et al., "Riemannian Walk", arXiv 1801.10112; BWT from D. Lopez-Paz and M. Ranzato, "Gradient
Episodic Memory", arXiv 1706.08840; FG from Y. Luo et al., "An Empirical Study of Catastrophic Forgetting", arXiv
2308.08747.

Looks at different items differ by their items alone: give differences to the base on the same items (``delta``,
``soft_delta``), or accuracies of one fixed set. The best of many noisy looks is above the truth by the noise, so F is
not 0 for a model that forgets nothing; the tests are in `statistics` and `sequential`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_lora.errors import ConfigError


def forgetting_measure(scores: Sequence[float]) -> float:
    """How far one task lies below its best earlier look; below 0 where the last look is the best.

    Args:
        scores: of each look in order, two or more [share of items].

    Raises:
        ConfigError: for fewer than two looks.
    """
    _check_looks("forgetting_measure", scores, 2)
    return max(scores[:-1]) - scores[-1]


def mean_forgetting(scores: Mapping[str, Sequence[float]]) -> float:
    """`forgetting_measure`, mean over tasks.

    Args:
        scores: of each look in order, by task [share of items].

    Raises:
        ConfigError: without a task, or for fewer than two looks at one.
    """
    return _mean([forgetting_measure(found) for found in scores.values()])


def backward_transfer(scores: Mapping[str, Sequence[float]], learnt_at: Mapping[str, int] | None = None) -> float:
    """What training did to tasks that were learnt before, mean over tasks; below 0 is forgetting.

    Args:
        scores: of each look in order, by task [share of items].
        learnt_at: index of the look after which a task counts as learnt; 0 for tasks that are not named.

    Raises:
        ConfigError: without a task or a look, or for a look that was not made.
    """
    return _mean([found[-1] - start for found, start in _from_start("backward_transfer", scores, learnt_at)])


def relative_forgetting(scores: Mapping[str, Sequence[float]], learnt_at: Mapping[str, int] | None = None) -> float:
    """The share of each score that was lost, mean over tasks; NaN where a task began at 0.

    Args:
        scores: accuracies, not differences, of each look in order, by task [share of items].
        learnt_at: index of the look after which a task counts as learnt; 0 for tasks that are not named.

    Raises:
        ConfigError: without a task or a look, or for a look that was not made.
    """
    pairs = _from_start("relative_forgetting", scores, learnt_at)
    return _mean([(start - found[-1]) / start if start else math.nan for found, start in pairs])


def _from_start(
    name: str, scores: Mapping[str, Sequence[float]], learnt_at: Mapping[str, int] | None
) -> list[tuple[Sequence[float], float]]:
    """The looks of each task and its score when it was learnt."""
    starts = learnt_at or {}
    unknown = sorted(set(starts) - set(scores))
    if unknown:
        raise ConfigError(f"`learnt_at` names tasks without scores: {', '.join(unknown)}.")
    pairs = []
    for task, found in scores.items():
        _check_looks(name, found, 1)
        look = starts.get(task, 0)
        if not 0 <= look < len(found):
            raise ConfigError(f"`learnt_at` says look {look} for {task!r}, which has looks 0 to {len(found) - 1}.")
        pairs.append((found, found[look]))
    return pairs


def _check_looks(name: str, scores: Sequence[float], least: int) -> None:
    if len(scores) < least:
        raise ConfigError(f"{name} needs {least} look(s) or more at each task: got {len(scores)}.")


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ConfigError("Forgetting over tasks needs at least one task: got none.")
    return math.fsum(values) / len(values)
