# SPDX-License-Identifier: Apache-2.0
r"""The stopping rule: a bet against "no drop above the tolerance" whose capital may be looked at as often as one likes.

Item :math:`i` of a look gives :math:`d_i = s_i^{base} - s_i \in [-1, 1]`, above 0 where the model got worse. A gambler
who stakes the share :math:`\lambda` of the capital on every item, from look :math:`k` on, has after look :math:`t`

.. math::
    M_{k,\lambda}(t) = \prod_{i \in looks\, k..t} \left(1 + \frac{\lambda}{1 + \tau} (d_i - \tau)\right), \qquad
    E(t) = \sum_k w_k \; \frac{1}{|\Lambda|} \sum_{\lambda \in \Lambda} M_{k,\lambda}(t), \qquad \sum_k w_k \le 1

with the tolerance :math:`\tau`. No factor is negative, and while the mean drop is at most :math:`\tau` no factor's
expectation is above 1: E is a supermartingale that starts at 1, and by Ville's inequality

.. math:: P\left(\exists t: E(t) \ge \frac{1}{\alpha}\right) \le \alpha

at every number of looks and however the run decides when to stop. The restarts at each look :math:`k` are why a drop
that comes late is still found: the capital lost while there was none is not staked again. This holds for items that no
earlier look has seen, and the drop is one of soft accuracy: see `raises_alarm` for what else an alarm needs.

Items that belong together (questions on one passage) are lost and gained together, and a product over them would take
one chance for many. There the stake is on a group :math:`g`, drawn whole and at random:

.. math::
    y_g = \frac{1}{m} \sum_{i \in g} (d_i - \tau), \qquad
    M_{k,\lambda}(t) = \prod_{g \in looks\, k..t} \left(1 + \frac{\lambda}{1 + \tau}\, y_g\right)

with :math:`m` the number of items in the largest group of the task, known beforehand. No factor is negative, since
:math:`y_g \ge -(1 + \tau)`; and while the mean drop over items is at most :math:`\tau`, :math:`E\, y_g \le 0`, for it
is the mean over groups of what all their items exceed the tolerance by, whatever the items of a group have to do with
each other. With :math:`m = 1` it is the first formula. Groups of very different sizes make small stakes of most.

Sources: J. Ville, "Étude critique de la notion de collectif" (1939); I. Waudby-Smith and A. Ramdas, "Estimating
means of bounded random variables by betting", arXiv 2010.09686; J. Shin, A. Ramdas and A. Rinaldo, "E-detectors",
arXiv 2203.03532 (restarts); V. Vovk and R. Wang, "E-values: calibration, combination and applications", arXiv
1912.06116 (means and closed tests).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lightning_lora.errors import ConfigError

#: Shares of the capital that are staked on each item: small ones find small drops in many items, large ones large drops
#: in few.
BETS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)

#: E-values above this are given as this: it fits a float32, as loggers keep numbers, and sums of many do not overflow.
LARGEST = 1e30


class EProcess:
    r"""The capital of the bet, after one look and the next.

    All starts that stake the same share are multiplied by the same factor, so they are kept as one sum
    (:math:`\log S_\lambda`), and what waits for later starts as cash :math:`c`:

    .. math::
        S_\lambda \leftarrow (S_\lambda + w_k) \prod_{g \in look\, k}
            \left(1 + \frac{\lambda}{1 + \tau} y_g\right), \qquad
        c \leftarrow c - w_k, \qquad E = c + \frac{1}{|\Lambda|} \sum_\lambda S_\lambda

    The state is one number for each bet, whatever the number of looks.

    Args:
        tolerance: a drop that is nobody's concern, in [0, 1) [share of items].
        alpha: probability, at most, of an alarm in the whole run while the drop is within the tolerance; in (0, 1).
        bets: shares of the capital that are staked, each in (0, 1).
        largest_group: m, at most so many items come in one group; 1 where every item stands alone.

    Raises:
        ConfigError: for values out of range.
    """

    def __init__(
        self, tolerance: float = 0.005, alpha: float = 0.05, bets: Sequence[float] = BETS, largest_group: int = 1
    ) -> None:
        if not 0.0 <= tolerance < 1.0 or not 0.0 < alpha < 1.0:
            raise ConfigError(
                f"EProcess needs a tolerance in [0, 1) and an alpha in (0, 1): "
                f"got tolerance={tolerance!r}, alpha={alpha!r}."
            )
        if not bets or not all(0.0 < bet < 1.0 for bet in bets):
            raise ConfigError(f"EProcess needs `bets`, each a share of the capital in (0, 1): got {bets!r}.")
        if largest_group < 1:
            raise ConfigError(f"EProcess counts the items of its largest group from 1: got {largest_group!r}.")
        self.largest_group = largest_group
        self.tolerance = float(tolerance)
        self.alpha = float(alpha)
        self.bets = tuple(float(bet) for bet in bets)
        self.reset()

    def reset(self) -> None:
        """Back to a capital of 1, before the first look."""
        self.looks, self.items = 0, 0
        self._cash = 1.0
        self._log_staked = [-math.inf] * len(self.bets)

    def update(
        self, differences: Sequence[float], left: int | None = None, groups: Sequence[Hashable] | None = None
    ) -> float:
        r"""Bet on one look's items.

        The share :math:`w_k` that starts at this look is :math:`1/K` of the capital at the beginning when K looks are
        planned, and :math:`1/(k (k + 1))` when nobody knows: as shares of what is left, one of those still to come and
        :math:`1/(k + 1)`, so that a plan which changes in mid-run still never stakes more than there is. When the plan
        is used up, the bets that run go on.

        Args:
            differences: soft accuracy of the base less that of the model for each item, in [-1, 1]; the items must be
                fresh. Without an item nothing changes.
            left: looks of the run still to come, this one included; None when nobody knows. It must have been known
                before the look.
            groups: the group of each item; None where every item is a group of its own. A group comes whole in one
                look.

        Returns:
            The e-value after this look.

        Raises:
            ConfigError: for a difference outside [-1, 1] or not a number, ``left`` below 1, or a group of more items
                than ``largest_group``.
        """
        if left is not None and left < 1:
            raise ConfigError(f"EProcess counts the looks still to come from 1, this one included: got left={left!r}.")
        wrong = next((d for d in differences if not -1.0 <= d <= 1.0), None)
        if wrong is not None:
            raise ConfigError(
                f"EProcess takes differences of two values in [0, 1], base less model: got {wrong!r}. "
                f"Margins and log-likelihoods go through `soft_accuracy` first."
            )
        if not len(differences):
            return self.e_value
        outcomes = self._outcomes(differences, groups)
        self.looks += 1
        self.items += len(differences)
        stake = self._cash / (self.looks + 1 if left is None else left)
        # At `left=1` exactly nothing stays.
        self._cash = self._cash - stake if left != 1 else 0.0
        log_stake = math.log(stake) if stake > 0.0 else -math.inf
        self._log_staked = [
            _log_sum([staked, log_stake]) + self._log_gain(bet, outcomes)
            for bet, staked in zip(self.bets, self._log_staked, strict=True)
        ]
        return self.e_value

    @property
    def log_e_value(self) -> float:
        """Natural logarithm of the capital, which itself may be too large for a float."""
        log_mean = _log_sum(self._log_staked) - math.log(len(self.bets))
        return _log_sum([log_mean, math.log(self._cash) if self._cash > 0.0 else -math.inf])

    @property
    def e_value(self) -> float:
        """The capital, 1 before the first look; 1e30 stands for whatever is above it."""
        log = self.log_e_value
        return math.exp(log) if log < math.log(LARGEST) else LARGEST

    @property
    def alarm(self) -> bool:
        """Whether the capital is 1/alpha or more now: a drop of what is bet on above the tolerance."""
        return self.log_e_value >= -math.log(self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """The capital and what it was bet on, in primitives."""
        return {
            "tolerance": self.tolerance,
            "bets": list(self.bets),
            "largest_group": self.largest_group,
            "looks": self.looks,
            "items": self.items,
            "cash": self._cash,
            "log_staked": list(self._log_staked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on, to the bit, where `state_dict` was taken. Another alpha is allowed: it is no part of the bet.

        Args:
            state: what `state_dict` gave.

        Raises:
            ConfigError: if the capital was won with another tolerance, other bets or another largest group; `reset`
                begins a new one.
        """
        mine = (self.tolerance, list(self.bets), self.largest_group)
        theirs = (state["tolerance"], list(state["bets"]), state.get("largest_group", 1))
        if mine != theirs:
            raise ConfigError(
                f"EProcess cannot go on with a capital that was won on another bet: this one has tolerance, bets and "
                f"largest group {mine}, the state has {theirs}. Take the same values, or begin anew with `reset`."
            )
        self.looks, self.items = int(state["looks"]), int(state["items"])
        self._cash = float(state["cash"])
        self._log_staked = [float(x) for x in state["log_staked"]]

    def _outcomes(self, differences: Sequence[float], groups: Sequence[Hashable] | None) -> list[float]:
        """What is staked on, :math:`y_g` of each group. Sums are rounded once: the order of items does not matter."""
        members: dict[Hashable, list[float]] = {}
        for d, group in zip(differences, range(len(differences)) if groups is None else groups, strict=True):
            members.setdefault(group, []).append(d - self.tolerance)
        most = max(map(len, members.values()))
        if most > self.largest_group:
            raise ConfigError(
                f"EProcess was told that no group has more than {self.largest_group} item(s) (`largest_group`), and "
                f"one of this look has {most}."
            )
        return [math.fsum(found) / self.largest_group for found in members.values()]

    def _log_gain(self, bet: float, outcomes: Sequence[float]) -> float:
        """Logarithm of the factor of one look. The sum is rounded once, so the order of groups does not matter."""
        share = bet / (1.0 + self.tolerance)
        return math.fsum(math.log1p(share * y) for y in outcomes)


