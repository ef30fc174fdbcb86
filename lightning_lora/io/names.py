# SPDX-License-Identifier: Apache-2.0
"""Names in adapter files: those of the plain transformers model, before wrappers and conversion."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_lora.model.inner import clean_name, inner_model, is_hf_model
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.quantized import PackedLinear


def adapter_root(model: nn.Module) -> tuple[str, nn.Module]:
    """Where the names of adapter files begin: the transformers model, if every adapter lies inside it."""
    prefix, root = inner_model(model)
    outside = [name for name, _ in adapter_modules(model) if prefix and not name.startswith(f"{prefix}.")]
    return ("", model) if outside else (prefix, root)


def plain_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The modules of a converted model by the names that the model had before, the root left out."""
    found: dict[str, nn.Module] = {}
    replaced: dict[str, nn.Module] = {}
    for raw, module in root.named_modules():
        name = plain_name(raw, replaced)
        if name is None:
            continue
        if isinstance(module, AdapterModule | PackedLinear):
            replaced[raw] = module
        if name:
            found.setdefault(clean(name), module)
    return found


def plain_name(raw: str, replaced: Mapping[str, nn.Module]) -> str | None:
    """The name that something inside a converted model had before; None for what is new, or a replaced module itself.

    Args:
        raw: Its name now.
        replaced: The adapter modules and packed layers around it at least, by their names now.
    """
    name = raw
    for owner in reversed([o for o in parents(raw) if o in replaced]):
        inner = getattr(replaced[owner], "inner", None) if isinstance(replaced[owner], AdapterModule) else None
        if inner is None or not name.startswith(f"{owner}.{inner}."):
            return None
        name = owner + name.removeprefix(f"{owner}.{inner}")
    return name


def named_adapters(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Adapter modules by the names that adapter files use."""
    prefix, _ = adapter_root(model)
    for raw, module in adapter_modules(model):
        yield clean(inside(raw, prefix)), module


def packed_layers(model: nn.Module) -> list[dict[str, Any]]:
    """Which linears are packed, how and from which dtype: what a merge into the base's files must do again."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in plain_modules(adapter_root(model)[1]).items():
        layer = getattr(module, "base_layer", module)
        if isinstance(layer, PackedLinear):
            dtype = str(layer.packed.source_dtype).removeprefix("torch.")
            groups.setdefault((layer.packed.quant_type, dtype), []).append(name)
    return [{"quant_type": kind, "dtype": dtype, "names": names} for (kind, dtype), names in groups.items()]


def task_type(root: nn.Module, saved: list[str]) -> str | None:
    """PEFT's task type of a transformers model; None where PEFT would look for a head that is not kept."""
    auto = sys.modules.get("transformers.models.auto.modeling_auto")
    if not is_hf_model(root) or auto is None:
        return None
    tables = {
        "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    }
    names = {cls.__name__ for cls in type(root).__mro__}
    task = next((t for t, table in tables.items() if names & set(getattr(auto, table, {}).values())), None)
    # With these types PEFT keeps every module of these names in full, and looks for them in the file.
    heads = {
        "SEQ_CLS": ("classifier", "score"),
        "TOKEN_CLS": ("classifier", "score"),
        "QUESTION_ANS": ("qa_outputs",),
    }
    for name in plain_modules(root):
        if name.endswith(heads.get(task or "", ("\0",))) and name not in saved:
            return None
    return task


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside a DDP wrapper."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def clean(name: str) -> str:
    """`name` without wrappers' parts; the leading part guards a user's own attribute called "module"."""
    return clean_name(f"root.{name}").removeprefix("root.") if name else ""


def inside(name: str, prefix: str) -> str:
    """`name` as seen from the module called `prefix`."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def parents(name: str) -> Iterator[str]:
    """The names of the modules around the one called `name`, the outermost first."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        yield ".".join(parts[:count])
