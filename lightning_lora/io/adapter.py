# SPDX-License-Identifier: Apache-2.0
"""Adapter folders in PEFT's layout: `save_adapter` and `load_adapter`.

::

    folder/adapter_config.json         PEFT's LoraConfig: which modules, rank, scale
    folder/adapter_model.safetensors   base_model.model.<name>.lora_A.weight   (r, in)
                                       base_model.model.<name>.lora_B.weight   (out, r)
                                       base_model.model.<name of a saved module>.<its own names>
    folder/lightning_lora.json         ours: version, configuration, fingerprint of the base

where <name> is the module's name inside the transformers model.

Every kind of adapter is one row of `kinds.KINDS`. The folder is written as a whole, read back and compared with the
live model before it appears under its name. Nothing but these three files is ever read, and no pickle.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.bars import Bar, no_bar
from lightning_lora.config import AdapterConfig, AdapterRecord, LoRAConfig
from lightning_lora.errors import AdapterMismatchError, ConfigError, MergeError, Notice, UnsupportedError
from lightning_lora.io.atomic import atomic_folder
from lightning_lora.io.checkpoint_adapter import load_checkpoint_adapter, load_checkpoint_resident
from lightning_lora.io.conversion import compare_use, config_for, repacked
from lightning_lora.io.distributed import is_distributed
from lightning_lora.io.drawn import compare_drawn, drawn_digests
from lightning_lora.io.folder import (
    CONFIG,
    FORMAT,
    PREFIX,
    RECORD,
    WEIGHTS,
    AdapterFolder,
    check_target,
    compare_shapes,
    package_version,
)
from lightning_lora.io.integrity import digests, first_not_finite
from lightning_lora.io.kinds import Place, entries, kind_of, places
from lightning_lora.io.litgpt import convert_litgpt, is_litgpt
from lightning_lora.io.names import (
    adapter_root,
    named_adapters,
    packed_layers,
    unwrap,
)
from lightning_lora.io.peft_config import peft_config
from lightning_lora.io.peft_types import PEFT_TYPES
from lightning_lora.io.portable import check_portable, fitting_cast, portable_contents, update_error
from lightning_lora.io.rank_pattern import kept_ranks, pattern_of, shrunk
from lightning_lora.io.resident import load_resident
from lightning_lora.model.apply import apply_adapters
from lightning_lora.model.inner import inner_model
from lightning_lora.model.residents import refuse_in_fit, rename_adapter, use_adapter
from lightning_lora.model.slots import adapter_modules, adapter_record, is_adapted
from lightning_lora.model.state import check_kind
from lightning_lora.nn.adapter import AdapterModule, torch_dtype
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lowrank import LowRankModule
from lightning_lora.nn.residual import alone
from lightning_lora.nn.sharded import is_sharded, piece

_SCALED = (LoRALinear, LowRankModule)  # whose scale stands in the configuration


@dataclass(frozen=True)
class SavedAdapter:
    """What `save_adapter` wrote.

    Args:
        path: The folder.
        tensors: Number of tensors.
        nbytes: Size of the tensors [bytes].
        delta_error: Largest relative difference, to the live model, of a layer's update or of a tensor of a module
            that is kept in full, as the folder was read back; nan where the live values are not finite. Without a
            cast it is what the measure itself resolves, about 1e-8.
    """

    path: Path
    tensors: int
    nbytes: int
    delta_error: float


def save_adapter(
    model: nn.Module,
    dir: str | os.PathLike[str],
    layout: str = "peft",
    dtype: str | None = None,
    name: str | None = None,
) -> SavedAdapter:
    """Write the adapters of `model` as a folder that PEFT loads over the same base.

    Names are those inside the transformers model, whatever attribute holds it; of the whole module where
    there is none, or where adapters lie outside it. A strength that `set_adapter_scale` set is part of the
    written ``lora_alpha``, in the portable layout of B.

    Args:
        model: A converted model, or a LightningModule around one.
        dir: The folder. An adapter folder that stands there is replaced as a whole, anything else is not.
        layout: "peft", or "portable": scale 1 and one rank, which servers read as PEFT does.
        dtype: "fp32", "bf16" or "fp16" to cast the tensors; as they are if null (fp32 in the portable layout).
        name: Which of the model's adapters; the one in use if null.

    Raises:
        ConfigError: Another layout or dtype, a name that no adapter has, or adapters at a strength of zero or below.
        CheckpointError: The folder holds something that is not of an adapter folder, or is a file.
        UnsupportedError: A choice of modules that PEFT's format cannot express, or something that has no
            portable form, or values that do not fit `dtype`, or tensors that are sharded or on the meta device.
        AdapterMismatchError: The model has no adapters.
        MergeError: What was read back differs from the live model.
    """
    if layout not in ("peft", "portable"):
        raise ConfigError(f'`layout` must be "peft" or "portable", got {layout!r}')
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise ConfigError(f'`dtype` must be "fp32", "bf16", "fp16" or null, got {dtype!r}')
    path = Path(dir).expanduser()
    check_target(path)
    model = unwrap(model)
    if name is None or not is_adapted(model):
        return _save(model, path, layout, dtype)
    with use_adapter(model, name):
        return _save(model, path, layout, dtype)


def _save(model: nn.Module, path: Path, layout: str, dtype: str | None) -> SavedAdapter:
    """The folder of the adapter in use."""
    cast = None if dtype is None else torch_dtype(dtype)
    if layout == "portable":
        config, tensors, own = portable_contents(model, cast)
        record = _record_entry(model, adapter_record(model))
        record |= {
            "layout": layout,
            "config": own.to_dict(),
            "trained": record.get("trained", record["config"]),
            "strength": 1.0,
        }
    else:
        config, tensors = _contents(model, cast)
        record = _record_entry(model, adapter_record(model))
    record |= {"format": FORMAT, "digests": digests(tensors.items()), "finite": first_not_finite(tensors) is None}
    with atomic_folder(path) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        (part / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt", "lightning_lora": package_version()})
        error = check_portable(model, part) if layout == "portable" else _check_written(model, part, dtype is None)
    return SavedAdapter(path, len(tensors), sum(t.nbytes for t in tensors.values()), error)


def load_adapter(
    model: nn.Module,
    dir: str | os.PathLike[str],
    name: str | None = None,
    quantize: str | None = None,
    bar: Bar = no_bar,
) -> None:
    """Load an adapter folder, PEFT's, LitGPT's or ours, or a checkpoint's adapters into `model`, in place.

    A plain model is converted first as the folder's configuration says (a folder of ours may name a
    quantization). In a converted one, without a `name`, the adapter in use takes the folder's values and must be of
    the same shape and scale; with a `name` any adapter of this base waits beside it (`set_adapter` puts it in use),
    or takes the place of the one of that name. Nothing is changed unless all fits. The adapter then computes what
    the one that was saved did: a strength that the folder was saved with is part of its scale, and in the adapter in
    use is set again; modules trained in full hold the mixture that was in use, at strength 1.

    Args:
        model: A transformers model, any module, or a LightningModule around one.
        dir: The folder: of `save_adapter`, of PEFT's ``save_pretrained`` (each adapter has one of its own) or of
            ``litgpt finetune_lora`` (``lit_model.pth.lora`` with its two YAML files); or a checkpoint of a run.
        name: What to call the adapter; that in use (of a plain model "default") if null.
        quantize: How a plain model's base is packed ("none", "nf4", ...); as it was for the training if null.
        bar: Shows how many layers of a plain model are converted.

    Raises:
        CheckpointError: No adapter folder, or one that cannot be read.
        AdapterMismatchError: Keys, shapes or scales do not fit; the nearest names are given.
        BaseMismatchError: The folder names another base than this model.
        UnsupportedError: The folder uses a method that is not built; or a running ``fit`` trains the adapter whose
            place this would take.
    """
    model, path = unwrap(model), Path(dir).expanduser()
    if path.is_file() or is_distributed(path):
        _load_checkpoint(model, path, name, quantize, bar)
        return
    if is_litgpt(path):
        with tempfile.TemporaryDirectory() as converted:
            convert_litgpt(model, path, Path(converted))
            load_adapter(model, converted, name, quantize, bar)
        return
    folder = AdapterFolder.open(dir)
    folder.check_base(model)
    record = adapter_record(model)
    if record is None:
        config = repacked(config_for(model, folder), quantize)
        tensors = folder.checked_tensors()
        apply_adapters(model, config, bar=bar)
        _notice_packing(config, folder)
        if name is not None:
            rename_adapter(model, name)
        compare_drawn(model, folder.record, f"the adapters in {folder.path}")
        _copy(list(places(model)), tensors, {})
        return
    if isinstance(record.config, LoRAConfig) and record.config.takes_from_base:
        raise UnsupportedError(alone(record.config.init_lora_weights))
    _notice_packing(record.config, folder)
    if name is not None and name != record.name:
        load_resident(model, folder, name)
        return
    mine = list(places(model))
    try:
        compare_use(record.config, folder)
        compare_shapes({key: tuple(m.live(own).shape) for key, _, m, own in mine}, folder.shapes(), folder.path)
        strengths = _strengths(mine, folder)
    except AdapterMismatchError:
        if name is None:
            raise
        load_resident(model, folder, name)
        return
    compare_drawn(model, folder.record, f"the adapters in {folder.path}")
    refuse_in_fit(record)
    _copy(mine, folder.checked_tensors(record.verified), strengths)


def _load_checkpoint(model: nn.Module, path: Path, name: str | None, quantize: str | None, bar: Bar) -> None:
    record = adapter_record(model)
    if name is not None and record is not None and name != record.name:
        load_checkpoint_resident(model, path, name)
        return
    if record is not None:
        refuse_in_fit(record)
    try:
        load_checkpoint_adapter(model, path, quantize, bar)
    except AdapterMismatchError:
        if name is None or record is None:
            raise
        load_checkpoint_resident(model, path, name)  # of another rank, scale or choice of modules
        return
    if name is not None and record is None:
        rename_adapter(model, name)


@torch.no_grad()
def _copy(mine: list[Place], tensors: dict[str, Tensor], strengths: Mapping[AdapterModule, float]) -> None:
    """Values into the adapter in use, once all of them are seen to fit."""
    pairs = [(raw, module.live(own), tensors[key]) for key, raw, module, own in mine]
    for raw, live, tensor in pairs:
        check_kind(raw, live, tensor)
    for _, live, tensor in pairs:
        live.copy_(piece(tensor, live))
    if mine:
        mine[0][2].record.new_use()
    for module in dict.fromkeys(place[2] for place in mine):
        strength = strengths.get(module, 1.0)
        if module.strength != strength:
            module.strength = strength


def _contents(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder."""
    config = peft_config(model)
    if adapter_root(model)[0] != inner_model(model)[0]:
        warnings.warn(
            "adapters lie outside the transformers model: the folder's names are those of the whole module, "
            "and PEFT loads it over that",
            Notice,
            stacklevel=3,
        )
    tensors = {}
    for key, raw, tensor in entries(model):
        if is_sharded(tensor) or tensor.is_meta:
            raise UnsupportedError(f"{raw!r} is sharded or on the meta device: adapters are written from whole tensors")
        cast = fitting_cast(raw, tensor, dtype) if dtype is not None and tensor.is_floating_point() else tensor
        tensors[key] = cast.detach().cpu().contiguous().clone()
    if "peft_type" in config and PEFT_TYPES[config["peft_type"]].ranks:
        masks = kept_ranks(tensors)
        config |= {"rank_pattern": pattern_of(masks, PREFIX)}
        tensors = {key: shrunk(key, tensor, masks) for key, tensor in tensors.items()}
    return config, tensors


