# SPDX-License-Identifier: Apache-2.0
"""How a run ends: when by plan, what holds it from stopping, and files that must say what was left at the end."""

from __future__ import annotations

import math
import os
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.forgetting.schedule import RunLength


def run_length(trainer: Trainer) -> RunLength:
    """How long the run is by plan."""
    try:
        end = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes with the epoch
        end = trainer.max_steps
    batches = trainer.num_training_batches
    return RunLength(
        steps=int(end) if 0 < end < math.inf else None,
        epoch=None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches),
    )


def held_until(trainer: Trainer) -> str:
    """What the Trainer does before it heeds a wish to stop, its ``min_steps`` and ``min_epochs``; "" for nothing."""
    held = []
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if trainer.min_steps and trainer.global_step < trainer.min_steps:
        held.append(f"step {trainer.min_steps} (`min_steps`)")
    if trainer.min_epochs and epochs.processed < trainer.min_epochs:
        held.append(f"epoch {trainer.min_epochs} (`min_epochs`)")
    return " and ".join(held)


def when_it_stops(trainer: Trainer) -> str:
    """The same as a sentence's beginning."""
    held = held_until(trainer)
    return f"Training stops only when the trainer has done {held}" if held else "Training stops after this step"


def renew_checkpoints(trainer: Trainer) -> None:
    """Write the newest checkpoints again, since the adapters have changed after they were written.

    Those are ``last.ckpt``, and what was saved at this very step; of `AdapterCheckpoint` with the adapter folders
    beside them. Checkpoints that were chosen by a metric stay as they were when it was measured. Every rank takes part.
    """
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, ModelCheckpoint):
            continue
        # There is no public way to see what a ModelCheckpoint saved when, nor to have it save once more.
        paths: list[str] = []
        if callback._last_global_step_saved == trainer.global_step:
            newest = [callback.best_model_path] if callback.monitor is None else []
            newest += callback.recent[-1:] if isinstance(callback, AdapterCheckpoint) else []
            chosen = callback.best_k_models if callback.monitor is not None else ()
            paths = [path for path in dict.fromkeys(newest) if path and path not in chosen]
        last = callback.last_model_path
        if last and os.path.realpath(last) not in map(os.path.realpath, paths):
            for link in (last, adapter_path(last)):
                if os.path.islink(link) and trainer.is_global_zero:
                    os.remove(link)  # what it leads to stays as it is
            paths.append(last)
        for path in paths:
            callback._save_checkpoint(trainer, path)
