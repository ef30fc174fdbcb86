# SPDX-License-Identifier: Apache-2.0
"""What adapters train, as tensors by name: what checkpoints keep, and how it is loaded again."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_lora.errors import (
    AdapterMismatchError,
)
from lightning_lora.model.inner import clean_name
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.sharded import piece


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The entries of ``model.state_dict()`` that adapters and ``modules_to_save`` train, wrappers out of their names.

    The tensors are the live ones, detached; the frozen base is never touched.
    """
    return {clean_name(name): tensor.detach() for name, tensor in _trained(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy ``state`` into the adapters of ``model``, in place.

    Args:
        model: A converted model.
        state: As `adapter_state_dict` gives it. Nothing is copied unless everything fits.
        strict: Whether keys that no adapter owns are an error too.

    Raises:
        AdapterMismatchError: A key is missing, unknown, of another shape or of another kind of values; other floats
            are cast.
    """
    own = {clean_name(name): tensor for name, tensor in _trained(model).items()}
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own] if strict else []
    if missing or unknown:
        raise AdapterMismatchError(_key_problem(missing, unknown, own, state))
    for name, tensor in own.items():
        found = state[name]
        if not isinstance(found, Tensor):
            raise AdapterMismatchError(f"{name!r} is a {type(found).__name__} in the file and no tensor")
        if tensor.shape != found.shape:
            raise AdapterMismatchError(
                f"{name!r} is {tuple(found.shape)} in the file and {tuple(tensor.shape)} in the model: "
                "was the adapter trained with another rank or on another base?"
            )
        check_kind(name, tensor, found)
    for restore in _restoring(model, state):
        restore()
    for name, tensor in own.items():
        tensor.copy_(piece(state[name], tensor))
    for record in {id(m.record): m.record for _, m in adapter_modules(model)}.values():
        record.new_use()


def _restoring(model: nn.Module, state: Mapping[str, Tensor]) -> list[Callable[[], None]]:
    """What modules have to do before they get these values; all of them are asked before any does it."""
    actions = []
    for name, module in adapter_modules(model):
        own = {key: f"{name}.{key}" if name else key for key in module.trained_names()}
        actions.append(module.restoring({key: state[clean_name(full)] for key, full in own.items()}))
    return [action for action in actions if action is not None]


def check_kind(name: str, own: Tensor, found: Tensor) -> None:
    """See that floats are loaded into floats and integers into integers.

    Raises:
        AdapterMismatchError: They are not.
    """
    if (own.is_floating_point(), own.is_complex()) != (found.is_floating_point(), found.is_complex()):
        raise AdapterMismatchError(
            f"{name!r} is of {found.dtype} in the file and of {own.dtype} in the model: values of another kind. "
            "Save the adapter again, as floats"
        )


def trained_outside(model: nn.Module) -> list[str]:
    """Names of trainable parameters that no adapter owns: training moves them and no checkpoint holds them."""
    owned = set(map(id, _trained(model).values()))
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned]


def _trained(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in adapter_modules(model):
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        tensors |= {clean_name(own): tensor for own, tensor in tensors.items()}  # inside wrappers of FSDP's
        found.update({f"{name}.{own}" if name else own: tensors[own] for own in module.trained_names()})
    return found


def _key_problem(missing: list[str], unknown: list[str], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    text = "the adapter does not fit the model:"
    if missing:
        near = difflib.get_close_matches(missing[0], list(state), n=1, cutoff=0.6)
        hint = f" (nearest in the file: {near[0]!r})" if near else ""
        text += f" {len(missing)} of {len(own)} tensors are missing, {missing[0]!r} first{hint};"
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(own), n=1, cutoff=0.6)
        hint = f" (nearest in the model: {near[0]!r})" if near else ""
        text += f" {len(unknown)} tensors are unknown to the model, {unknown[0]!r} first{hint};"
    return text + " use the `target_modules` and `modules_to_save` that it was trained with"
