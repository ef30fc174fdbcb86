# SPDX-License-Identifier: Apache-2.0
"""`RULES`: what an adapter folder may hold that some program cannot load, or scales otherwise.

A rule only finds; what a program does with the finding stands in its row of `lightning_lora.io.loaders.LOADERS`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lightning_lora.io.folder import PREFIX, SHARED, AdapterFolder
from lightning_lora.io.names import clean
from lightning_lora.io.peft_rules import BASE_KEEPING_INITS

#: Linears that servers fuse into one: an adapter on one of a row needs one on each of it.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: Ranks that vLLM's ``--max-lora-rank`` can be.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

_PORTABLE = 'write it with `save_adapter(model, dir, layout="portable")`'
_MERGE = "merge it into the base and serve the merged model"
_OWN = "use it where it was trained, with `load_adapter`"


@dataclass(frozen=True)
class Facts:
    """What can be read off an adapter folder, without its values.

    Args:
        folder: Opened without refusing anything.
        shapes: The shape of every tensor.
        base: ``config.json`` of the base model, empty where it is not known.
        max_rank: The rank that a server was started with, None for its default.
    """

    folder: AdapterFolder
    shapes: Mapping[str, tuple[int, ...]]
    base: Mapping[str, Any] = field(default_factory=dict)
    max_rank: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """``adapter_config.json``."""
        return self.folder.config

    @cached_property
    def factors(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """By name of an adapted module, the shapes of its ``A`` and ``B``."""
        found: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for key, shape in self.shapes.items():
            match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
            if match:
                found[match[1].removeprefix(PREFIX)][match[2]] = shape
        return dict(found)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """By name of an adapted module, the rank of its ``A``."""
        return {name: shapes["A"][0] for name, shapes in self.factors.items() if any(shapes.get("A", ())[:1])}

    def keys(self, *parts: str) -> list[str]:
        """Keys with one of these parts."""
        return [key for key in self.shapes if any(part in key for part in parts)]


@dataclass(frozen=True)
class Rule:
    """Finds something in a folder that some loaders cannot do or do otherwise.

    Args:
        find: The finding as a phrase, None where there is nothing; with a second phrase, the remedy to take.
        remedy: What to do about it.
    """

    find: Callable[[Facts, Loader], str | tuple[str, str] | None]
    remedy: str


@dataclass(frozen=True)
class Loader:
    """How one program reads an adapter folder.

    Args:
        scale: (configuration, name of a module, its rank) -> factor of ``B A``; None where it is PEFT's own.
        does: By name of a rule, what the program does with what the rule finds.
        max_rank: The largest rank without an option, None for any.
    """

    scale: Callable[[AdapterFolder, str, int], float]
    does: Mapping[str, str]
    max_rank: int | None = None


def _method(facts: Facts, loader: Loader) -> str | tuple[str, str] | None:
    kind = facts.config.get("peft_type")
    if kind == "LORA":
        return None
    kept = kind is None or kind in ("PROMPT_TUNING", "PREFIX_TUNING")  # what no weight of the base can take up
    return (f"`peft_type` is {kind!r}", _OWN) if kept else f"`peft_type` is {kind!r}"


def _no_type(facts: Facts, loader: Loader) -> str | None:
    kind = facts.config.get("method")
    return None if facts.config.get("peft_type") else f"the folder has no `peft_type`, its method is {kind!r}"


def _incomplete(facts: Facts, loader: Loader) -> str | None:
    if facts.config.get("peft_type") == "LORA" and not facts.factors:
        return "no tensor is a `lora_A.weight` or `lora_B.weight`"
    if not facts.shapes:
        return "there is no tensor"
    empty = [key for key, shape in facts.shapes.items() if 0 in shape]
    if empty:
        return f"{len(empty)} tensors are empty, {empty[0]!r} first (a sharded model saved without gathering it)"
    single = [f"{name} has no {'B' if 'A' in has else 'A'}" for name, has in facts.factors.items() if len(has) == 1]
    return f"{len(single)} adapters are half there, {single[0]}" if single else None


def _prefix(facts: Facts, loader: Loader) -> str | None:
    known = (*SHARED, "prompt_embeddings")
    bare = [key for key in facts.shapes if not key.startswith(PREFIX) and key not in known]
    return f"{len(bare)} keys do not begin with {PREFIX!r}, {bare[0]!r} first" if bare else None


def _names(facts: Facts, loader: Loader) -> str | None:
    odd = [name for name in facts.factors if clean(name) != name]
    odd += [key for key in facts.shapes if re.search(r"\.lora_[AB]\.[^.]+\.weight$", key)]
    return f"{odd[0]!r} holds a part of a wrapper or an adapter's name" if odd else None


def _whole_module(facts: Facts, loader: Loader) -> str | None:
    whole = facts.folder.record.get("names") == "module"
    return "names are those of the whole LightningModule, not of the transformers model in it" if whole else None


def _fields(facts: Facts, loader: Loader) -> str | None:
    if facts.config.get("peft_type") != "LORA":
        return None  # another method has fields of its own
    missing = [key for key in ("r", "lora_alpha", "target_modules") if not facts.config.get(key)]
    return f"adapter_config.json lacks {missing}" if missing else None


def _dora(facts: Facts, loader: Loader) -> str | None:
    found = facts.config.get("use_dora") or facts.keys("lora_magnitude_vector")
    return "the adapter is DoRA, whose magnitudes are no low-rank update" if found else None


def _modules_to_save(facts: Facts, loader: Loader) -> str | None:
    known = (".lora_", ".base_layer.", ".token_adapter.", ".bias", ".vera_")
    full = [key for key in facts.shapes if not any(part in key for part in known)]
    others = [] if _method(facts, loader) else sorted({key.removeprefix(PREFIX) for key in full})
    names = facts.config.get("modules_to_save") or others  # what another method keeps is its own
    return f"modules are kept in full, {names[:3]}" if names else None


def _bias(facts: Facts, loader: Loader) -> str | None:
    kind = facts.config.get("bias") or "none"
    return "biases were trained" if kind != "none" or facts.config.get("lora_bias") or _trained_biases(facts) else None


def _trained_biases(facts: Facts) -> list[str]:
    """Biases of adapters, or of layers that nothing else of which is kept."""
    return [key for key in facts.keys(".bias") if key.removesuffix("bias") + "weight" not in facts.shapes] + facts.keys(
        ".lora_B.bias"
    )


def _embeddings(facts: Facts, loader: Loader) -> str | None:
    found = facts.keys(".lora_embedding_")
    return f"an embedding is adapted, {found[0]!r}" if found else None


def _tied_head(facts: Facts, loader: Loader) -> str | None:
    adapted = [name for name in facts.factors if name.rpartition(".")[2] == "lm_head"]
    return "`lm_head` is adapted and the base ties it to its embeddings" if adapted and _is_tied(facts) else None


def _is_tied(facts: Facts) -> bool:
    return bool(facts.base.get("tie_word_embeddings"))


def _token_rows(facts: Facts, loader: Loader) -> str | None:
    found = facts.config.get("trainable_token_indices") or facts.keys(".token_adapter.")
    return "rows of an embedding were trained (`trainable_token_indices`)" if found else None


def _experts(facts: Facts, loader: Loader) -> str | None:
    names = facts.config.get("target_parameters")
    return f"parameters are adapted (`target_parameters`={names})" if names else None


def _convolutions(facts: Facts, loader: Loader) -> str | None:
    found = [name for name, shapes in facts.factors.items() if any(len(shape) != 2 for shape in shapes.values())]
    if found:
        return f"{found[0]!r} is no linear layer: its factors are no matrices"
    inside = next((name.partition(".base_layer.")[0] for name in facts.factors if ".base_layer." in name), None)
    return f"{inside!r} is no linear layer: a module with several weights is adapted" if inside else None


def _base_changed(facts: Facts, loader: Loader) -> str | None:
    init = facts.config.get("init_lora_weights", True)
    return None if init in BASE_KEEPING_INITS else f"`init_lora_weights`={init!r} has changed the base weights"


def _extensions(facts: Facts, loader: Loader) -> str | None:
    keys = ("use_qalora", "layer_replication", "arrow_config", "use_bdlora", "monteclora_config", "kasa_config")
    found = [key for key in keys if facts.config.get(key)]
    return f"{found} in use" if found else None


def _regex(facts: Facts, loader: Loader) -> str | None:
    wanted = facts.config.get("target_modules")
    plain = not isinstance(wanted, str) or wanted in ("all-linear", "all")
    return None if plain else f"`target_modules` is the regular expression {wanted!r}"


def _rank(facts: Facts, loader: Loader) -> tuple[str, str] | None:
    limit = facts.max_rank or loader.max_rank
    largest = max([facts.config.get("r", 8), *facts.ranks.values()])
    if limit is None or largest <= limit:
        return None
    fitting = next((rank for rank in RANKS if rank >= largest), None)
    start = f"start the server with --max-lora-rank {fitting}"
    return f"the rank is {largest}, the server's limit {limit}", start if fitting else _MERGE


def _rank_step(facts: Facts, loader: Loader) -> str | None:
    r = facts.config.get("r", 8)
    return None if r == 8 or r % 16 == 0 else f"the rank {r} is neither 8 nor a multiple of 16"


def _rank_span(facts: Facts, loader: Loader) -> str | None:
    largest = max(facts.ranks.values(), default=0)
    return None if largest <= 128 else f"the rank is {largest}"


def _uniform_rank(facts: Facts, loader: Loader) -> str | None:
    by_type: dict[str, set[int]] = defaultdict(set)
    for name, rank in facts.ranks.items():
        by_type[name.rpartition(".")[2]].add(rank)
    mixed = {kind: sorted(ranks) for kind, ranks in by_type.items() if len(ranks) > 1}
    return f"ranks differ from layer to layer, {mixed}" if mixed else None


def _scale(facts: Facts, loader: Loader) -> str | None:
    wrong = []
    for name, rank in facts.ranks.items():
        right, taken = facts.folder.scale(name), loader.scale(facts.folder, name, rank)
        if not math.isclose(right, taken, rel_tol=1e-6):
            wrong.append(f"{name!r} was trained with the scale {right:.6g} and would get {taken:.6g}")
    causes = [key for key in ("use_rslora", "rank_pattern", "alpha_pattern") if facts.config.get(key)]
    return f"{len(wrong)} of {len(facts.ranks)} modules scaled wrongly, {wrong[0]} ({causes})" if wrong else None


def missing_siblings(names: set[str]) -> dict[str, str]:
    """By name of each module that is missing in a row of `SIBLINGS`, one that is there."""
    missing: dict[str, str] = {}
    for name in sorted(names):
        parent, _, last = name.rpartition(".")
        for row in SIBLINGS:
            for other in row if last in row else ():
                full = f"{parent}.{other}" if parent else other
                if full not in names:
                    missing.setdefault(full, name)
    return missing


def _siblings(facts: Facts, loader: Loader) -> str | None:
    missing = missing_siblings(set(facts.factors))
    first = next(iter(missing.items()), None)
    return f"{first[1]!r} is adapted and its sibling {first[0]!r} is not ({len(missing)} missing)" if first else None


def _layers(facts: Facts, loader: Loader) -> str | None:
    by_type: dict[str, set[int]] = defaultdict(set)
    for name in facts.factors:
        match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
        if match:
            by_type[match[2]].add(int(match[1]))
    last = max((max(found) for found in by_type.values()), default=-1)
    count = facts.base.get("num_hidden_layers") or last + 1
    partly = {kind: len(found) for kind, found in by_type.items() if len(found) < count}
    return f"of {count} layers, {partly} have an adapter" if partly else None


def _base_name(facts: Facts, loader: Loader) -> str | None:
    return None if facts.config.get("base_model_name_or_path") else "`base_model_name_or_path` is empty"


RULES: dict[str, Rule] = {
    "method": Rule(_method, _MERGE),
    "no_type": Rule(_no_type, _OWN),
    "incomplete": Rule(_incomplete, "write the folder again from the trained model"),
    "prefix": Rule(_prefix, f"rename the keys so that each begins with {PREFIX!r}, or {_PORTABLE}"),
    "names": Rule(_names, f"{_PORTABLE}, which uses the names inside the transformers model"),
    "whole_module": Rule(_whole_module, _MERGE),
    "fields": Rule(_fields, "write the folder again with `save_adapter`"),
    "dora": Rule(_dora, _MERGE),
    "modules_to_save": Rule(_modules_to_save, _MERGE),
    "bias": Rule(_bias, _MERGE),
    "embeddings": Rule(_embeddings, _MERGE),
    "tied_head": Rule(_tied_head, _MERGE),
    "token_rows": Rule(_token_rows, _MERGE),
    "experts": Rule(_experts, f"{_MERGE}; or write each expert's own factors with `export_experts`"),
    "convolutions": Rule(_convolutions, _MERGE),
    "base_changed": Rule(_base_changed, "save it in PEFT with `path_initial_model_for_weight_conversion`"),
    "extensions": Rule(_extensions, _MERGE),
    "regex": Rule(_regex, f"write the names out as a list, or {_PORTABLE}"),
    "rank": Rule(_rank, ""),
    "rank_step": Rule(_rank_step, _PORTABLE),
    "rank_span": Rule(_rank_span, _MERGE),
    "uniform_rank": Rule(_uniform_rank, _PORTABLE),
    "scale": Rule(_scale, _PORTABLE),
    "siblings": Rule(_siblings, f"{_PORTABLE}, which adds adapters that are zero"),
    "layers": Rule(_layers, f"{_PORTABLE}, which adds adapters that are zero"),
    "base_name": Rule(_base_name, "write the base model's name or folder into adapter_config.json"),
}
