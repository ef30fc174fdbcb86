# SPDX-License-Identifier: Apache-2.0
r"""`RankAllocator`: which ranks of AdaLoRA's updates stay, step by step (Zhang et al. 2023).

Every layer has an update ``B diag(E) A`` of ``init_r`` triplets (a column of B, a value of E, a row of A). After each
optimizer step every entry w with gradient g has a smoothed sensitivity and its uncertainty::

    I = |w g|        S <- beta1 S + (1 - beta1) I        U <- beta2 U + (1 - beta2) |I - S|

and a triplet the score  S U of its value + the mean of S U over its row of A + the same over its column of B.
Of all triplets of all layers those with the highest scores stay, as many as the budget of the step allows; the values
of the others become zero, and may grow again until the budget is final::

    budget
    init    ------.
                   \       cubic: target + (init - target) (1 - (t - tinit) / (total - tfinal - tinit))^3
    target          `-----------------
           0   tinit      total - tfinal    total     t, optimizer steps taken
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.nn.adalora import Triplets


@dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """How many triplets all layers together may keep, by optimizer steps taken.

    Args:
        init: Triplets that there are.
        target: Triplets that stay.
        tinit: Steps before the first is taken away.
        tfinal: Steps at the end with the target.
        total: Steps of the run.
        every: Steps from one choice of triplets to the next.

    Raises:
        ConfigError: No steps are left in which the budget could fall.
    """

    init: int
    target: int
    tinit: int
    tfinal: int
    total: int
    every: int

    def __post_init__(self) -> None:
        if self.settled_at < 2 or self.tinit >= self.settled_at:
            raise ConfigError(
                f"the run has {self.total} optimizer steps, of which `tinit={self.tinit}` are before the budget falls "
                f"and `tfinal={self.tfinal}` after it: at least one must be left between, after the first. Give a "
                "smaller `tinit` or `tfinal`, or train longer"
            )

    @property
    def settled_at(self) -> int:
        """The step after which the choice is final."""
        return self.total - self.tfinal

    def budget(self, step: int) -> int:
        """Triplets that may stay after ``step`` steps."""
        if step <= self.tinit:
            return self.init
        if step >= self.settled_at:
            return self.target
        left = 1 - (step - self.tinit) / (self.settled_at - self.tinit)
        return int((self.init - self.target) * left**3 + self.target)

    def is_due(self, step: int) -> bool:
        """Whether triplets are chosen after ``step`` steps, before the choice is final."""
        return self.tinit < step < self.settled_at and step % self.every == 0


class RankAllocator:
    """Scores triplets and sets the values of those that go to zero.

    Args:
        layers: The layers' updates by name, the live parameters.
        schedule: How many stay.
        beta1: Share of the old in the smoothed sensitivity.
        beta2: Share of the old in the uncertainty.
    """

    def __init__(self, layers: Mapping[str, Triplets], schedule: BudgetSchedule, beta1: float, beta2: float) -> None:
        self.layers, self.schedule = dict(layers), schedule
        self.beta1, self.beta2 = beta1, beta2
        self._sensitivity: dict[str, Triplets] = {}
        self._uncertainty: dict[str, Triplets] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def kept(self) -> dict[str, Tensor]:
        """By layer, which triplets the last choice left ``(r,)``; empty before the first."""
        return dict(self._kept)

    def ranks(self) -> dict[str, int]:
        """By layer, how many triplets the last choice left."""
        counts = [self._kept[name].sum() if self._kept else torch.tensor(len(t.E)) for name, t in self.layers.items()]
        return dict(zip(self.layers, torch.stack([count.cpu() for count in counts]).tolist(), strict=True))

    @torch.no_grad()
    def update(
        self, step: int, gradient: Callable[[Tensor], Tensor | None] = attrgetter("grad"), score: bool = True
    ) -> None:
        """Take in an optimizer step that was made.

        Args:
            step: Its number, from 1.
            gradient: Gives the gradient that a parameter was stepped with; none counts as zero.
            score: Whether the gradients count: not those of a step that was left out, by a loss scaler say.
        """
        if step < self.schedule.settled_at:
            if score:
                self._score(gradient)
            if self.schedule.is_due(step) and self._sensitivity:  # else every step so far was left out
                self._choose(self.schedule.budget(step))
        elif self._sensitivity:  # the last choice; the scores are not needed any more
            self._choose(self.schedule.budget(step))
            self._sensitivity, self._uncertainty = {}, {}
        else:
            self._prune()

    def scores(self) -> dict[str, Tensor]:
        """By layer, the score of each triplet ``(r,)``."""
        found = {}
        for name in self.layers:
            A, E, B = (s * u for s, u in zip(self._sensitivity[name], self._uncertainty[name], strict=True))
            found[name] = E.view(-1) + (A.mean(1) + B.mean(0))
        return found

    def state_dict(self) -> dict[str, Any]:
        """Scores and the last choice, for a checkpoint: primitives and tensors."""
        return {
            "sensitivity": {name: list(tensors) for name, tensors in self._sensitivity.items()},
            "uncertainty": {name: list(tensors) for name, tensors in self._uncertainty.items()},
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            CheckpointError: It is of other layers or ranks.
        """
        shapes = {name: [tuple(t.shape) for t in triplets] for name, triplets in self.layers.items()}
        stored = {key: {n: [tuple(t.shape) for t in ts] for n, ts in state[key].items()} for key in _AVERAGES}
        kept = {name: tuple(mask.shape) for name, mask in state["kept"].items()}
        fits = all(found in ({}, shapes) for found in stored.values())
        if not fits or kept not in ({}, {name: (len(t.E),) for name, t in self.layers.items()}):
            raise CheckpointError(
                "the importance scores in the checkpoint are of other layers or ranks than the model has: resume with "
                "the `target_modules` and `init_r` that the run was begun with"
            )
        own = {name: triplets.E.device for name, triplets in self.layers.items()}
        self._sensitivity, self._uncertainty = (
            {n: Triplets(*(t.to(own[n], copy=True) for t in tensors)) for n, tensors in state[key].items()}
            for key in _AVERAGES
        )
        self._kept = {name: mask.to(own[name], copy=True) for name, mask in state["kept"].items()}

    def _score(self, gradient: Callable[[Tensor], Tensor | None]) -> None:
        if not self._sensitivity:
            self._sensitivity, self._uncertainty = (
                {n: Triplets(*(_zeros(t) for t in triplets)) for n, triplets in self.layers.items()} for _ in range(2)
            )
        for name, triplets in self.layers.items():
            averages = zip(triplets, self._sensitivity[name], self._uncertainty[name], strict=True)
            for weight, smoothed, uncertain in averages:
                grad = gradient(weight)
                importance = torch.zeros_like(smoothed) if grad is None else (weight * grad).abs().to(smoothed.dtype)
                smoothed.mul_(self.beta1).add_((1 - self.beta1) * importance)
                uncertain.mul_(self.beta2).add_((1 - self.beta2) * importance.sub_(smoothed).abs_())

    def _choose(self, budget: int) -> None:
        scores = self.scores()
        surplus = sum(len(score) for score in scores.values()) - budget
        if surplus < 1:
            self._kept = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
            return
        device = next(iter(scores.values())).device
        threshold = torch.cat([score.to(device) for score in scores.values()]).kthvalue(surplus).values
        self._kept = {name: score > threshold.to(score.device) for name, score in scores.items()}
        self._prune()

    def _prune(self) -> None:
        for name, mask in self._kept.items():
            self.layers[name].E.detach().view(-1).masked_fill_(~mask, 0.0)


_AVERAGES = ("sensitivity", "uncertainty")


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32), requires_grad=False)
