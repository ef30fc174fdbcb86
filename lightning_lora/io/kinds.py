# SPDX-License-Identifier: Apache-2.0
"""How each kind of adapter stands in a file: one row a kind, and what a model has of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.io.folder import PREFIX
from lightning_lora.io.names import adapter_root, clean, inside
from lightning_lora.model.apply import adapter_modules
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.saved import SavedModule


@dataclass(frozen=True)
class AdapterKind:
    """How one kind of adapter stands in the file: its keys there, by the names of `trained_names` here."""

    module: type[AdapterModule]
    file_name: Callable[[str], str]  # name inside the adapter module -> name in the file
    tensor: Callable[[Any, str], Tensor]  # (module, name inside it) -> the tensor as the live model uses it


def _lora_tensor(module: LoRALinear, name: str) -> Tensor:
    return {"adapter.lora_A": module.lora_A, "adapter.lora_B": module.lora_B}[name].detach()


def _saved_tensor(module: SavedModule, name: str) -> Tensor:
    return module.value(name.removeprefix("trained."), module.strength).detach()


#: One row for every kind; who adds an adapter kind adds its row.
KINDS = (
    AdapterKind(LoRALinear, lambda name: name.removeprefix("adapter.") + ".weight", _lora_tensor),
    AdapterKind(SavedModule, lambda name: name.removeprefix("trained."), _saved_tensor),
)


#: Key in the file, name in the model, module, name inside it.
Place = tuple[str, str, AdapterModule, str]


def places(model: nn.Module) -> Iterator[Place]:
    """Everything that the adapter in use trains."""
    prefix, _ = adapter_root(model)
    for raw, module in adapter_modules(model):
        name = clean(inside(raw, prefix))
        kind = kind_of(module, raw)
        for own in module.trained_names():
            key = ".".join(part for part in (name, kind.file_name(own)) if part)
            yield PREFIX + key, f"{raw}.{own}" if raw else own, module, own


def entries(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(key in the file, name in the model, tensor as the model uses it) of everything that adapters train."""
    for key, raw, module, own in places(model):
        yield key, raw, kind_of(module, raw).tensor(module, own)


def kind_of(module: AdapterModule, raw: str) -> AdapterKind:
    """The row of a module.

    Raises:
        UnsupportedError: It has none.
    """
    kind = next((k for k in KINDS if isinstance(module, k.module)), None)
    if kind is None:
        raise UnsupportedError(f"{raw!r}: a {type(module).__name__} has no place in an adapter file yet")
    return kind
