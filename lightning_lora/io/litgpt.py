# SPDX-License-Identifier: Apache-2.0
"""LitGPT's adapters (``lit_model.pth.lora``) as an adapter folder for a transformers model.

::

    folder/lit_model.pth.lora     transformer.h.<i>.attn.qkv.lora_A   (n r, in)     n of q, k, v are adapted
                                  transformer.h.<i>.attn.qkv.lora_B   (rows, r)     their rows one after another
                                  transformer.h.<i>.<other>.lora_A, .lora_B         (r, in), (out, r)
    folder/hyperparameters.yaml   lora_r, lora_alpha, lora_query, lora_key, lora_value, ...
    folder/model_config.yaml      n_head, n_query_groups, head_size

LitGPT holds q, k and v as one weight, whose rows are ``[q | k | v]``; in its first versions (``attn.attn``) they were
interleaved by query group, ``[q q k v | q q k v | ...]``. There the update of all three was added without being
interleaved, row by row, so that what it adds to q comes from the factors of q, k and v alike: it is taken as it was
trained. An update of several row blocks is written with its factors stacked,

    A = (A_q; A_k; A_v)    B = rows of  diag(B_q, B_k, B_v)

and a row block keeps only those that reach it. The file is read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, CheckpointError
from lightning_lora.io.folder import CONFIG, PREFIX, WEIGHTS
from lightning_lora.io.names import plain_modules
from lightning_lora.io.peft_rules import Scale, shortest_spec
from lightning_lora.model.inner import inner_model
from lightning_lora.nn.layers import is_conv1d, linear_shape

FILE, HYPERPARAMETERS, MODEL_CONFIG = "lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"


@dataclass(frozen=True)
class Heads:
    """How many rows q, k and v have.

    Args:
        n_head: Query heads.
        groups: Key and value heads.
        size: Rows of a head.
    """

    n_head: int
    groups: int
    size: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of q, k and v."""
        return self.n_head * self.size, self.groups * self.size, self.groups * self.size

    def interleaved(self) -> Tensor:
        """For each row of ``[q q k v | q q k v | ...]``, its place in ``[q | k | v]``."""
        q, k, v = (part.view(self.groups, -1) for part in torch.arange(sum(self.rows)).split(self.rows))
        return torch.cat([q, k, v], dim=1).reshape(-1)


@dataclass
class Update:
    """``scale * B A`` of one weight, in the rows of the transformers model."""

    A: Tensor
    B: Tensor
    factor: int = 1  # how many factors of LitGPT's rank are stacked

    def part(self, rows: Tensor | slice, r: int, own: int = 0) -> Update:
        """The update of some rows, without the stacked factors that do not reach them; `own` where none does."""
        B = self.B[rows]
        used = [i for i in range(self.factor) if B[:, i * r : (i + 1) * r].any()] or [own]
        columns = torch.cat([torch.arange(i * r, (i + 1) * r) for i in used])
        return Update(self.A[columns], B[:, columns], len(used))


#: LitGPT's name inside a block -> names that transformers models have for it; several are parts, one after another.
_NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "attn.qkv": (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.qkv_proj",),
        ("attention.query_key_value",),
        ("self_attention.query_key_value",),
    ),
    "attn.proj": (("self_attn.o_proj",), ("self_attn.dense",), ("attention.dense",), ("self_attention.dense",)),
    "mlp.fc": (("mlp.fc1",), ("mlp.dense_h_to_4h",)),
    "mlp.fc_1": (("mlp.gate_proj",), ("mlp.gate_up_proj",)),
    "mlp.fc_2": (("mlp.up_proj",), ("mlp.gate_up_proj",)),
    "mlp.proj": (("mlp.down_proj",), ("mlp.fc2",), ("mlp.dense_4h_to_h",)),
}
_BLOCKS = ("model.layers", "gpt_neox.layers", "transformer.h", "model.language_model.layers")
_HEADS = ("lm_head", "embed_out")


def is_litgpt(dir: Path) -> bool:
    """Whether `dir` is a checkpoint folder of LitGPT's with adapters."""
    return (dir / FILE).is_file() and not (dir / CONFIG).exists()


def convert_litgpt(model: nn.Module, source: Path, out: Path) -> None:
    """Write LitGPT's adapters as an adapter folder in PEFT's layout, with the names of `model`.

    Args:
        model: A plain transformers model of the same weights, or a LightningModule around one.
        source: The checkpoint folder that LitGPT wrote.
        out: The folder to fill; it exists.

    Raises:
        CheckpointError: A file is missing or broken.
        AdapterMismatchError: The adapters do not fit the model.
    """
    _, root = inner_model(model)
    modules = plain_modules(root)
    words = _yaml(source / HYPERPARAMETERS)
    r, alpha = (_number(words, key, source / HYPERPARAMETERS) for key in ("lora_r", "lora_alpha"))
    factors = _paired(_read(source / FILE), source / FILE)
    updates: dict[str, Update] = {}
    gates: dict[str, dict[str, Update]] = {}
    for name, (A, B) in factors.items():
        block, own = _split(name)
        if own in ("attn.qkv", "attn.attn"):
            enabled = [bool(words.get(f"lora_{which}")) for which in ("query", "key", "value")]
            heads = _heads(source)
            update = _fused(name, A, B, r, enabled, heads, interleaved=own == "attn.attn")
            targets = _targets(name, block, "attn.qkv", modules)
            updates.update(_distributed(targets, update, heads, r, enabled))
            continue
        (target,) = _targets(name, block, own, modules)
        if target.endswith("gate_up_proj"):
            gates.setdefault(target, {})[own] = Update(A, B)
        else:
            updates[target] = Update(A, B)
    for target, halves in gates.items():
        updates[target] = _gate_up(halves, linear_shape(modules[target])[1])
    tensors = {}
    for target, update in updates.items():
        inn, out_features = linear_shape(modules[target])
        if target.rpartition(".")[2] in _HEADS:  # LitGPT pads the vocabulary
            update.B = update.B[:out_features]
        if update.A.shape[1] != inn or update.B.shape[0] != out_features:
            raise AdapterMismatchError(
                f"{source / FILE}: the update of {target!r} is {update.B.shape[0]} x {update.A.shape[1]} there and the "
                f"layer {out_features} x {inn}: is it the model that was tuned?"
            )
        tensors[f"{PREFIX}{target}.lora_A.weight"] = update.A.contiguous().clone()
        tensors[f"{PREFIX}{target}.lora_B.weight"] = update.B.contiguous().clone()
    scales = {name: Scale(update.A.shape[0], alpha * update.A.shape[0] / r) for name, update in updates.items()}
    spec = shortest_spec(list(modules), scales, [])
    config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": words.get("lora_dropout") or 0.0,
        "fan_in_fan_out": any(is_conv1d(modules[name]) for name in updates),
        **vars(spec),
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2))
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})


