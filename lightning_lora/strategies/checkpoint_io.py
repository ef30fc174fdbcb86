# SPDX-License-Identifier: Apache-2.0
"""`AtomicCheckpointIO`: Lightning's own checkpoint file, whole at any moment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_lora.io.atomic import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own format; a local file is written beside its target, synced and renamed over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; a process killed at any moment leaves the old file or the new one."""
        if storage_options is not None or "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(path) as part:
            torch.save(checkpoint, part)
