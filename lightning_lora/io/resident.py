# SPDX-License-Identifier: Apache-2.0
"""From an adapter folder to a resident adapter of a converted model, beside those that it holds already."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lightning_lora.config import AdapterConfig, LoRAConfig
from lightning_lora.errors import Notice
from lightning_lora.io.conversion import config_for
from lightning_lora.io.folder import AdapterFolder
from lightning_lora.io.kinds import Words, kind_of
from lightning_lora.io.names import clean, inside
from lightning_lora.model.methods import method_of
from lightning_lora.model.plain import plain_view
from lightning_lora.model.residents import add_slots, check_name, keep_adapter, record_of, refuse_beside
from lightning_lora.model.slots import adapter_modules, adapter_slots
from lightning_lora.nn.adapter import AdapterModule, Held


def load_resident(model: nn.Module, folder: AdapterFolder, name: str) -> None:
    """Let the adapter of a folder wait under ``name``; or replace the one of that name, in use or not.

    Rank, scale and modules may be others than those of the adapters that are there: modules of its own get a vacant
    adapter module first. Packing and dtypes stay the model's.

    Args:
        model: A converted model.
        folder: What to load.
        name: What to call it.

    Raises:
        AdapterMismatchError: Keys or shapes do not fit the base.
        UnsupportedError: Its modules clash with those of another adapter.
    """
    record = record_of(model)
    check_name(record, name)
    view = plain_view(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # said when the base was converted
        config = as_here(dataclasses.replace(config_for(view, folder), quantize=record.config.quantize), record.config)
        refuse_beside(record, config)
        targets = method_of(config).targets(view, dataclasses.replace(config, quantize="none"))
    prefix, _ = folder.root(view)
    files = folder.checked_tensors(record.verified)
    add_slots(model, targets.adapted, targets.saved, config)
    wanted = {*targets.adapted, *targets.saved}
    parts = {
        module.slot: _part(folder, files, clean(inside(raw, prefix)), module)
        for raw, module in adapter_slots(model)
        if raw in wanted
    }
    say_narrower(model, parts, folder.path)
    keep_adapter(model, name, config, parts)


def _part(folder: AdapterFolder, files: Mapping[str, Tensor], name: str, module: AdapterModule) -> Held:
    kind = kind_of(module, name)
    # What waits is copied: another program may write into a file that is mapped.
    tensors = {own: files[kind.key(name, own)].clone() for own in module.own_names()}

    def words() -> Words:
        config = folder.config
        rslora, dropout = bool(config.get("use_rslora")), float(config.get("lora_dropout") or 0.0)
        return folder.spec.rank(name), folder.spec.alpha(name), rslora, dropout

    return kind.held(tensors, 1.0, words)


def as_here(config: AdapterConfig, own: AdapterConfig) -> AdapterConfig:
    """An adapter's configuration with what is the model's own: dtypes, and whether A learns.

    Args:
        config: Of the adapter that is to come.
        own: Of the adapter in use.
    """
    config = dataclasses.replace(config, compute_dtype=own.compute_dtype, adapter_dtype=own.adapter_dtype)
    if not isinstance(config, LoRAConfig) or not isinstance(own, LoRAConfig):
        return config
    ratio = None if own.freeze_lora_A else config.loraplus_lr_ratio
    return dataclasses.replace(config, freeze_lora_A=own.freeze_lora_A, loraplus_lr_ratio=ratio)


def say_narrower(model: nn.Module, parts: Mapping[int, Held], path: Path) -> None:
    """A notice where the model's adapters have a narrower dtype than the file."""
    slots = {module.slot: module for _, module in adapter_modules(model)}
    for slot, part in parts.items():
        live = slots[slot].held() if slot in slots else None
        for name, tensor in part.tensors.items() if live is not None else ():
            if tensor.dtype.itemsize > live.tensors[name].dtype.itemsize:  # type: ignore[union-attr]
                text = f"the adapter in {path} is {tensor.dtype}, this model holds adapters in "
                warnings.warn(f"{text}{live.tensors[name].dtype}: it is rounded", Notice, stacklevel=4)  # type: ignore[union-attr]
                return
