# SPDX-License-Identifier: Apache-2.0
r"""How many items a drop needs to be seen, and what a number of items can see.

A one-sided test of level :math:`\alpha` on the mean of n differences with standard deviation :math:`\sigma` finds a
drop d above a tolerance :math:`\tau` with probability :math:`1 - \beta` when

.. math:: n = \left(\frac{(z_{1-\alpha} + z_{1-\beta})\, \sigma}{d - \tau}\right)^2

What pairing and soft accuracy gain is all in :math:`\sigma`: two separate accuracies have
:math:`\sqrt{2 p (1 - p)}`, the same items asked twice :math:`\sqrt{c - d^2}` with c the share of flips, and soft
accuracy what `paired_difference` says times :math:`\sqrt n`. Source: E. Miller, "Adding Error Bars to Evals", arXiv
2411.00640.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from lightning_lora.errors import ConfigError


def unpaired_sd(accuracy: float) -> float:
    r"""Standard deviation for an item of two models asked different items: :math:`\sqrt{2 p (1 - p)}`.

    Args:
        accuracy: p, of both [share of items].

    Raises:
        ConfigError: outside [0, 1].
    """
    if not 0.0 <= accuracy <= 1.0:
        raise ConfigError(f"unpaired_sd needs an accuracy in [0, 1]: got {accuracy!r}.")
    return math.sqrt(2.0 * accuracy * (1.0 - accuracy))


def paired_sd(flips: float, drop: float = 0.0) -> float:
    r"""Standard deviation for an item of the difference in accuracy: :math:`\sqrt{c - d^2}`.

    Args:
        flips: c, share of items lost or gained; the run itself shows it.
        drop: d, share of items lost less that gained.

    Raises:
        ConfigError: for shares that cannot be, such as a drop larger than the flips.
    """
    if not abs(drop) <= flips <= 1.0:
        raise ConfigError(f"paired_sd needs shares with |drop| <= flips <= 1: got flips={flips!r}, drop={drop!r}.")
    return math.sqrt(max(0.0, flips - drop * drop))


def required_items(
    drop: float, sd: float, alpha: float = 0.05, power: float = 0.8, tolerance: float = 0.0, sides: int = 1
) -> int:
    """Items with which a drop is found.

    Args:
        drop: the drop to be found, above the tolerance [share of items].
        sd: standard deviation of an item's difference: `paired_sd`, `unpaired_sd`, or one measured.
        alpha: probability of an alarm when the drop is the tolerance.
        power: probability of finding the drop, above alpha.
        tolerance: a drop that is nobody's concern [share of items].
        sides: 1 for a test of drops, 2 for one of drops and gains.

    Raises:
        ConfigError: for values out of range.
    """
    z = _z(alpha, sides) + _z(1.0 - power, 1)
    _check(drop, sd, tolerance)
    return max(1, math.ceil((z * sd / (drop - tolerance)) ** 2)) if z > 0.0 else 1


def power_of(
    drop: float, sd: float, n_items: int, alpha: float = 0.05, tolerance: float = 0.0, sides: int = 1
) -> float:
    r"""Probability that a drop is found: :math:`\Phi\left(\sqrt n\, (d - \tau) / \sigma - z_{1-\alpha}\right)`.

    Args:
        drop: the true drop, above the tolerance [share of items].
        sd: standard deviation of an item's difference; 0 finds every drop.
        n_items: number of items.
        alpha: probability of an alarm when the drop is the tolerance.
        tolerance: a drop that is nobody's concern [share of items].
        sides: 1 for a test of drops, 2 for one of drops and gains.

    Raises:
        ConfigError: for values out of range.
    """
    _check(drop, sd, tolerance)
    _check_items(n_items)
    z = _z(alpha, sides)
    return NormalDist().cdf(math.sqrt(n_items) * (drop - tolerance) / sd - z) if sd > 0.0 else 1.0


def detectable_drop(
    sd: float, n_items: int, alpha: float = 0.05, power: float = 0.8, tolerance: float = 0.0, sides: int = 1
) -> float:
    """The smallest drop that a number of items finds [share of items].

    Args:
        sd: standard deviation of an item's difference.
        n_items: number of items.
        alpha: probability of an alarm when the drop is the tolerance.
        power: probability of finding the drop, above alpha.
        tolerance: a drop that is nobody's concern [share of items].
        sides: 1 for a test of drops, 2 for one of drops and gains.

    Raises:
        ConfigError: for values out of range.
    """
    _check_items(n_items)
    _check(tolerance + 1.0, sd, tolerance)
    return tolerance + max(0.0, _z(alpha, sides) + _z(1.0 - power, 1)) * sd / math.sqrt(n_items)


def _z(error: float, sides: int) -> float:
    if not 0.0 < error < 1.0 or sides not in (1, 2):
        raise ConfigError(
            f"Error probabilities (alpha, 1 - power) lie in (0, 1) and sides are 1 or 2: got {error!r}, {sides!r}."
        )
    return NormalDist().inv_cdf(1.0 - error / sides)


def _check(drop: float, sd: float, tolerance: float) -> None:
    if not tolerance >= 0.0 or not drop > tolerance or not 0.0 <= sd < math.inf:
        raise ConfigError(
            f"The drop must be above the tolerance, which is 0 or more, and the standard deviation finite and not "
            f"negative: got drop={drop!r}, tolerance={tolerance!r}, sd={sd!r}."
        )


def _check_items(n_items: int) -> None:
    if n_items < 1:
        raise ConfigError(f"At least one item is needed: got n_items={n_items!r}.")
