# SPDX-License-Identifier: Apache-2.0
"""`plan`: memory, time and cost of full tuning, LoRA and QLoRA for a model, and which to take."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.nn.adapter import torch_dtype
from lightning_lora.planning.activations import Activations, activations
from lightning_lora.planning.advice import advise, suggested_rank
from lightning_lora.planning.architecture import Architecture, architecture, read_any
from lightning_lora.planning.devices import find_device
from lightning_lora.planning.estimate import METHODS, estimate
from lightning_lora.planning.result import Plan


def plan(
    model: str | os.PathLike[str] | Mapping[str, Any] | Any,
    batch_size: int = 1,
    sequence_length: int = 2048,
    gpu: str | None = None,
    gradient_checkpointing: bool = False,
    goal: str = "behaviour",
    examples: int | None = None,
    epochs: float = 1.0,
    price: float | None = None,
    dtype: str = "bf16",
    config: LoRAConfig | None = None,
) -> Plan:
    """Memory, time and cost of full tuning, LoRA and QLoRA, from a model's configuration alone.

    The real class is built without values; its weights are neither read nor fetched. Activations are those of sequences
    without padding, attention by `scaled_dot_product_attention` as on a CPU (a GPU's kernels keep as much or less).

    Args:
        model: A folder with a ``config.json``, such a file, its contents, or transformers' configuration.
        batch_size: Sequences in a forward; accumulation adds no memory.
        sequence_length: Tokens in each.
        gpu: A device's name ("h100", "rtx-4090") or a memory ("24GB"); None for no device.
        gradient_checkpointing: Whether blocks keep their inputs alone and compute the rest again.
        goal: "behaviour", "knowledge", "narrow" or "variants".
        examples: How many examples there are, each of ``sequence_length`` tokens.
        epochs: How often each is seen.
        price: Of an hour on the device [US dollars]; a round figure of the table if None.
        dtype: Of base and activations, "bf16", "fp16" or "fp32".
        config: Adapters and packing; if None, nf4 and all linears at the rank that is advised (`suggested_rank`).

    Raises:
        ConfigError: No configuration, an unknown device or goal, or a value out of range.
        TargetError: The adapters match nothing.
        MissingDependencyError: transformers is not installed.
    """
    _check(batch_size=batch_size, sequence_length=sequence_length, epochs=epochs)
    _check_more(examples=examples, price=price)
    if dtype not in ("bf16", "fp16", "fp32"):
        raise ConfigError(f'`dtype` must be "bf16", "fp16" or "fp32", got {dtype!r}')
    device = None if gpu is None else find_device(gpu)
    lora = LoRAConfig(r=suggested_rank(goal, examples)) if config is None else config
    own = read_any(model)
    base: torch.dtype = torch_dtype(dtype)
    found = architecture(own, lora, base)
    saved, notes = _activations(own, lora, batch_size, sequence_length, base)
    tokens = None if examples is None else float(examples) * epochs * sequence_length
    methods = {
        method: estimate(
            method,
            found,
            saved["full" if method == "full" else "lora"],
            batch_size,
            sequence_length,
            base,
            gradient_checkpointing,
            device,
            tokens,
            price,
        )
        for method in METHODS
    }
    return Plan(
        model=found.name,
        params=found.params,
        adapter_params=found.adapter_params,
        adapted=len(found.adapted),
        r=lora.r,
        context=found.context,
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
        device=device,
        methods=methods,
        advice=advise(methods, found.params, goal, examples, lora.r),
        notes=[*_beyond(found, sequence_length), *notes],
    )


def _beyond(model: Architecture, length: int) -> list[str]:
    """What it means that sequences are longer than the model's context, if they are."""
    if model.context is None or length <= model.context:
        return []
    meant = (
        "its positions are rotary, so it runs, but in places that it was never trained for: scale its rope "
        "(`rope_scaling`) or ask for less"
        if model.rotary
        else "it has no further positions, so its forward fails: ask for less"
    )
    return [f"{length:,} tokens are more than the model's context of {model.context:,}; {meant}"]


def _activations(
    config: Any, lora: LoRAConfig, batch: int, length: int, dtype: torch.dtype
) -> tuple[dict[str, Activations | None], list[str]]:
    saved: dict[str, Activations | None] = {"full": None, "lora": None}
    try:
        for name, own in (("full", None), ("lora", lora)):
            saved[name] = activations(config, own, batch, length, dtype)
    except UnsupportedError as error:
        return {"full": None, "lora": None}, [f"{error}; totals are without activations"]
    return saved, []


def _check(**values: float) -> None:
    for name, value in values.items():
        whole = name == "epochs" or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, int | float) or not whole or value <= 0:
            raise ConfigError(f"`{name}` must be a {'' if name == 'epochs' else 'whole '}number above 0, got {value!r}")


def _check_more(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
            raise ConfigError(f"`{name}` must be a number of 0 or more, or null: got {value!r}")
