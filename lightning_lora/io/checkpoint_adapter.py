# SPDX-License-Identifier: Apache-2.0
"""Adapters from a run's checkpoint into any model of the same base, whatever attribute held it in the run.

A checkpoint has the names of the LightningModule that was trained (``net.model.layers.0...``). Here the module that
they are loaded into may be the transformers model alone, or hold it under another attribute: the part before the
transformers model's own names is exchanged.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.bars import Bar, no_bar
from lightning_lora.config import AdapterConfig, LoRAConfig, config_from_dict
from lightning_lora.errors import AdapterMismatchError, CheckpointError, ConfigError, Notice
from lightning_lora.io.checkpoint import check_version, cleaned, compare_bases, load_state, naming
from lightning_lora.io.checkpoint_file import KEY
from lightning_lora.io.conversion import fit, repacked
from lightning_lora.io.distributed import read_either
from lightning_lora.io.folder import compare_shapes, near
from lightning_lora.io.integrity import check_finite
from lightning_lora.io.kinds import SAVED, Part, Words, kind_of, row_for
from lightning_lora.io.names import clean, inside, plain_modules
from lightning_lora.io.resident import as_here, say_narrower
from lightning_lora.model.apply import apply_adapters
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.inner import inner_model
from lightning_lora.model.methods import method_of
from lightning_lora.model.plain import plain_view
from lightning_lora.model.residents import add_slots, check_name, keep_adapter, record_of, refuse_beside
from lightning_lora.model.slots import adapter_record, adapter_slots, is_adapted
from lightning_lora.model.targets import Targets
from lightning_lora.nn.adapter import AdapterModule, Held


@dataclass(frozen=True)
class _Ranks:
    """Rank and alpha by the names inside the transformers model, as the run's names gave them."""

    config: AdapterConfig
    prefix: str

    @property
    def r(self) -> int:
        return self.config.rank_for("")

    @property
    def lora_alpha(self) -> float:
        return self.config.alpha_for("")

    def rank(self, name: str) -> int:
        return self.config.rank_for(_joined(self.prefix, name), name)

    def alpha(self, name: str) -> float:
        return self.config.alpha_for(_joined(self.prefix, name), name)


def load_checkpoint_adapter(
    model: nn.Module, path: str | os.PathLike[str], quantize: str | None = None, bar: Bar = no_bar
) -> None:
    """Load the adapters of a checkpoint; a plain model is converted first, as the checkpoint says.

    Args:
        model: A transformers model, any module, or a LightningModule around one.
        path: The checkpoint.
        quantize: How a plain model's base is packed; as the checkpoint says if null.
        bar: Shows how many layers of a plain model are converted.

    Raises:
        CheckpointError: It cannot be read, or holds no adapters of this package.
        AdapterMismatchError: Names, shapes or configuration do not fit; the nearest names are given.
        BaseMismatchError: The adapters were trained on another base.
    """
    checkpoint = _read(path)
    entry = checkpoint[KEY]
    prefix, root = inner_model(model)
    theirs, ours = _prefix([*entry["targets"], *entry["saved"]], plain_modules(root), path), clean(prefix)
    if not is_adapted(model):
        apply_adapters(model, repacked(_config(model, entry, theirs, path), quantize), bar=bar)
    checkpoint = _packed_as_here(model, checkpoint, path)
    if theirs != ours:
        checkpoint = _renamed(checkpoint, theirs, ours, _outside(model))
    load_state(model, checkpoint, strict=True, file=path)


