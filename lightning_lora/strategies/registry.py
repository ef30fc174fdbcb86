# SPDX-License-Identifier: Apache-2.0
"""The strategies' names, and the same behaviour for a strategy of the user's own."""

from __future__ import annotations

import warnings

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.nn import Module

from lightning_lora.errors import Notice, UnsupportedError
from lightning_lora.strategies.ddp import AdapterDDPStrategy, ReplicatedBaseMixin
from lightning_lora.strategies.deepspeed import AdapterDeepSpeedStrategy, DeepSpeedStateMixin
from lightning_lora.strategies.fsdp import AdapterFSDPStrategy, FSDPStateMixin
from lightning_lora.strategies.model_parallel import AdapterModelParallelStrategy, ModelParallelStateMixin
from lightning_lora.strategies.single_device import AdapterSingleDeviceStrategy
from lightning_lora.strategies.state import AdapterStateMixin

STRATEGIES = (
    AdapterSingleDeviceStrategy,
    AdapterDDPStrategy,
    AdapterDeepSpeedStrategy,
    AdapterFSDPStrategy,
    AdapterModelParallelStrategy,
)

# What gives a user's own strategy of a kind the behaviour.
_MIXINS: tuple[tuple[type, type[AdapterStateMixin]], ...] = (
    (SingleDeviceStrategy, AdapterStateMixin),
    (DeepSpeedStrategy, DeepSpeedStateMixin),  # a DDPStrategy by inheritance
    (DDPStrategy, ReplicatedBaseMixin),
    (FSDPStrategy, FSDPStateMixin),
    (ModelParallelStrategy, ModelParallelStateMixin),
)


def register_strategies() -> None:
    """Make ``strategy="lora"``, ``"lora_ddp"`` ... known to the Trainer. Calling it again does nothing."""
    for strategy in STRATEGIES:
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(
                strategy.strategy_name, strategy, description=(strategy.__doc__ or "").split("\n")[0]
            )


def attach(strategy: Strategy) -> None:
    """Give a strategy of the user's the behaviour of `AdapterStateMixin`, in place.

    A strategy of an unknown kind is left as it is, with a notice.

    Raises:
        UnsupportedError: The strategy launches by ``spawn`` or ``fork``: the adapters would not come back from
            the processes it starts. Or its class begins with a base that is no strategy, and cannot be changed.
    """
    kind = type(strategy)
    if getattr(strategy.launcher, "_start_method", None) is not None:  # no public way to tell the launchers apart
        raise UnsupportedError(
            f"`strategy={kind.__name__}` starts its processes by spawn or fork: the trained adapters would be lost "
            'with them. Use `strategy="ddp"`'
        )
    if isinstance(strategy, AdapterStateMixin):
        return
    mixin = next((mixin for base, mixin in _MIXINS if isinstance(strategy, base)), None)
    if mixin is None:
        known = ", ".join(f"`{base.__name__}`" for base, _ in _MIXINS)
        warnings.warn(
            f"`{kind.__name__}` is a strategy that `LoRA` does not know: adapters are trained, and its checkpoints are "
            "its own, with the whole model in them; their place in an epoch and random states are not kept. Use a "
            f"strategy made of one of {known}, or put `AdapterStateMixin` before its class",
            Notice,
            stacklevel=2,
        )
        return
    try:
        strategy.__class__ = type(f"Adapter{kind.__name__}", (mixin, kind), {})
    except TypeError as error:  # Python compares the first bases
        raise UnsupportedError(
            f"`{kind.__name__}` begins with `{kind.__bases__[0].__name__}`, which is no strategy, so that it cannot be "
            f"given what keeps checkpoints to adapters: write `class {kind.__name__}({mixin.__name__}, ...)`, from "
            f"`{mixin.__module__}`"
        ) from error


def whole_module(trainer: Trainer, base: bool = False) -> Module | None:
    """The Trainer's module, unsharded, on the first process and None on the others; every process calls it.

    Args:
        trainer: Any Trainer.
        base: Whether the frozen base is wanted too, where the module is spread over processes.
    """
    if isinstance(trainer.strategy, AdapterStateMixin):
        return trainer.strategy.whole_module(base)
    return trainer.lightning_module if trainer.is_global_zero else None
