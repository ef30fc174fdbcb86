# SPDX-License-Identifier: Apache-2.0
"""`MergePlan`: which tensors of a base folder an adapter folder changes, adds, or wants packed, from headers alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, MergeError, UnsupportedError
from lightning_lora.io.folder import PREFIX, AdapterFolder
from lightning_lora.io.kinds import AdapterKind, linear_row
from lightning_lora.io.names import parents
from lightning_lora.io.skeleton import file_keys, skeleton
from lightning_lora.io.tensor_files import TensorFolder
from lightning_lora.io.tied import output_ends, says_tied


@dataclass
class Change:
    """What happens to one tensor of the base, or a tensor that is added to it.

    Args:
        source: Key in the base that the values come from; None for one that only the adapter has.
        lora: Name of the adapted module.
        saved: Key in the adapter folder of a tensor that was trained in full.
        packed: How training packed it: quantization type and the dtype that it was packed from.
    """

    source: str | None
    lora: str | None = None
    saved: str | None = None
    packed: tuple[str, torch.dtype] | None = None


class MergePlan:
    """What a merge does to each tensor that it does not just copy.

    Args:
        base: The base's tensors.
        adapter: The adapter folder.
        factors: Its tensors.
        config: The base's ``config.json``.

    Raises:
        CheckpointError: The adapter folder is incomplete.
        MergeError: It does not fit the base.
        UnsupportedError: It is of another method than LoRA, or tied embeddings were trained and cannot be
            written apart.
    """

    def __init__(
        self, base: TensorFolder, adapter: AdapterFolder, factors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> None:
        self.base, self.adapter, self.factors, self.config = base, adapter, factors, config
        self.changes: dict[str, Change] = {}  # by key of the merged model
        if adapter.kind.config is not LoRAConfig:
            way = "load it over the base and merge in memory with `merge_adapters`, or use `MergeOnFitEnd`"
            if not adapter.kind.config.mergeable:
                way = "it has no merged form; keep it apart from the base, and load both"
            raise UnsupportedError(f"{adapter.path}: {adapter.kind.config.title} is not merged on disk: {way}")
        _refuse_other_targets(adapter, factors)
        self.kind = linear_row(bool(adapter.config.get("use_dora")))  # of what is folded in
        self.untied = False
        self._plan_adapters()
        self._plan_packed()

    def _plan_adapters(self) -> None:
        """One change for every tensor of the adapter folder."""
        loras, saved = _split(self.factors, self.adapter.path, self.kind)
        keys = {name: f"{name}.weight" for name in loras} | {key: key.removeprefix(PREFIX) for key in saved}
        found = {name: self._base_key(key) for name, key in keys.items()}
        ends = None
        if any(not re.search(r"(^|\.)\d+\.", keys[name]) for name in keys):  # outside the layers: a head, embeddings
            ends = output_ends(self._model)
        for name, key in found.items():
            change = Change(key, lora=name) if name in loras else Change(key, saved=name)
            target = key or keys[name]
            if key is None and ends and target in ends:
                change.source = self._base_key(ends[1 - ends.index(target)])
            if change.source is None and (change.lora or not self._may_be_added(name)):
                raise MergeError(self._no_place(keys[name]))
            self._check_shape(name, change)
            self.changes[target] = change
        self._untie(ends)

    def _untie(self, ends: tuple[str, str] | None) -> None:
        """Write embedding and head apart where one of a tied pair has changed."""
        if ends == ("", "") or not says_tied(self.config, self.base.path):
            return
        if ends is None:
            touched = [key for key in self.changes if not re.search(r"(^|\.)\d+\.", key)]
            if touched:
                raise UnsupportedError(
                    f"{touched[0]!r} is trained and the base ties its embeddings, and which they are cannot be told: "
                    "install transformers, or merge in memory with `merge_adapters`"
                )
            return
        keys = [self._base_key(end) or end for end in ends]
        if not any(key in self.changes for key in keys):
            return
        held = next((key for key in keys if key in self.base.entries), None)
        if held is None:
            raise MergeError(self._no_place(keys[0]))
        both = [self.factors[c.saved] for key in keys if (c := self.changes.get(key)) is not None and c.saved]
        if len(both) == 2 and torch.equal(*both):  # trained and still one: the head is not written
            self.changes.pop(next(key for key in keys if key != held))
            return
        if keys[0] not in ends:
            raise UnsupportedError(
                f"the base's keys lack a part of the model's names ({keys[0]!r}), so that an untied head has no sure "
                "place there: save the base with `save_pretrained` of the whole model first"
            )
        if self.config.get("is_encoder_decoder"):
            raise UnsupportedError(
                "the base is an encoder-decoder with tied embeddings, which untied may compute something else: "
                "merge in memory with `merge_adapters`"
            )
        for key in keys:
            if key not in self.changes and key not in self.base.entries:
                self.changes[key] = Change(held)
        self.untied = True

    def _plan_packed(self) -> None:
        """Mark what training had packed; a folder of ours names it."""
        record = self.adapter.record
        trained = record.get("trained") or record.get("config") or {}
        if record.get("packed") is None and trained.get("quantize", "none") != "none":
            raise MergeError(
                f"{self.adapter.path} was trained over a base packed as {trained['quantize']!r} and does not say which "
                "layers were: write it again with `save_adapter`"
            )
        for group in record.get("packed") or ():
            how = group["quant_type"], getattr(torch, group["dtype"])
            for name in group["names"]:
                key = self._base_key(f"{name}.weight")
                if key is None:
                    raise MergeError(self._no_place(f"{name}.weight"))
                self.changes.setdefault(key, Change(key)).packed = how

    @cached_property
    def _model(self) -> nn.Module | None:
        return skeleton(self.base.path, self.config)

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """By name in the model, the key in its files, where transformers renames tensors as it loads them."""
        return {} if self._model is None else file_keys(self._model, self.base.entries)

    def _base_key(self, key: str) -> str | None:
        """The base's key of a tensor; a base without a head lacks the first part of the names."""
        short = key.partition(".")[2]
        found = next((k for k in (key, short) if k in self.base.entries), None)
        return found or self._renamed.get(key)

    def _may_be_added(self, key: str) -> bool:
        """Whether a tensor that was kept in full may be new: a task head that the base never had."""
        name = key.removeprefix(PREFIX)
        if not any(self.adapter.spec.saves(parent) for parent in parents(name)):
            return False
        return not any(other.startswith(name.partition(".")[0] + ".") for other in self.base.entries)

    def _check_shape(self, name: str, change: Change) -> None:
        if change.source is None:
            return
        shape = self.base.entries[change.source].shape
        if change.saved:
            given: tuple[int, ...] = tuple(self.factors[name].shape)
            fits = given == shape
        else:
            A, B = (self.factors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
            given = (B.shape[0], A.shape[1])
            fits = A.dim() == B.dim() == 2 and shape in (given, given[::-1]) and A.shape[0] == B.shape[1]
        if not fits:
            raise MergeError(f"{name!r} is {given} in the adapter and {shape} in the base: is it another base?")

    def _no_place(self, key: str) -> str:
        near = difflib.get_close_matches(key, list(self.base.entries), n=1, cutoff=0.5)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        return (
            f"the base in {self.base.path} has no {key!r}{hint}: is it another base, or one whose files have other "
            "names than the model's modules? Merge in memory with `merge_adapters` then"
        )


def _refuse_other_targets(adapter: AdapterFolder, factors: Mapping[str, Tensor]) -> None:
    """See that the folder adapts linear layers and nothing else."""
    found = {
        "an embedding": next((key for key in factors if ".lora_embedding_" in key), None),
        "trained token rows": next((key for key in factors if ".token_adapter." in key), None),
        "fused experts": next(iter(adapter.config.get("target_parameters") or ()), None),
        "an attention module": next((key for key in factors if ".base_layer." in key), None),
        "a convolution": next((key for key, t in factors.items() if ".lora_" in key and t.dim() > 2), None),
    }
    for what, key in found.items():
        if key is not None:
            raise UnsupportedError(
                f"{adapter.path}: {key!r} is of {what}, which is not merged on disk: load the adapter over the base "
                "and merge in memory with `merge_adapters`, or use `MergeOnFitEnd`"
            )


def _split(tensors: Mapping[str, Tensor], path: Path, kind: AdapterKind) -> tuple[list[str], list[str]]:
    """Names of the modules that are adapted, and keys of the tensors that are kept in full."""
    parts: dict[str, set[str]] = {}
    saved = []
    for key in tensors:
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(lora_.+)", key)
        if match and match[2] in kind.file_names:
            parts.setdefault(match[1], set()).add(match[2])
        elif key.startswith(PREFIX) and ".lora_" not in key:
            saved.append(key)
        else:
            raise CheckpointError(f"{path}: {key!r} is neither a factor of an adapter nor a module that is kept")
    lacking = [(name, min(lost)) for name, found in parts.items() if (lost := kind.file_names.keys() - found)]
    if lacking or not tensors:
        told = f"{path}: {lacking[0][0]!r} lacks its {lacking[0][1]!r}" if lacking else f"{path} has no tensors"
        raise CheckpointError(told)
    return list(parts), saved
