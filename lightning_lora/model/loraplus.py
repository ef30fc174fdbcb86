# SPDX-License-Identifier: Apache-2.0
"""LoRA+ (Hayou et al. 2024): B learns at a multiple of A's rate, in an optimizer group of its own.

    A, modules_to_save    lr
    B                     lr * loraplus_lr_ratio

A group of the user's that holds both is parted in two with the same settings; the new ones stand behind all others,
so that each old group keeps its number. Schedulers that were made before have values for each group, and get those of
the new ones: rates multiplied, momenta and functions as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lora.config import LoRAConfig, check_ratio
from lightning_lora.errors import ConfigError, OptimizerError, UnsupportedError
from lightning_lora.model.slots import adapter_modules, adapter_record
from lightning_lora.nn.linear import LoRALinear

#: In a group of factors B: what its rates were multiplied by. It travels with the optimizer's state.
RATIO = "loraplus_lr_ratio"

# Entries of a group that are learning rates; the last three are written by schedulers.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
# Attributes of schedulers with a value for each group: learning rates, and others.
_RATE_LISTS = ("base_lrs", "_last_lr", "max_lrs", "min_lrs")
_OTHER_LISTS = ("lr_lambdas", "base_momentums", "max_momentums")


def loraplus_param_groups(model: nn.Module, lr: float, loraplus_lr_ratio: float | None = None) -> list[dict[str, Any]]:
    """The groups of any optimizer over a converted model: B learns at ``lr * loraplus_lr_ratio``, the rest at ``lr``.

    Example::

        optimizer = torch.optim.AdamW(loraplus_param_groups(model, lr=1e-4, loraplus_lr_ratio=16))

    Args:
        model: A converted model.
        lr: The learning rate of A and of what is trained in full.
        loraplus_lr_ratio: That of B as a multiple; what the model's `LoRAConfig` says if null.

    Raises:
        ConfigError: The model has no adapters, or neither place names a ratio, or it is no positive number.
    """
    check_ratio(loraplus_lr_ratio)
    record = adapter_record(model)
    if record is None:
        raise ConfigError("the model has no adapters; call `apply_lora` or `load_adapter` first")
    configured = record.config.loraplus_lr_ratio if isinstance(record.config, LoRAConfig) else None
    ratio = configured if loraplus_lr_ratio is None else loraplus_lr_ratio
    if ratio is None:
        raise ConfigError("`loraplus_lr_ratio` is neither given nor in the model's `LoRAConfig`; try 16")
    _, factors_B = _factors(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in factors_B], "lr": lr},
        {"params": [p for p in trained if id(p) in factors_B], "lr": lr * ratio, RATIO: ratio},
    ]


def part_groups(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], model: nn.Module, ratio: float) -> None:
    """Put the factors B of each group into one with ``ratio`` times its learning rate, and let schedulers follow.

    Groups that `loraplus_param_groups` made, or an earlier call, are left as they are.

    Args:
        optimizers: They hold what ``model`` trains.
        schedulers: Made before, over these optimizers.
        model: The converted model.
        ratio: The learning rate of B as a multiple of A's.

    Raises:
        OptimizerError: A group has no learning rate, holds B without A, or was made for another ratio.
        UnsupportedError: A scheduler seems to keep values for each group in a place that is not known.
    """
    optimizers, schedulers = list(optimizers), list(schedulers)
    factors_A, factors_B = _factors(model)
    parted = [_parted(optimizer, factors_A, factors_B, ratio) for optimizer in optimizers]
    for optimizer, numbers in zip(optimizers, parted, strict=True):
        following = [s for s in schedulers if numbers and s.optimizer is optimizer]
        for scheduler in following:
            _check_known(scheduler, len(optimizer.param_groups))
        for scheduler in following:
            _extend(scheduler, len(optimizer.param_groups), numbers, ratio)
        for number in numbers:
            _part(optimizer, number, factors_B, ratio)


def schedulers_in(result: Any) -> list[Any]:
    """The schedulers in whatever ``configure_optimizers`` may return, with those inside others."""
    found: dict[int, Any] = {id(scheduler): scheduler for scheduler in _schedulers_in(result)}
    return list(found.values())


def check_same_ratio(stored: Sequence[Mapping[str, Any]], optimizer: Optimizer) -> None:
    """See that an optimizer gets the state of one whose factors B learned at the same multiple of A's rate.

    Args:
        stored: The groups of a stored state.
        optimizer: The one that will get it, and with it the stored learning rates.

    Raises:
        OptimizerError: It was another.
    """
    before = sorted({group[RATIO] for group in stored if RATIO in group})
    now = sorted({group[RATIO] for group in optimizer.param_groups if RATIO in group})
    if before != now:
        there, here = (", ".join(map(str, ratios)) or "null" for ratios in (before, now))
        raise OptimizerError(
            f"the checkpoint's optimizer was made with `loraplus_lr_ratio` {there}, this run's with {here}: resume "
            "with the same, or start anew from its weights with `init_from`"
        )


def _factors(model: nn.Module) -> tuple[set[int], set[int]]:
    layers = [module for _, module in adapter_modules(model) if isinstance(module, LoRALinear)]
    return {id(layer.lora_A) for layer in layers}, {id(layer.lora_B) for layer in layers}


def _parted(optimizer: Optimizer, factors_A: set[int], factors_B: set[int], ratio: float) -> list[int]:
    """The numbers of the groups to part."""
    numbers, kind = [], type(optimizer).__name__
    for number, group in enumerate(optimizer.param_groups):
        held = set(map(id, group["params"]))
        if group.get(RATIO, ratio) != ratio:
            raise OptimizerError(
                f"the groups of {kind} were made for `loraplus_lr_ratio` {group[RATIO]}, the configuration says "
                f"{ratio}: give both the same"
            )
        if RATIO in group or not held & factors_B:
            continue
        if not held & factors_A:
            raise OptimizerError(
                f"group {number} of {kind} holds factors B without their A, at a learning rate of its own: put both "
                "into one group, or leave `loraplus_lr_ratio` out"
            )
        if not isinstance(group.get("lr"), int | float | Tensor):
            raise OptimizerError(
                f"group {number} of {kind} has `lr` {group.get('lr')!r}, which `loraplus_lr_ratio` cannot multiply: "
                "give the optimizer a learning rate, or leave the ratio out"
            )
        numbers.append(number)
    return numbers


def _part(optimizer: Optimizer, number: int, factors_B: Collection[int], ratio: float) -> None:
    group = optimizer.param_groups[number]
    names = group.get("param_names", [None] * len(group["params"]))
    pairs = list(zip(names, group["params"], strict=True))
    kept = [pair for pair in pairs if id(pair[1]) not in factors_B]
    moved = [pair for pair in pairs if id(pair[1]) in factors_B]
    own = {k: copy.deepcopy(v) for k, v in group.items() if k not in ("params", "param_names")}
    own |= {name: own[name] * ratio for name in _RATES if isinstance(own.get(name), int | float | Tensor)}
    if "name" in own:  # Lightning's LearningRateMonitor wants each name once
        own["name"] = f"{own['name']}_lora_B"
    group["params"] = [p for _, p in kept]
    if "param_names" in group:
        group["param_names"] = [name for name, _ in kept]
    new = moved if "param_names" in group else [p for _, p in moved]
    optimizer.add_param_group({"params": new, **own, RATIO: ratio})


def _schedulers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _schedulers_in(item)
    elif isinstance(value, LRScheduler) or isinstance(getattr(value, "optimizer", None), Optimizer):
        yield value
        for inner in vars(value).values():
            if isinstance(inner, LRScheduler) or (isinstance(inner, list | tuple) and _is_of_schedulers(inner)):
                yield from _schedulers_in(inner)


def _is_of_schedulers(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, LRScheduler) for value in values)


def _check_known(scheduler: Any, groups: int) -> None:
    """Torch's own are known; of others an attribute with as many entries as there are groups may be one of groups."""
    if type(scheduler).__module__.startswith("torch.optim."):
        return
    for name, values in vars(scheduler).items():
        if name in (*_RATE_LISTS, *_OTHER_LISTS) or not isinstance(values, list | tuple):
            continue
        if len(values) == groups and not _is_of_schedulers(values):
            raise UnsupportedError(
                f"`{type(scheduler).__name__}.{name}` may have a value for each of the optimizer's groups ({groups}), "
                "which `loraplus_lr_ratio` would part: make the optimizer over `loraplus_param_groups(self, lr)` in "
                "`configure_optimizers`, before the scheduler"
            )


def _extend(scheduler: Any, groups: int, numbers: list[int], ratio: float) -> None:
    for name in (*_RATE_LISTS, *_OTHER_LISTS):
        values = vars(scheduler).get(name)
        if isinstance(values, list) and len(values) == groups:
            added = [values[number] for number in numbers]
            setattr(scheduler, name, values + ([v * ratio for v in added] if name in _RATE_LISTS else added))
