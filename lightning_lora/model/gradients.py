# SPDX-License-Identifier: Apache-2.0
"""`GradientCheck`: sees in the first optimizer steps whether the adapters learn at all.

With B = 0 the gradient of A is zero at the first step and that of B is not: looked at is what each kind of adapter
names as `watched`.
Steps are counted by layer, since several optimizers may share the adapters out and take turns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from lightning_lora.errors import GradientError, Notice
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.sharded import whole, whole_shape

PATIENCE = 5
PATROL = 100

_CAUSES = (
    "Causes seen: reentrant activation checkpointing whose input needs no gradient "
    "(use `gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})`); "
    "an output that was detached or computed under `no_grad`"
)


class GradientCheck:
    """Watches which adapted layers are called in training, and judges their gradients before a step.

    Args:
        model: The converted model; hooks stay on it until every layer has been called, `PATROL` steps at most.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: m for name, m in adapter_modules(model) if m.watched()}
        self._called: set[str] = set()
        self._hooks = [
            layer.register_forward_pre_hook(partial(self._note, name)) for name, layer in self._layers.items()
        ]
        self._steps = dict.fromkeys(self._layers, 0)
        self._zero = dict.fromkeys(self._layers, 0)
        self._non_finite = 0
        self._checks = 0
        self._told: set[str] = set()

    @property
    def done(self) -> bool:
        """Whether enough steps of every layer were seen, from its first call on."""
        called = all(self._steps[name] >= PATIENCE for name in self._called)
        return called and (len(self._called) == len(self._layers) or self._checks >= PATROL)

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def check(
        self,
        parameters: Collection[int],
        gradient: Callable[[nn.Parameter], Tensor | None] = attrgetter("grad"),
    ) -> None:
        """Judge the gradients that an optimizer is about to use.

        Args:
            parameters: The ids of the optimizer's parameters.
            gradient: Gives a parameter's gradient, where the parameter does not hold it itself.

        Raises:
            GradientError: A layer was called and what it watches has no gradient, or a zero one for `PATIENCE` steps.
        """
        layers = {
            name: own
            for name, m in self._layers.items()
            if (own := [p for p in m.watched() if id(p) in parameters and whole_shape(p).numel()])
        }
        grads = {
            name: found
            for name, own in layers.items()
            if (found := [grad for p in own if (grad := gradient(p)) is not None])
        }
        if not layers:
            return
        zero, finite = _judge(grads)
        if not finite:
            self._count_non_finite()
            return  # a loss scaler skips this step: it is not taken
        self._non_finite = 0
        self._checks += 1
        called = [name for name in layers if name in self._called]
        first = [name for name in called if self._steps[name] == 0]
        for name in called:
            self._steps[name] += 1
            self._zero[name] = self._zero[name] + 1 if name in zero else 0
        if len(self._called) == len(self._layers) or self._checks >= PATROL:
            self.close()
        self._check_none([name for name in first if name not in grads])
        self._say_never_called([n for n in layers if n not in self._called and n not in self._told])
        self._told.update(layers)
        self._say_zero([name for name in first if self._zero[name]])
        self._check_zero([name for name in called if self._zero[name] == self._steps[name] == PATIENCE])

    def _note(self, name: str, module: nn.Module, args: object) -> None:
        # Modules may be left in evaluation mode (`from_pretrained` does); reentrant checkpoints run without gradient.
        if module.training or torch.is_grad_enabled():
            self._called.add(name)

    def _check_none(self, names: list[str]) -> None:
        if names:
            raise GradientError(
                f"{len(names)} adapted layers were called but got no gradient at the first optimizer step, "
                f"{names[0]!r} first. {_CAUSES}; an optimizer step before any backward. Layers that the model computes "
                "without gradient by design (an indexer that picks tokens, say) belong into `exclude_modules`"
            )

    def _say_never_called(self, names: list[str]) -> None:
        if names:
            warnings.warn(
                f"{len(names)} adapted layers were not called before the first optimizer step, {names[0]!r} first: "
                "unrouted experts, an unused branch, or a model whose kernel reads `.weight` directly and so passes "
                "the adapter by; name them in `exclude_modules` if that is lasting",
                Notice,
                stacklevel=3,
            )

    def _say_zero(self, names: list[str]) -> None:
        if names:
            warnings.warn(
                f"{len(names)} adapted layers have an all-zero gradient at the first step, {names[0]!r} first; a "
                f"zero-initialised head behind them does it. It is an error if it lasts {PATIENCE} steps",
                Notice,
                stacklevel=3,
            )

    def _check_zero(self, names: list[str]) -> None:
        if names:
            raise GradientError(
                f"{len(names)} adapted layers had an all-zero gradient for {PATIENCE} steps, {names[0]!r} first: "
                "what comes behind them is zero or not connected to the loss; name them in `exclude_modules` or "
                "train what follows them (`modules_to_save`)"
            )

    def _count_non_finite(self) -> None:
        self._non_finite += 1
        if self._non_finite == PATIENCE:
            warnings.warn(
                f"the gradients of the adapters were not finite for {PATIENCE} steps running: lower the learning "
                "rate, or train in bf16 instead of fp16",
                Notice,
                stacklevel=3,
            )


def check_loss(loss: Tensor) -> None:
    """See that a backward from ``loss`` reaches something.

    Raises:
        GradientError: The loss needs no gradient: neither adapters nor ``modules_to_save`` led to it.
    """
    if not loss.requires_grad:
        raise GradientError(f"the loss does not depend on anything that is trained. {_CAUSES}; no adapted layer in use")


def _judge(grads: dict[str, list[Tensor]]) -> tuple[set[str], bool]:
    """Names whose gradient is all zero, and whether all are finite; one transfer from the device."""
    if not grads:
        return set(), True
    largest = torch.stack([whole(g.detach().abs().amax()).float().cpu() for own in grads.values() for g in own])
    owners = [name for name, own in grads.items() for _ in own]
    moved = {name for name, value in zip(owners, largest.tolist(), strict=True) if value != 0.0}
    return set(grads) - moved, bool(torch.isfinite(largest).all())
