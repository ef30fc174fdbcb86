# SPDX-License-Identifier: Apache-2.0
"""The adapter modules of a model: where they are, in model order, and what conversion recorded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.config import AdapterRecord
from lightning_lora.nn.adapter import AdapterModule


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """The modules of ``model`` in which the adapter in use has a part, by name, in model order."""
    return ((name, module) for name, module in adapter_slots(model) if not module.vacant)


def adapter_slots(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Every adapter module of ``model`` by name, in model order; those too in which only other adapters have a part."""
    found: list[tuple[str, AdapterModule]] = []
    _collect_slots(model, "", set(), found)
    return iter(found)


def adapter_slots_unnamed(model: nn.Module) -> list[AdapterModule]:
    """The modules of `adapter_slots` without their names, which take longer to make than all the rest of a swap."""
    return list(_slots(model))


def first_slot(model: nn.Module) -> AdapterModule | None:
    """Any one of them; None where there is none."""
    return next(_slots(model), None)


def _slots(model: nn.Module) -> Iterator[AdapterModule]:
    seen: set[nn.Module] = {model}
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, AdapterModule):
            yield module
            continue
        for child in module._modules.values():
            if child is not None and child._modules and child not in seen:
                seen.add(child)
                waiting.append(child)


def _collect_slots(module: nn.Module, name: str, seen: set[nn.Module], found: list[tuple[str, AdapterModule]]) -> None:
    """As ``named_modules``, but what lies inside an adapter module is left out: a large model is walked in a moment."""
    seen.add(module)
    if isinstance(module, AdapterModule):
        found.append((name, module))
        return
    for own, child in module._modules.items():
        if child is not None and child not in seen and (child._modules or isinstance(child, AdapterModule)):
            _collect_slots(child, f"{name}.{own}" if name else own, seen, found)


def adapter_record(model: nn.Module) -> AdapterRecord | None:
    """What `apply_lora` recorded, or None for a model without adapters."""
    slot = first_slot(model)
    return None if slot is None else slot.record


def is_adapted(model: nn.Module) -> bool:
    """Whether `apply_lora` has converted ``model`` or a part of it."""
    return adapter_record(model) is not None
