# SPDX-License-Identifier: Apache-2.0
"""`inner_model`: the transformers model inside a LightningModule, whose names adapter files use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

# What wrappers put into parameter names: torch.compile, FSDP 1, activation checkpointing.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def is_hf_model(module: nn.Module) -> bool:
    """Whether ``module`` is a model of transformers (which is not imported for the question)."""
    utils = sys.modules.get("transformers.modeling_utils")
    return utils is not None and isinstance(module, utils.PreTrainedModel)


def hf_models(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost transformers models inside ``module``, itself included, by name."""
    if "transformers.modeling_utils" not in sys.modules:
        return []
    return list(_outermost_hf(module, "", set()))


def _outermost_hf(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    if is_hf_model(module):
        yield name, module
        return
    for own, child in module.named_children():
        yield from _outermost_hf(child, f"{name}.{own}" if name else own, seen)


def inner_model(module: nn.Module) -> tuple[str, nn.Module]:
    """The one transformers model inside ``module`` and its name; ``("", module)`` with none or several."""
    found = hf_models(module)
    return found[0] if len(found) == 1 else ("", module)


def names_of(name: str, prefix: str) -> tuple[str, ...]:
    """A module's name in full and, where it lies in the model called ``prefix``, inside that."""
    inside = prefix and name.startswith(f"{prefix}.")
    return (name, name[len(prefix) + 1 :]) if inside else (name,)


def outermost(names: Iterable[str]) -> list[str]:
    """``names`` without those below another one."""
    names = list(names)
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]


def clean_name(name: str) -> str:
    """``name`` without what `torch.compile`, FSDP and checkpoint wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, ``module`` is in evaluation mode; after, each of its modules is in the mode it had, on exceptions too."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for child, mode in modes:
            child.training = mode