def _record_entry(model: nn.Module, record: AdapterRecord | None) -> dict[str, Any]:
    """``lightning_lora.json``: what PEFT's file has no place for."""
    inner = adapter_root(model)[0] == inner_model(model)[0]
    config = record.config if record else None
    written = config.converted() if isinstance(config, LoRAConfig) else config
    from_base = written is not config  # what is written is for the base as it was, whatever is left of it here
    return {
        "version": package_version(),
        "layout": "peft",
        "names": "inner" if inner else "module",
        "config": written.stored().to_dict() if written else None,
        **({"trained": config.to_dict()} if config and from_base else {}),
        "fingerprint": record.fingerprint if record else None,
        "strength": next((m.strength for _, m in adapter_modules(model) if isinstance(m, _SCALED)), 1.0),
        "packed": [] if from_base else packed_layers(model),
        "drawn": drawn_digests(model),
        "transposed": [n for n, m in named_adapters(model) if getattr(m, "fan_in_fan_out", False)],
    }


def _check_written(model: nn.Module, part: Path, exact: bool) -> float:
    """Read a folder back as PEFT would and compare it with the live model; the largest relative error."""
    folder = AdapterFolder.open(part)
    tensors = folder.tensors()
    errors = [0.0]
    for key, raw, used in entries(model):
        written, live = tensors[key], folder.without_dropped(key, used)
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) and live.is_floating_point():
            size, difference = live.float().norm().cpu(), (written.float() - live.float().cpu()).norm()
            errors.append(float(difference / size.clamp(min=1e-30)))
        if exact and not _same_bits(written, live.cpu()):
            raise MergeError(f"{raw!r} was read back with other values than were written: is the disk full or broken?")
    for name, module in named_adapters(model):
        if not isinstance(module, _SCALED):
            continue
        scale = folder.scale(folder.sized(name))
        if abs(scale - module.scaling * module.strength) > 1e-9 * abs(scale):
            raise MergeError(f"{name!r}: the written scale {scale} is not the live {module.scaling * module.strength}")
        if not isinstance(module, LoRALinear):
            continue
        A, B = (tensors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        live_A, live_B = (factor.cpu() for factor in module.update_factors())
        live_scale = module.scaling * module.strength
        errors.append(update_error(A, B.double() * scale, live_A, live_B.double() * live_scale))
    return math.nan if any(math.isnan(error) for error in errors) else max(errors)


def _strengths(mine: Iterable[Place], folder: AdapterFolder) -> dict[AdapterModule, float]:
    """The strength at which a converted model's adapters have the folder's scale: 1, or the recorded one.

    Raises:
        AdapterMismatchError: Neither gives that scale.
    """
    recorded = folder.record.get("strength")
    choices = [1.0]
    if isinstance(recorded, int | float) and not folder.config.get("use_dora"):  # whose file has m at that strength
        choices.append(float(recorded))
    found: dict[AdapterModule, float] = {}
    for key, raw, module, own in mine:
        if isinstance(module, _SCALED) and module not in found:
            name = key.removeprefix(PREFIX).removesuffix(f".{kind_of(module, raw).file_name(own)}")
            scale = folder.scale(folder.sized(name))
            fitting = [c for c in choices if abs(scale - module.scaling * c) <= 1e-9 * abs(scale)]
            if not fitting:
                raise AdapterMismatchError(
                    f"{folder.path}: {name!r} is scaled by {scale:.6g} there and by {module.scaling:.6g} in the "
                    "model: convert it with the same `r`, `lora_alpha` and `use_rslora`, or load it under another name"
                )
            found[module] = fitting[0]
    return found


def _notice_packing(config: AdapterConfig, folder: AdapterFolder) -> None:
    """Say when the folder was trained over a base that was packed in another way."""
    trained = (folder.record.get("config") or {}).get("quantize")
    if trained is not None and trained != config.quantize:
        warnings.warn(
            f"the adapter in {folder.path} was trained over a base packed as {trained!r}, this one is "
            f"{config.quantize!r}: its outputs will differ a little",
            Notice,
            stacklevel=3,
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality of every bit: a run that diverged to nan is written as it is."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
