# SPDX-License-Identifier: Apache-2.0
r"""Paired statistics of forgetting: pure functions over one number an item, for the model and for its base.

Every item :math:`i` is scored twice on the same prompt: by the base and by the model. The sign says what happened to
the model: a negative difference is forgetting.

.. math::
    d_i = c_i - c_i^{base}, \qquad
    \Delta = \frac{1}{n} \sum_i d_i, \qquad
    SE(\Delta) = \frac{sd(d)}{\sqrt{n}}

:math:`c_i` is 1 for a right answer and 0 for a wrong one (accuracy), or its soft form in [0, 1].
Pairing removes what items differ in from each other: for a drop of one point with one answer in ten changed it needs a
fifth of the items that two separate accuracies need (E. Miller, "Adding Error Bars to Evals", arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from statistics import NormalDist

from lightning_lora.errors import ConfigError


def accuracy(correct: Sequence[float]) -> float:
    """Share of items answered right, in [0, 1]; NaN without items.

    Args:
        correct: 1 or 0 for each item.
    """
    return math.fsum(correct) / len(correct) if len(correct) else math.nan


def chance_adjusted_accuracy(correct: Sequence[float], n_choices: Sequence[int]) -> float:
    r"""Share of items that are known, when what is not known is guessed among k choices; NaN without items.

    .. math:: \frac{1}{n} \sum_i \frac{c_i - 1/k_i}{1 - 1/k_i}

    0 for a model that guesses, 1 for one that knows all, below 0 for one that does worse than guessing. Tasks of two
    choices and of five become comparable by it (the rescaling of llm-foundry's `EvalGauntlet`, item by item).

    Args:
        correct: 1 or 0 for each item.
        n_choices: number of choices of each item, 2 or more.

    Raises:
        ConfigError: if the two do not have the same number of items, or an item has fewer than two choices.
    """
    _check_choices(n_choices, len(correct))
    known = [(c - 1.0 / k) / (1.0 - 1.0 / k) for c, k in zip(correct, n_choices, strict=True)]
    return accuracy(known)


def paired_difference(
    model: Sequence[float], base: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    r"""Mean of the per-item differences ``model - base`` and its standard error.

    .. math::
        \Delta = \bar d, \qquad
        SE = \sqrt{\frac{\sum_i (d_i - \bar d)^2}{n (n - 1)}}, \qquad
        SE_{groups} = \frac{1}{n} \sqrt{\frac{G}{G - 1} \sum_{g=1}^{G} \Big(\sum_{i \in g} (d_i - \bar d)\Big)^2}

    Items that share something (questions on one passage) are lost and gained together, and count for less than as many
    separate ones; :math:`SE_{groups}` lets the differences of a group lean on each other in any way (E. Miller, arXiv
    2411.00640, with the usual correction for few groups). With a group for each item the two are one.

    Finite by rule: when no item differs, both are exactly 0 (this is so at step 0, where model and base are one); a
    single item or group, whose spread cannot be seen, has the largest error that values in [0, 1] allow, 1.

    Args:
        model: a value in [0, 1] for each item, of the model.
        base: the same items' values of the base, in the same order.
        groups: the group of each item, such as its passage; None where each item stands alone.

    Returns:
        The difference and its standard error, in the unit of the values (shares of items for 0/1 values).

    Raises:
        ConfigError: if they do not have the same number of items, or none.
    """
    n = _paired_length(model, base)
    differences = [m - b for m, b in zip(model, base, strict=True)]
    mean = math.fsum(differences) / n
    if groups is not None:
        sums = _sums_by_group([d - mean for d in differences], groups)
        if len(sums) > 1:
            return mean, _grouped_error(sums, n)
        return mean, 0.0 if n > 1 and not any(differences) else 1.0
    if n == 1:
        return mean, 1.0
    squares = math.fsum((d - mean) ** 2 for d in differences)
    return mean, math.sqrt(squares / (n * (n - 1)))


def flips(model: Sequence[float], base: Sequence[float]) -> tuple[int, int]:
    """How many items were lost (base right, model wrong) and gained (base wrong, model right).

    Args:
        model: 1 or 0 for each item, of the model.
        base: 1 or 0 for each item, of the base, in the same order.

    Raises:
        ConfigError: if the two do not have the same number of items, or none.
    """
    _paired_length(model, base)
    pairs = list(zip(model, base, strict=True))
    return sum(b > m for m, b in pairs), sum(m > b for m, b in pairs)


def chance_adjusted_flips(
    model: Sequence[float], base: Sequence[float], n_choices: Sequence[int]
) -> tuple[float, float]:
    r"""Shares of items whose knowledge was lost and gained, with the flips that guessing makes taken out.

    Whoever does not know guesses among k choices, before and after on their own. With the observed shares L of lost, G
    of gained and W of items wrong both times, guesses alone turn :math:`W / (k - 1)` of the items either way, so

    .. math::
        lost = \frac{k}{k - 1} \left(L - \frac{W}{k - 1}\right), \qquad
        gained = \frac{k}{k - 1} \left(G - \frac{W}{k - 1}\right)

    item by item with its own k, and 0 where the rest is negative. Before that is done, gained less lost is the
    difference of `chance_adjusted_accuracy`. In the manner of J. Harmon et al., "Mapping Post-Training Forgetting in
    Language Models at Scale", arXiv 2510.17776, with the observed W in the place of a product of error rates.

    Two models that are close to each other guess alike, and then this takes out too much: read it as a lower bound of
    the flips, beside the plain ones.

    Args:
        model: 1 or 0 for each item, of the model.
        base: 1 or 0 for each item, of the base, in the same order.
        n_choices: number of choices of each item, 2 or more.

    Raises:
        ConfigError: if they do not have the same number of items, or none, or an item has fewer than two choices.
    """
    n = _paired_length(model, base)
    _check_choices(n_choices, n)
    lost, gained = [], []
    for m, b, k in zip(model, base, n_choices, strict=True):
        guessed = (not m and not b) / (k - 1)
        lost.append(k / (k - 1) * ((b > m) - guessed))
        gained.append(k / (k - 1) * ((m > b) - guessed))
    return max(0.0, math.fsum(lost) / n), max(0.0, math.fsum(gained) / n)


def mcnemar_p(lost: int, gained: int) -> float:
    r"""Exact two-sided p-value of McNemar's test that answers are lost as often as gained.

    Under the null each of the :math:`k = lost + gained` changed answers is a fair coin, so

    .. math:: p = \min\left(1,\; 2 \sum_{j=0}^{\min(lost, gained)} \binom{k}{j} 2^{-k}\right)

    summed from the largest term in logarithms, so that no count overflows. Without a changed answer p is 1.

    Args:
        lost: items that the base answered right and the model wrong.
        gained: items that the base answered wrong and the model right.

    Raises:
        ConfigError: for a negative count.
    """
    if lost < 0 or gained < 0:
        raise ConfigError(f"mcnemar_p counts items: got lost={lost}, gained={gained}; both must be 0 or more.")
    k, smaller = lost + gained, min(lost, gained)
    if k == 0:
        return 1.0

    def log_choose(j: int) -> float:
        return math.lgamma(k + 1) - math.lgamma(j + 1) - math.lgamma(k - j + 1)

    largest = log_choose(smaller)
    tail = math.fsum(math.exp(log_choose(j) - largest) for j in range(smaller + 1))
    return min(1.0, 2.0 * math.exp(largest - k * math.log(2.0)) * tail)


def grouped_p(delta: float, error: float, n_groups: int) -> float:
    r"""Two-sided p-value that the mean paired difference is 0, where items lean on each other in groups.

    .. math:: p = 2\, \Phi\left(-\frac{|\Delta|}{\max(SE_{groups}, 1/G)}\right)

    `mcnemar_p` takes every changed answer for a coin of its own; five answers that are lost with one passage are one
    coin. The floor :math:`1/G` is the error of one changed group among G: a few groups that agree do not pass for
    certainty. The normal curve is that of many groups; with fewer than some twenty read it with care.

    Args:
        delta: mean of the differences, as `paired_difference` gives it.
        error: its standard error over groups.
        n_groups: number of groups.

    Raises:
        ConfigError: without a group.
    """
    if n_groups < 1:
        raise ConfigError(f"grouped_p needs at least one group: got n_groups={n_groups}.")
    return 2.0 * NormalDist().cdf(-abs(delta) / max(error, 1.0 / n_groups))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    r"""p-values of several tests, each made safe for being one of many.

    .. math::
        \tilde p_{(j)} = \max_{i \le j} \min\left(1, (m - i + 1)\, p_{(i)}\right), \qquad p_{(1)} \le \dots \le p_{(m)}

    The probability that any task without a drop has :math:`\tilde p \le \alpha` is at most alpha, whatever the tests
    have to do with each other; Bonferroni's holds for the same and finds less (S. Holm, "A simple sequentially
    rejective multiple test procedure", 1979).

    Args:
        p_values: the p-value of each test, by name.

    Raises:
        ConfigError: for a value outside [0, 1].
    """
    wrong = {name: p for name, p in p_values.items() if not 0.0 <= p <= 1.0}
    if wrong:
        raise ConfigError(f"holm takes p-values, each in [0, 1]: got {wrong}.")
    adjusted, largest = {}, 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - i) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def soft_accuracy(margins: Sequence[float], bandwidth: float = 0.5) -> list[float]:
    r"""Each item's accuracy made smooth, on a scale that the model's confidence does not move.

    .. math:: s_i = \sigma\left(1.702\, \frac{m_i}{h \, sd(m)}\right), \qquad \sigma(x) = \frac{1}{1 + e^{-x}}

    :math:`m_i` is the log-likelihood of the right choice less that of the best wrong one. The constant makes the
    logistic curve stand for the normal one. Multiplying every margin by one factor (a model that becomes more or less
    confident and answers the same) changes nothing; a raw probability would call that forgetting. A drop needs several
    times fewer items to be seen than in 0/1 accuracy.

    Where the margins have no spread (one item, or all alike) the curve is the step: 1 above 0, 0 below, one
    half at 0. An item without a number (a model that has diverged) counts 0.

    Args:
        margins: margin of each item of one model [nats].
        bandwidth: h, in standard deviations of the margins.

    Returns:
        A value in [0, 1] for each item.
    """
    finite = [m for m in margins if math.isfinite(m)]
    mean = math.fsum(finite) / len(finite) if finite else 0.0
    variance = math.fsum((m - mean) ** 2 for m in finite) / len(finite) if finite else 0.0
    scale = bandwidth * math.sqrt(variance)
    # Rounding alone gives equal margins a spread near 1e-16 of their size; that is none.
    step = not scale > 1e-12 * max(1.0, abs(mean))
    return [_soft_item(m, step, scale) for m in margins]


def _soft_item(margin: float, step: bool, scale: float) -> float:
    if math.isnan(margin):
        return 0.0
    if step or math.isinf(margin):
        return 0.5 * (1.0 + (margin > 0) - (margin < 0))
    return _sigmoid(1.702 * margin / scale)


def _paired_length(model: Sequence[float], base: Sequence[float]) -> int:
    if len(model) != len(base) or not len(model):
        raise ConfigError(
            f"Paired statistics need the same items of model and base, at least one: got {len(model)} and {len(base)}."
        )
    return len(model)


def _check_choices(n_choices: Sequence[int], n: int) -> None:
    if len(n_choices) != n or any(k < 2 for k in n_choices):
        raise ConfigError(
            f"Correcting for chance needs the number of choices of each item, 2 or more: got {len(n_choices)} numbers, "
            f"the smallest {min(n_choices, default=None)}, for {n} items."
        )


def _sums_by_group(deviations: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    if len(groups) != len(deviations):
        raise ConfigError(f"`groups` names the group of each item: got {len(groups)} for {len(deviations)} items.")
    members: dict[Hashable, list[float]] = {}
    for group, deviation in zip(groups, deviations, strict=True):
        members.setdefault(group, []).append(deviation)
    return [math.fsum(found) for found in members.values()]


def _grouped_error(sums: Sequence[float], n: int) -> float:
    return math.sqrt(len(sums) / (len(sums) - 1) * math.fsum(x * x for x in sums)) / n


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