def _read(path: Path) -> dict[str, Tensor]:
    """The file's tensors, by name."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is broken, or holds more than tensors: {error}") from error
    state = state.get("model", state) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{path} holds no table of tensors: it is no adapter file of LitGPT's")
    return {str(name): tensor for name, tensor in state.items() if "lora_" in str(name)}


def _paired(state: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By name of a layer, its A and B."""
    names = dict.fromkeys(key.rpartition(".")[0] for key in state)
    missing = [f"{name}.lora_{x}" for name in names for x in "AB" if f"{name}.lora_{x}" not in state]
    if missing or not names:
        raise CheckpointError(f"{path} lacks {missing[0]!r}" if missing else f"{path} holds no adapters")
    return {name: (state[f"{name}.lora_A"], state[f"{name}.lora_B"]) for name in names}


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: LitGPT writes it beside {FILE}, and the scale stands in it")
    try:
        value = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise CheckpointError(f"{path} is no YAML: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a table, got {type(value).__name__}")
    return value


def _number(words: Mapping[str, Any], key: str, path: Path) -> int:
    value = words.get(key)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: `{key}` must be a number of at least 1, got {value!r}")
    return value


def _heads(source: Path) -> Heads:
    path = source / MODEL_CONFIG
    words = _yaml(path)
    n_head = _number(words, "n_head", path)
    size = words.get("head_size") or _number(words, "n_embd", path) // n_head
    return Heads(n_head, words.get("n_query_groups") or n_head, size)


def _split(name: str) -> tuple[int | None, str]:
    """Block and name inside it; without a block for the head."""
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _targets(name: str, block: int | None, own: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The model's names for one of LitGPT's."""
    if block is None:
        choices = [[head] for head in _HEADS] if own == "lm_head" else []
    else:
        choices = [[f"{b}.{block}.{part}" for part in parts] for b in _BLOCKS for parts in _NAMES.get(own, ())]
    found = next((parts for parts in choices if all(part in modules for part in parts)), None)
    if found is None:
        tried = f"; looked for {', '.join(parts[0] for parts in choices[:4])}" if choices else ""
        raise AdapterMismatchError(
            f"the model has no place for LitGPT's {name!r}{tried}: is it the model that was tuned?"
        )
    return found


def _fused(name: str, A: Tensor, B: Tensor, r: int, enabled: list[bool], heads: Heads, interleaved: bool) -> Update:
    """The update of ``[q | k | v]``, its rows in that order and its factors stacked."""
    count = sum(enabled)
    sizes = [rows for rows, on in zip(heads.rows, enabled, strict=True) if on]
    if A.shape[0] != count * r or B.shape != (sum(sizes), r):
        raise AdapterMismatchError(
            f"{name!r} has factors {tuple(A.shape)} and {tuple(B.shape)}; {count} of q, k, v with rank {r} and rows "
            f"{sizes} need {(count * r, A.shape[1])} and {(sum(sizes), r)}"
        )
    stacked = torch.block_diag(*B.split(sizes))
    if interleaved and all(enabled):  # added row by row to the interleaved weight
        rows = heads.interleaved()
    else:
        parts = torch.arange(sum(heads.rows)).split(heads.rows)
        rows = torch.cat([part for part, on in zip(parts, enabled, strict=True) if on])
    full = torch.zeros(sum(heads.rows), count * r, dtype=B.dtype)
    full[rows] = stacked
    return Update(A, full, count)


def _distributed(targets: list[str], update: Update, heads: Heads, r: int, enabled: list[bool]) -> dict[str, Update]:
    """The update of each of the model's layers that q, k and v are in; those that are adapted alone."""
    if len(targets) == 3:
        parts = torch.arange(sum(heads.rows)).split(heads.rows)
        found = zip(targets, parts, enabled, strict=True)
        return {
            name: update.part(rows, r, own=i)
            for i, (name, rows) in enumerate((name, rows) for name, rows, on in found if on)
        }
    by_group = targets[0].endswith("query_key_value")  # GPT-NeoX and Falcon interleave in transformers too
    rows = heads.interleaved() if by_group else slice(None)
    return {targets[0]: Update(update.A, update.B[rows], update.factor)}


def _gate_up(halves: Mapping[str, Update], rows: int) -> Update:
    """The update of ``[gate | up]``."""
    order = [halves.get(which) for which in ("mlp.fc_1", "mlp.fc_2")]
    empty = torch.zeros(rows // 2, 0)
    B = torch.block_diag(*(empty if half is None else half.B for half in order))
    present = [half for half in order if half is not None]
    return Update(torch.cat([half.A for half in present]), B.to(present[0].B.dtype), len(present))