def load_checkpoint_resident(model: nn.Module, path: Path, name: str) -> None:
    """`load_resident` of a checkpoint: its adapters wait under ``name``, those that are there stay as they are.

    Args:
        model: A converted model.
        path: The checkpoint.
        name: What to call the adapter.

    Raises:
        CheckpointError: It cannot be read, or holds no adapters of this package, or NaN.
        AdapterMismatchError: Names or shapes do not fit; the nearest names are given.
        BaseMismatchError: The adapters were trained on another base.
        UnsupportedError: Its modules clash with those of another adapter.
    """
    record = record_of(model)
    check_name(record, name)
    checkpoint = _packed_as_here(model, _read(path), path)
    view = plain_view(model)
    prefix, root = inner_model(view)
    entry = checkpoint[KEY]
    theirs = _prefix([*entry["targets"], *entry["saved"]], plain_modules(root), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # said when the base was converted
        config = as_here(_config(view, entry, theirs, path), record.config)
        refuse_beside(record, config)
        targets = method_of(config).targets(view, dataclasses.replace(config, quantize="none"))
    checkpoint = _renamed(checkpoint, theirs, clean(prefix), _outside(model))
    shapes, entry = _shapes(view, config, targets), checkpoint[KEY]
    state = {key: tensor for key, tensor in checkpoint["state_dict"].items() if isinstance(tensor, Tensor)}
    with naming(path):
        compare_bases(entry.get("fingerprint"), record.fingerprint)
    compare_shapes(shapes, {key: tuple(tensor.shape) for key, tensor in state.items()}, path)
    check_finite(state, path)
    for key in shapes:
        if ".adapter.lora_" in key and not state[key].is_floating_point():
            raise AdapterMismatchError(f"{path}: {key!r} is of {state[key].dtype}, adapters are floats")
    add_slots(model, targets.adapted, targets.saved, config)
    wanted = {*targets.adapted, *targets.saved}
    parts = {
        module.slot: _part(clean(raw), config, state, entry.get("strength") or {}, module)
        for raw, module in adapter_slots(model)
        if raw in wanted
    }
    say_narrower(model, parts, path)
    keep_adapter(model, name, config, parts)


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    checkpoint = read_either(path)
    if not isinstance(checkpoint.get(KEY), Mapping):
        raise CheckpointError(f"{os.fspath(path)!r} holds no adapters of this package")
    entry = checkpoint[KEY]
    with naming(path):
        check_version(entry)
    if not [*(entry.get("targets") or ()), *(entry.get("saved") or ())]:
        raise CheckpointError(f"{os.fspath(path)!r} names no adapted module: it is damaged. Take another checkpoint")
    own = {f"{name}.adapter.lora_A" for name in entry["targets"]}
    own |= {key for name in entry["saved"] for key in checkpoint["state_dict"] if key.startswith(f"{name}.")}
    return {**checkpoint, "state_dict": cleaned(checkpoint["state_dict"], own)}


def _config(model: nn.Module, entry: Mapping[str, Any], theirs: str, path: str | os.PathLike[str]) -> AdapterConfig:
    """The configuration that converts a plain `model` to exactly what the checkpoint holds."""
    try:
        config = config_from_dict(dict(entry["config"]))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}; it may be of a newer version") from error
    prefix, _ = inner_model(model)
    adapted, saved = (
        {inside(name, theirs): _joined(prefix, inside(name, theirs)) for name in entry[key]}
        for key in ("targets", "saved")
    )
    return fit(model, config, _Ranks(config, theirs), adapted, saved)


def _shapes(view: nn.Module, config: AdapterConfig, targets: Targets) -> dict[str, tuple[int, ...]]:
    """What a checkpoint of this configuration holds, over the modules of a plain model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for raw in [*targets.adapted, *targets.saved]:
        plain = view.get_submodule(raw)
        kind = SAVED if raw in targets.saved else row_for(config, plain)
        own = kind.shapes(plain, Part(clean(raw), config.rank_for(clean(raw)), config))
        shapes |= {f"{clean(raw)}.{name}": shape for name, shape in own.items()}
    return shapes


def _part(
    name: str, config: AdapterConfig, state: Mapping[str, Tensor], strength: Mapping[str, float], module: AdapterModule
) -> Held:
    tensors = {own: state[f"{name}.{own}"].clone() for own in module.own_names()}

    def words() -> Words:
        rslora = isinstance(config, LoRAConfig) and config.use_rslora
        return config.rank_for(name), config.alpha_for(name), rslora, config.dropout

    return kind_of(module, name).held(tensors, strength.get(name, 1.0), words)


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
