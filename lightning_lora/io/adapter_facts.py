# SPDX-License-Identifier: Apache-2.0
"""`adapter_facts`: what an adapter folder or a checkpoint holds, from the file alone; no model is built."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig, config_from_dict, scaling
from lightning_lora.errors import AdapterMismatchError, CheckpointError
from lightning_lora.io.checkpoint import check_version
from lightning_lora.io.checkpoint_file import KEY
from lightning_lora.io.distributed import is_distributed, read_either
from lightning_lora.io.folder import PREFIX, AdapterFolder
from lightning_lora.io.names import clean
from lightning_lora.io.tensor_files import TensorFolder
from lightning_lora.model.spectrum import Spectrum, singular_values

#: In the keys of what an adapter has of its own beside LoRA's pairs.
_OWN = re.compile(
    r"(^|\.)((lora|ia3|vera)_|bottleneck\.|token_adapter\.|ln_tuning_layers\.)|^prompt_embeddings$|base_model\.vera_"
)

#: In the name of a low-rank module: the output projection of torch's attention, which is adapted as a whole.
_OUT = ":out_proj"
#: How keys of A and B end, and what stands there in the module's name; in folders, checkpoints, and of starts in these.
_FOLDER = {".base_layer.out_proj.lora_{}.weight": _OUT, ".lora_{}.weight": "", ".lora_embedding_{}": ""}
_CHECKPOINT = {".adapter.out_proj_lora_{}": _OUT, ".adapter.lora_{}": ""}
_STARTS = {".adapter.start_{}": ""}


@dataclass(frozen=True)
class AdapterFacts:
    """What a file says of its adapter.

    Args:
        checkpoint: Whether it is a run's checkpoint, not a folder.
        config: the configuration as far as it is known, and of a folder PEFT's configuration before it, in primitives.
        fingerprint: Of the base; None where the file has none.
        step: Optimizer steps taken; None for a folder.
        modules: The spectrum of each low-rank module, by name.
        saved: Names of what was trained in full.
        parameters: How many parameters the file holds.
        title: What the method is called.
    """

    checkpoint: bool
    config: dict[str, Any]
    fingerprint: dict[str, Any] | None
    step: int | None
    modules: dict[str, Spectrum]
    saved: list[str]
    parameters: int
    title: str = LoRAConfig.title


def adapter_facts(path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None) -> AdapterFacts:
    """Read an adapter.

    Args:
        path: Adapter folder or checkpoint.
        base: Folder of the base model; with it the norms of its weights are known.

    Raises:
        CheckpointError: It cannot be read, or holds no adapters of this package.
        UnsupportedError: The folder uses a method that is not built.
    """
    place = Path(path).expanduser()
    if place.is_file() or is_distributed(place):
        return _of_checkpoint(place, base)
    folder = AdapterFolder.open(place)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in folder.checked_tensors().items()}
    pairs, rest = _pairs(tensors, _FOLDER)
    pairs = _products(pairs, folder.config.get("target_parameters"))
    scales = {name: folder.scale(_adapted(name)) * _times(name) for name in pairs}
    return AdapterFacts(
        False,
        {**(folder.record.get("config") or {}), **folder.config},
        folder.record.get("fingerprint"),
        None,
        _spectra({name: pairs[name] for name in sorted(pairs, key=_order)}, scales, base),
        list(dict.fromkeys(key.rpartition(".")[0] for key in rest if not _OWN.search(key))),
        folder.parameters,
        folder.kind.config.title,
    )


def _of_checkpoint(path: Path, base: str | os.PathLike[str] | None) -> AdapterFacts:
    checkpoint = read_either(path, optimizers=False)
    entry = checkpoint.get(KEY)
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{path} holds no adapters of this package")
    check_version(entry)
    config, strength = config_from_dict(entry["config"]), entry.get("strength") or {}
    state = {clean(key): tensor for key, tensor in checkpoint["state_dict"].items() if isinstance(tensor, Tensor)}
    wanted = {key: t for key, t in state.items() if key.startswith(tuple(f"{n}." for n in entry["targets"]))}
    pairs: dict[str, dict[str, Tensor]] = {}
    if isinstance(config, LoRAConfig):
        pairs = _products(_pairs(wanted, _CHECKPOINT)[0], config.target_parameters)
    for name, start in _pairs(wanted, _STARTS)[0].items():  # the update of the base as it was
        A, B = pairs[name]["A"], pairs[name]["B"]
        pairs[name] = {"A": torch.cat([A, start["A"].to(A)]), "B": torch.cat([B, -start["B"].to(B)], dim=1)}
    scales = {}
    for name in pairs:
        # A pattern's key is for the name inside the transformers model, whose place in the run the file does not tell.
        parts = _adapted(name).split(".")
        names = [".".join(parts[i:]) for i in range(len(parts))]
        alpha, rank = config.alpha_for(*names), config.rank_for(*names)
        rslora = isinstance(config, LoRAConfig) and config.use_rslora
        scales[name] = scaling(rank, alpha, rslora) * strength.get(_adapted(name), 1.0) * _times(name)
    saved = [key for key in state if key.startswith(tuple(f"{name}." for name in entry["saved"]))]
    return AdapterFacts(
        True,
        config.to_dict(),
        entry.get("fingerprint"),
        checkpoint.get("global_step"),
        _spectra(pairs, scales, base),
        list(entry["saved"]),
        sum(tensor.numel() for key, tensor in state.items() if key in wanted or key in saved),
        config.title,
    )


def _order(name: str) -> list[tuple[int, int | str]]:
    """Layer 10 comes after layer 9; files are in the order of letters."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in name.split(".")]


