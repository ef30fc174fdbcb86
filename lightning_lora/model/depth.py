# SPDX-License-Identifier: Apache-2.0
"""How deep in the model each adapter sits, from 0 (the first block) to 1 (the last)."""

from __future__ import annotations

from torch import nn

from lightning_lora.model.slots import adapter_modules


def adapter_depths(model: nn.Module) -> dict[str, float]:
    r"""Depth of each adapter module by name.

    In block i of a list of L blocks it is :math:`i / (L - 1)`; encoder and decoder count each for itself, and a list
    inside a block (experts) counts as its block. What comes before the first block has depth 0, what comes after, 1. In
    a model without a list of blocks the adapters themselves are counted.

    Args:
        model: a model with adapters.
    """
    names = [name for name, _ in adapter_modules(model)]
    blocks = {name: place for name in names if (place := _place(model, name)) is not None}
    if not blocks:
        return {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
    first = names.index(next(iter(blocks)))
    return {name: blocks.get(name, 0.0 if i < first else 1.0) for i, name in enumerate(names)}


def _place(model: nn.Module, name: str) -> float | None:
    """Depth in the outermost list of two blocks or more; None outside of any."""
    module = model
    for part in name.split("."):
        if isinstance(module, nn.ModuleList | nn.Sequential) and part.isdigit() and len(module) > 1:
            return int(part) / (len(module) - 1)
        module = getattr(module, part)
    return None
