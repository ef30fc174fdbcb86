# SPDX-License-Identifier: Apache-2.0
"""Adapters from a run's checkpoint into any model of the same base, whatever attribute held it in the run.

A checkpoint has the names of the LightningModule that was trained (``net.model.layers.0...``). Here the module that
they are loaded into may be the transformers model alone, or hold it under another attribute: the part before the
transformers model's own names is exchanged.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, CheckpointError, ConfigError, Notice
from lightning_lora.io.checkpoint import load_state
from lightning_lora.io.checkpoint_file import KEY
from lightning_lora.io.conversion import fit
from lightning_lora.io.distributed import read_either
from lightning_lora.io.folder import near
from lightning_lora.io.names import clean, inside, plain_modules
from lightning_lora.model.apply import adapter_record, apply_lora, is_adapted
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.inner import inner_model


@dataclass(frozen=True)
class _Ranks:
    """Rank and alpha by the names inside the transformers model, as the run's names gave them."""

    config: LoRAConfig
    prefix: str

    @property
    def r(self) -> int:
        return self.config.r

    @property
    def lora_alpha(self) -> float:
        return self.config.lora_alpha

    def rank(self, name: str) -> int:
        return self.config.rank_for(_joined(self.prefix, name), name)

    def alpha(self, name: str) -> float:
        return self.config.alpha_for(_joined(self.prefix, name), name)


def load_checkpoint_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the adapters of a checkpoint; a plain model is converted first, as the checkpoint says.

    Args:
        model: A transformers model, any module, or a LightningModule around one.
        path: The checkpoint.

    Raises:
        CheckpointError: It cannot be read, or holds no adapters of this package.
        AdapterMismatchError: Names, shapes or configuration do not fit; the nearest names are given.
        BaseMismatchError: The adapters were trained on another base.
    """
    checkpoint = read_either(path)
    entry = checkpoint.get(KEY)
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{os.fspath(path)!r} holds no adapters of this package")
    prefix, root = inner_model(model)
    names = [*entry["targets"], *entry["saved"]]
    theirs, ours = _prefix(names, plain_modules(root), path), clean(prefix)
    if not is_adapted(model):
        try:
            config = LoRAConfig.from_dict(dict(entry["config"]))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{os.fspath(path)}: {error}; it may be of a newer version") from error
        full = {inside(name, theirs): _joined(prefix, inside(name, theirs)) for name in names}
        adapted = {name: full[name] for name in (inside(n, theirs) for n in entry["targets"])}
        saved = {name: full[name] for name in (inside(n, theirs) for n in entry["saved"])}
        apply_lora(model, fit(model, config, _Ranks(config, theirs), adapted, saved))
    else:
        checkpoint = _packed_as_here(model, checkpoint, path)
    if theirs != ours:
        checkpoint = _renamed(checkpoint, theirs, ours, _outside(model))
    load_state(model, checkpoint, strict=True, file=path)


def _prefix(names: list[str], modules: Mapping[str, nn.Module], path: str | os.PathLike[str]) -> str:
    """What stands before the transformers model's own names in a checkpoint."""
    parts = names[0].split(".")
    for count in range(len(parts)):
        prefix = ".".join(parts[:count])
        if all(name.startswith(f"{prefix}." if prefix else "") and inside(name, prefix) in modules for name in names):
            return prefix
    missing = next((name for name in names if not any(name.endswith(m) for m in modules)), names[0])
    raise AdapterMismatchError(
        f"{os.fspath(path)}: the model has no module for {missing!r}{near(missing, modules)} "
        "Is it the base that it was trained on?"
    )


def _packed_as_here(model: nn.Module, checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Adapters go over to a base that is packed in another way; a run that goes on does not."""
    entry, record = checkpoint[KEY], adapter_record(model)
    trained = entry["config"].get("quantize") if isinstance(entry.get("config"), dict) else None
    if record is None or trained is None or trained == record.config.quantize:
        return checkpoint
    warnings.warn(
        f"the adapters in {os.fspath(path)} were trained over a base packed as {trained!r}, this one is "
        f"{record.config.quantize!r}: its outputs will differ a little",
        Notice,
        stacklevel=4,
    )
    return {**checkpoint, KEY: {**entry, "config": {**entry["config"], "quantize": record.config.quantize}}}


def _renamed(checkpoint: Mapping[str, Any], theirs: str, ours: str, outside: str | None) -> dict[str, Any]:
    def name(text: str) -> str:
        return _joined(ours, inside(text, theirs))

    entry = dict(checkpoint[KEY])
    entry |= {key: [name(text) for text in entry[key]] for key in ("targets", "saved")}
    entry["strength"] = {name(key): value for key, value in (entry.get("strength") or {}).items()}
    if entry.get("fingerprint"):  # what lay beside the transformers model in the run is not asked for here
        entry["fingerprint"] = {**entry["fingerprint"], "outside": outside}
    state = {name(key): tensor for key, tensor in checkpoint["state_dict"].items()}
    return {**checkpoint, "state_dict": state, KEY: entry}


def _outside(model: nn.Module) -> str | None:
    record = adapter_record(model)
    found = record.fingerprint if record is not None else fingerprint(model)
    return None if found is None else found.get("outside")


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
