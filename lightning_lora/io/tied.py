# SPDX-License-Identifier: Apache-2.0
"""Tied embeddings of a model folder: whether its head reads the input embedding's weight, and under which names."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import CheckpointError, UnsupportedError
from lightning_lora.io.skeleton import load_config
from lightning_lora.model.inner import is_hf_model


def config_of(folder: Path) -> dict[str, Any]:
    """A model folder's ``config.json``; empty where there is none, as for a plain module's weights.

    Raises:
        CheckpointError: It is no JSON object.
        UnsupportedError: Its weights are quantized already.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"the base in {folder} is quantized already (`quantization_config`): merge into the full-precision model "
            "that it was made from"
        )
    return config


def says_tied(config: Mapping[str, Any], folder: Path) -> bool:
    """Whether a model of this configuration ties head and input embedding.

    Where the file does not say, transformers' default for the model counts; without transformers it is taken for tied.
    """
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    if not config:
        return False
    loaded = load_config(folder)
    return True if loaded is None else bool(getattr(loaded, "tie_word_embeddings", False))


def changed_config(config: Mapping[str, Any], untied: bool, dtype: str | None) -> dict[str, Any]:
    """A copy of a configuration for the merged weights.

    Args:
        config: The base's.
        untied: Whether it is to load head and embedding apart.
        dtype: The new dtype's name, None to leave it.
    """
    changed = copy.deepcopy(dict(config))
    parts = [changed, *(part for part in (changed.get("text_config"),) if part)]
    for part in parts:
        if untied and (part is changed or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if dtype is not None and (part is changed or "dtype" in part or "torch_dtype" in part):
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = dtype
    return changed


def untie_apart(model: nn.Module) -> None:
    """Set ``tie_word_embeddings`` of a model to False where head and embedding have come apart.

    Saved and loaded again with it, one of the two would be lost.
    """
    config = getattr(model, "config", None)
    if config is None or not is_hf_model(model):
        return
    ends = output_ends(model)
    if ends in (None, ("", "")):
        return
    first, second = (model.get_parameter(end) for end in ends or ())
    if first is second or (first.shape == second.shape and torch.equal(first, second)):
        return
    parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False


def output_ends(model: nn.Module | None) -> tuple[str, str] | None:
    """Names of the input embedding's and the head's weight; empty without a head, None where that cannot be told.

    Args:
        model: The model without values, None where it is not known.
    """
    if model is None:
        return None
    names = [_weight_name(model, getter) for getter in ("get_input_embeddings", "get_output_embeddings")]
    return (names[0], names[1]) if names[0] and names[1] else ("", "")


def _weight_name(model: nn.Module, getter: str) -> str | None:
    module = None
    with contextlib.suppress(NotImplementedError):  # encoders and vision models have none to give
        module = getattr(model, getter)()
    name = next((name for name, m in model.named_modules() if m is module), None)
    return None if module is None or name is None else f"{name}.weight"
