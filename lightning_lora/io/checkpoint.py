# SPDX-License-Identifier: Apache-2.0
"""Adapter-only checkpoints: what stands in their ``lightning_lora`` entry, and how they are read back.

A checkpoint is Lightning's own, with two differences: ``state_dict`` holds adapters and
``modules_to_save`` only, and `KEY` holds primitives and tensors, so that it loads under torch's
``weights_only=True``:

    version       of this entry
    config        the configuration as a dict (`AdapterConfig.to_dict`)
    targets       names of the adapted layers
    saved         names of the modules trained in full
    fingerprint   of the base before packing, or None
    drawn         digests of what a seed gives again and the file does not hold, where there is such
    strength      what `set_adapter_scale` set, by name; modules at 1 are left out
    rng           one state of the random number generators a process (not in weights-only checkpoints)
    loaders       of several processes: each one's places in its train loaders (the same)
    plateaus      metrics that `ReduceLROnPlateau` schedulers wait for, where some do (the same)
    gradients     each process's, where more are to be accumulated before the next step (the same)
    digests       of every tensor in the file, added and compared by `io.checkpoint_file`; since version 2
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Container, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lora.config import config_from_dict
from lightning_lora.errors import (
    AdapterMismatchError,
    AlreadyAdaptedError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    UnsupportedError,
)
from lightning_lora.io.checkpoint_file import KEY
from lightning_lora.io.distributed import read_either
from lightning_lora.io.drawn import compare_drawn, drawn_digests
from lightning_lora.io.folder import compare_fingerprints
from lightning_lora.io.integrity import check_finite
from lightning_lora.model.apply import apply_adapters
from lightning_lora.model.fingerprint import same_base
from lightning_lora.model.inner import clean_name
from lightning_lora.model.slots import adapter_modules, adapter_record, is_adapted
from lightning_lora.model.state import adapter_state_dict, load_adapter_state
from lightning_lora.nn.saved import SavedModule

VERSION = 2

# Fields that choose modules: two spellings of the same choice are the same.
_CHOOSING_FIELDS = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)

M = TypeVar("M", bound=nn.Module)


def metadata(model: nn.Module) -> dict[str, Any]:
    """The `KEY` entry for ``model``'s checkpoint, without random states.

    Raises:
        CheckpointError: The model has no adapters.
    """
    record = adapter_record(model)
    if record is None:
        raise CheckpointError("the model has no adapters; an adapter-only checkpoint would be empty")
    drawn = drawn_digests(model)
    names = [(clean_name(name), type(module) is SavedModule) for name, module in adapter_modules(model)]
    return {
        "version": VERSION,
        "config": record.config.to_dict(),
        "targets": [name for name, saved in names if not saved],
        "saved": [name for name, saved in names if saved],
        "fingerprint": record.fingerprint,
        **({"drawn": drawn} if drawn else {}),
        "strength": {clean_name(name): m.strength for name, m in adapter_modules(model) if m.strength != 1.0},
    }


def load_state(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    strict: bool = True,
    file: str | os.PathLike[str] = "the checkpoint",
) -> None:
    """Load a checkpoint's adapters into a converted model. Nothing is changed unless all fits.

    Also takes a full checkpoint whose ``state_dict`` holds the adapters among all other tensors.

    Args:
        model: The model.
        checkpoint: What was read.
        strict: Whether tensors that no adapter owns are an error.
        file: Where it was read from, for the texts of errors.

    Raises:
        CheckpointError: The checkpoint holds no adapters, or NaN, or is of a newer version.
        AdapterMismatchError: Configuration, keys, shapes or dtypes differ.
        BaseMismatchError: The adapters were trained on another base.
    """
    with naming(file):
        _load_state(model, checkpoint, strict, file)


def _load_state(model: nn.Module, checkpoint: Mapping[str, Any], strict: bool, file: str | os.PathLike[str]) -> None:
    state = checkpoint["state_dict"]
    entry = checkpoint.get(KEY)
    own = adapter_state_dict(model)
    if entry is None:
        state = {name: tensor for name, tensor in cleaned(state, own).items() if name in own}
        if not state:
            raise CheckpointError(
                "the checkpoint holds no adapters: it is of a run without LoRA. Load its weights into the module "
                "before `fit` instead of passing it as `ckpt_path`"
            )
    else:
        check_metadata(model, entry)
        state = cleaned(state, own)
    fitting = {n: t for n, t in state.items() if n in own and isinstance(t, torch.Tensor) and t.shape == own[n].shape}
    check_finite(fitting, os.fspath(file))  # what does not fit may be of any size, and is refused below
    load_adapter_state(model, state, strict=strict and entry is not None)
    if entry is not None:
        for name, module in adapter_modules(model):
            module.strength = entry.get("strength", {}).get(clean_name(name), 1.0)


def cleaned(state: Mapping[str, Any], own: Container[str]) -> dict[str, Any]:
    """Names without what wrappers put into them, as every name of ours is; DDP's ``module.`` goes where none fits."""
    found = {clean_name(name): tensor for name, tensor in state.items()}
    if any(name in own for name in found):
        return found
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def check_version(entry: Mapping[str, Any]) -> None:
    """See that this package can read a checkpoint's entry.

    Raises:
        CheckpointError: The entry is of a newer version, or of none.
    """
    version = entry.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(
            f"the checkpoint's `{KEY}` entry is of version {version!r}, which no package has written: the file is "
            "damaged or of another program. Take another checkpoint"
        )
    if version > VERSION:
        raise CheckpointError(
            f"the checkpoint's `{KEY}` entry is of version {version}, this package knows {VERSION}: update it"
        )


