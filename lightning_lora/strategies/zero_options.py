# SPDX-License-Identifier: Apache-2.0
"""Which of DeepSpeed's options go with adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.model.unbuilt import refuse_unbuilt
from lightning_lora.nn.adapter import Use


def refuse_adapters(model: nn.Module) -> None:
    """See that the adapters of ``model`` were built for DeepSpeed.

    Raises:
        UnsupportedError: They were not; the text says what to use.
    """
    fsdp2: dict[Use, str] = {"fsdp2": 'use "lora_ddp" or, for FSDP 2, "lora_model_parallel"'}
    refuse_unbuilt(model, "deepspeed", "DeepSpeed", fsdp2, 'use "lora_ddp"')


def refuse_options(config: dict[str, Any], full_weights: bool, remote_device: str | None, packed: bool = False) -> None:
    """See that DeepSpeed's options go with adapters.

    Args:
        config: DeepSpeed's own configuration.
        full_weights: Lightning's ``load_full_weights``.
        remote_device: Lightning's ``remote_device``.
        packed: Whether the base is quantized.

    Raises:
        UnsupportedError: One does not; the text says what to do.
    """
    zero, files = config.get("zero_optimization") or {}, config.get("checkpoint") or {}
    if zero.get("stage", 0) not in (1, 2, 3):
        raise UnsupportedError(
            "without ZeRO there is nothing for DeepSpeed to spread: set `stage` to 1, 2 or 3, or use "
            '`strategy="lora_ddp"`'
        )
    if full_weights:
        raise UnsupportedError("`load_full_weights=True` loads whole models, checkpoints hold adapters: leave it out")
    if remote_device is not None:
        raise UnsupportedError(
            f"`remote_device={remote_device!r}` builds the model in pieces, and adapters need it whole: leave it out"
        )
    if packed and (zero.get("offload_param") or {}).get("device", "none") != "none":
        raise UnsupportedError(
            "`offload_parameters` moves parameters, and a packed base is none: leave it out, or do not `quantize`"
        )
    if files.get("writer") or files.get("load_universal"):
        raise UnsupportedError(
            "DeepSpeed's `checkpoint` configuration asks for another writer or form (`writer`, `load_universal`): "
            "checkpoints of adapters are small, leave it out"
        )
