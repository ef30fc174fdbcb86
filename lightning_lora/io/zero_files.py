# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's own files in a checkpoint: pickles that it loads without a look at what they name."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from lightning_lora.errors import CheckpointError

# What DeepSpeed's optimizer shards hold besides tensors and primitives.
_CLASSES = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)


def check_pickles(folder: Path) -> None:
    """Read DeepSpeed's files without running what they name; DeepSpeed itself would run anything.

    Raises:
        CheckpointError: A file is no whole one, or names something else than `_CLASSES`.
    """
    known = [c for place, name in _CLASSES if (c := getattr(importlib.import_module(place), name, None)) is not None]
    for file in sorted(folder.rglob("*.pt")):
        try:
            with torch.serialization.safe_globals(known):
                torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises a dozen kinds for a broken file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{file} is no file of DeepSpeed's optimizer shards as it writes them ({reason}): it is not loaded. "
                "Take an earlier checkpoint, of a source that you trust"
            ) from error