def raises_alarm(e_value: float, alpha: float, lost: int, gained: int) -> bool:
    r"""Whether evidence is an alarm: :math:`E \ge 1/\alpha`, and more answers were lost than gained.

    The capital is won on soft accuracy. Confidence that grows on some items and shrinks on others moves its mean too,
    without one answer changed; such evidence alone is no forgetting. The condition can only take alarms away, so the
    probability of one without a drop stays at most alpha.

    Args:
        e_value: the evidence so far, of one task or of several.
        alpha: error probability.
        lost: answers that the base has right and the model wrong, over the looks that the evidence is of.
        gained: answers that the base has wrong and the model right, over the same.
    """
    return e_value >= 1.0 / alpha and lost > gained


def mean_e_value(e_values: Sequence[float]) -> float:
    """The e-value of several tasks together: their mean, whatever they have to do with each other.

    The mean of e-processes that are updated at the same looks is an e-process: one task's collapse shows in it, and
    1/alpha remains the border for all of them.

    Args:
        e_values: the capital of each task at one moment.

    Raises:
        ConfigError: without a value.
    """
    if not len(e_values):
        raise ConfigError("mean_e_value needs the e-value of at least one task: got none.")
    return math.fsum(e / len(e_values) for e in e_values)


def closed_e_values(e_values: Mapping[str, float]) -> dict[str, float]:
    r"""Each task's e-value made safe for being one of many: which tasks have dropped, not only that one has.

    .. math:: e^*_j = \min_{J \ni j} \frac{1}{|J|} \sum_{i \in J} e_i

    The closed test by means (Vovk and Wang): the probability that any task within the tolerance reaches
    :math:`e^*_j \ge 1/\alpha` is at most alpha. The smallest mean takes the smallest of the other values first.

    Args:
        e_values: the capital of each task at one moment.
    """
    ordered = sorted(e_values.items(), key=lambda item: item[1])
    closed = {}
    for name, e in e_values.items():
        others = [value for other, value in ordered if other != name]
        closed[name] = min(math.fsum([e, *others[:k]]) / (k + 1) for k in range(len(others) + 1))
    return closed


def _log_sum(logs: Sequence[float]) -> float:
    """Logarithm of the sum of numbers given by their logarithms."""
    largest = max(logs)
    if largest == -math.inf:
        return largest
    return largest + math.log(math.fsum(math.exp(x - largest) for x in logs))
