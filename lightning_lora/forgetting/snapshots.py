# SPDX-License-Identifier: Apache-2.0
"""Snapshots: the adapters of earlier looks on the CPU, few of many, to go back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.model.state import adapter_state_dict, load_adapter_state
from lightning_lora.nn.sharded import whole

#: How many snapshots are kept, each as large as the adapters.
KEPT = 5


class Snapshots:
    """Keeps the adapters of the first look, of the newest, and of some between, dense towards the newest.

    An alarm comes some looks after the drop has begun, few or many. When there are too many snapshots the one goes
    whose neighbours lie closest together for their age, so that what is kept reaches back in growing strides::

        steps taken   0 . . . . . . . . . . . . . . . 160
        kept          0               80      120   160

    Sharded adapters are kept whole: every rank takes part in every method.

    Args:
        most: how many to keep, 3 or more.
    """

    def __init__(self, most: int = KEPT) -> None:
        self.most = most
        self._taken: dict[int, dict[str, Tensor]] = {}

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of the snapshots, ascending."""
        return sorted(self._taken)

    def take(self, model: nn.Module, step: int) -> None:
        """Keep the adapters as they are.

        Args:
            model: the model.
            step: optimizer steps taken.
        """
        state = adapter_state_dict(model)
        self._taken[step] = {name: whole(tensor).detach().to("cpu", copy=True) for name, tensor in state.items()}
        if len(self._taken) > self.most:
            steps = self.steps
            between = zip(steps, steps[1:], steps[2:], strict=False)
            del self._taken[min(between, key=lambda three: (three[2] - three[0]) / (step - three[0]))[1]]

    def put_back(self, model: nn.Module, step: int) -> None:
        """Give the model the adapters of a snapshot, in place.

        Args:
            model: the model.
            step: one of `steps`.
        """
        load_adapter_state(model, self._taken[step])

    def state_dict(self) -> dict[str, Any]:
        """The snapshots, as primitives and tensors."""
        return {"steps": self.steps, "adapters": [self._taken[step] for step in self.steps]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the snapshots of `state_dict`."""
        self._taken = dict(zip(state["steps"], state["adapters"], strict=True))