@contextlib.contextmanager
def naming(file: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before the text of what does not fit."""
    try:
        yield
    except (CheckpointError, AdapterMismatchError, BaseMismatchError) as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{os.fspath(file)}: {error}") from error


def check_metadata(model: nn.Module, entry: Mapping[str, Any]) -> None:
    """See that ``model`` is converted as ``entry`` says, over the same base.

    Raises:
        CheckpointError: The entry is of a newer version, or of none.
        AdapterMismatchError: The configuration differs; the fields are named.
        BaseMismatchError: The fingerprint of the base differs.
    """
    check_version(entry)
    own = metadata(model)
    record = adapter_record(model)
    free: set[str] = set() if record is None else set(record.config.free_fields)
    stored = dict(entry["config"])
    with contextlib.suppress(ConfigError, UnsupportedError, TypeError):  # what is unknown here differs, and is told
        theirs = config_from_dict(stored)
        stored, free = theirs.to_dict(), free & set(theirs.free_fields)  # with what an earlier version had no word for
    differing = {
        name: (value, own["config"].get(name))
        for name, value in stored.items()
        if name not in free and own["config"].get(name) != value
    }
    same_choice = own["targets"] == entry["targets"] and own["saved"] == entry["saved"]
    if not same_choice or any(name not in _CHOOSING_FIELDS for name in differing):
        told = [f"{name}: checkpoint {a!r}, model {b!r}" for name, (a, b) in differing.items()]
        told += [_difference(entry[key], own[key]) for key in ("targets", "saved") if entry[key] != own[key]]
        raise AdapterMismatchError(
            f"the checkpoint was made with another LoRA configuration ({'; '.join(told)}): give `LoRA` "
            "the checkpoint's values"
            + ("; `init_from` takes it over to another packing" * (set(differing) == {"quantize"}))
        )
    compare_drawn(model, entry, "the adapters")
    compare_bases(entry.get("fingerprint"), own["fingerprint"])


def _difference(stored: list[str], own: list[str]) -> str:
    parts = [
        f"{len(names)} layers, {names[0]!r} first, only in the {place}"
        for names, place in (
            ([name for name in stored if name not in own], "checkpoint"),
            ([name for name in own if name not in stored], "model"),
        )
        if names
    ]
    return " and ".join(parts) or "the same layers in another order"


def compare_bases(expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> None:
    """`compare_fingerprints`, and of what lies beside the transformers model: it is in no checkpoint."""
    compare_fingerprints(expected, found)
    if expected and found and same_base(expected, found) and expected.get("outside") != found.get("outside"):
        raise BaseMismatchError(
            "what lies beside the transformers model is not what the adapters were trained with: its frozen layers are "
            "in no checkpoint. Name those that begin at random in `modules_to_save`, or seed them alike"
        )


def load_from_checkpoint(cls: type[M], path: str | os.PathLike[str], **kwargs: Any) -> M:
    """A LightningModule with its adapters from an adapter-only checkpoint.

    The module is built by its class's own ``load_from_checkpoint`` (hyperparameters, ``configure_model``);
    then it is converted as the checkpoint says and the adapters are loaded, strictly.

    Args:
        cls: The LightningModule's class. It must load its base weights itself, as in training.
        path: The checkpoint file.
        kwargs: For ``cls.load_from_checkpoint``: ``map_location``, ``hparams_file`` and hyperparameters.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is broken, or holds no adapters of this package.
        AlreadyAdaptedError: The module carries adapters of another configuration.
        AdapterMismatchError, BaseMismatchError: The adapters do not fit.
    """
    checkpoint = read_either(path)
    if KEY not in checkpoint:
        raise CheckpointError(
            f"{os.fspath(path)!r} holds no adapters of this package; load it with `{cls.__name__}.load_from_checkpoint`"
        )
    # The class's own loader builds the module, from all but the tensors: those are loaded below, strictly.
    without = io.BytesIO()
    torch.save({**checkpoint, "state_dict": {}, "optimizer_states": []}, without)
    without.seek(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found keys that are|The state dict in .* contains no parameters")
        model = cls.load_from_checkpoint(without, strict=False, weights_only=True, **kwargs)  # type: ignore[attr-defined]
    config = config_from_dict(checkpoint[KEY]["config"])
    if not is_adapted(model):
        apply_adapters(model, config)
    elif (record := adapter_record(model)) is not None and record.config != config:
        raise AlreadyAdaptedError(
            f"{cls.__name__} adapts itself with {record.config}, the checkpoint was made with {config}"
        )
    load_state(model, checkpoint, file=path)
    return model