def _pairs(tensors: Mapping[str, Tensor], endings: Mapping[str, str]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """A and B of each low-rank module, and the keys of everything else.

    Args:
        tensors: By key.
        endings: Of the keys of A and B, and what stands in their place in the module's name.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    rest = []
    for key, tensor in tensors.items():
        for ending, place in endings.items():
            factor = next((x for x in "AB" if key.endswith(ending.format(x))), None)
            if factor is not None:
                pairs.setdefault(key.removesuffix(ending.format(factor)) + place, {})[factor] = tensor
                break
        else:
            rest.append(key)
    halves = [name for name, factors in pairs.items() if len(factors) < 2]
    if halves:
        raise AdapterMismatchError(f"{halves[0]!r} has one of its two factors only: save the adapter again")
    return pairs, rest


def _products(
    pairs: Mapping[str, Mapping[str, Tensor]], target_parameters: Iterable[str] | None
) -> dict[str, dict[str, Tensor]]:
    """Those pairs, as matrices, whose one product is the update: not of experts, nor of convolutions in groups."""
    experts = {path.rpartition(".")[0] for path in target_parameters or ()}
    found = {}
    for name, factors in pairs.items():
        A, B = factors["A"].flatten(1), factors["B"].flatten(1)
        plain = name.replace(".base_layer", "")
        mixture = any(f".{plain}".endswith(f".{path}") for path in experts)
        if A.shape[0] == B.shape[1] and not mixture:
            found[name] = {"A": A, "B": B}
    return found


def _adapted(name: str) -> str:
    """The name of the module that was adapted: that of an output projection is one of attention's."""
    return name.removesuffix(_OUT)


def _times(name: str) -> int:
    """How often the update is added: PEFT's twice, and so ours, in the output projection of torch's attention."""
    return 2 if name.endswith(_OUT) else 1


def _spectra(
    pairs: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float], base: str | os.PathLike[str] | None
) -> dict[str, Spectrum]:
    norms = {} if base is None else _norms(Path(base).expanduser(), pairs)
    found = {}
    for name, factors in pairs.items():
        values = singular_values(factors["A"], factors["B"], scales[name])
        found[name.replace(_OUT, ".out_proj")] = Spectrum(len(factors["A"]), values, norms.get(name, float("nan")))
    return found


def _norms(base: Path, names: Iterable[str]) -> dict[str, float]:
    """Frobenius norms of the base's weights, one tensor in memory at a time; what has no place there is left out."""
    found = {}
    with TensorFolder(base) as source:
        for name in names:
            parts = f"{name}.weight".split(".")
            key = next((k for i in range(len(parts)) if (k := ".".join(parts[i:])) in source.entries), None)
            if key is not None and len(source.entries[key].shape) == 2:
                found[name] = float(torch.linalg.vector_norm(source.tensor(key), dtype=torch.float32))
    return found
