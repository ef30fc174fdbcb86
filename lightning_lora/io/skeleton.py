# SPDX-License-Identifier: Apache-2.0
"""The model of a folder without its values: built by transformers on the meta device, to ask it for names."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_config(folder: Path) -> Any:
    """Transformers' own reading of the configuration; None without transformers, or where it knows no such model."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError):
        return None


def skeleton(folder: Path, config: Mapping[str, Any], kind: str = "") -> nn.Module | None:
    """The model that transformers builds for a folder, on the meta device; None where it cannot be built.

    Args:
        folder: The model folder.
        config: Its ``config.json``.
        kind: Name of the model class; the configuration's own if empty, or if transformers has none of that name.
    """
    loaded = load_config(folder) if config else None
    if loaded is None:
        return None
    import transformers

    names = [kind, *(config.get("architectures") or [])[:1]]
    cls = next((cls for name in names if name and (cls := getattr(transformers, name, None)) is not None), None)
    if cls is None:
        return None
    with contextlib.suppress(Exception), torch.device("meta"):  # whatever a model class may raise without its weights
        return cls(loaded)
    return None


def file_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """By name in the model, the key in its files, where transformers renames tensors as it loads them.

    Tensors that it also reshapes on the way (experts that it fuses, say) are left out.

    Args:
        model: A transformers model, with or without values.
        keys: The keys of its files.
    """
    try:  # transformers 5; before it, files and models had the same names
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return {}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = getattr(model, "base_model_prefix", None) or None, model.state_dict()
    found: dict[str, str] = {}
    for key in keys:
        name, reshaped = rename_source_key(key, renamings, converters, prefix, state)
        if reshaped is None and name in state:
            found[name] = key
    return found
