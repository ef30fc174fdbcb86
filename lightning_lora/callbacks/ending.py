# SPDX-License-Identifier: Apache-2.0
"""How a run ends: when by plan, what holds it from stopping, what would undo its end, and files that must say it."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.errors import ConfigError, Notice, UnsupportedError
from lightning_lora.forgetting.scales import check_divisible
from lightning_lora.forgetting.schedule import RunLength
from lightning_lora.ranks import notice


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


def check_alone(monitor: Callback, trainer: Trainer) -> None:
    """See that a checkpoint has a place for each monitor's state.

    Args:
        monitor: One of the Trainer's callbacks.
        trainer: As ``fit`` starts.

    Raises:
        ConfigError: Another callback has the same place. Lightning sees this itself in callbacks that are given to the
            Trainer, and not in those of ``configure_callbacks``.
    """
    if sum(other.state_key == monitor.state_key for other in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        name = type(monitor).__name__
        raise ConfigError(
            f"Two {name} callbacks ask the same (`tasks`, `target_tasks`, prompt and `seed`), and a checkpoint could "
            f"not tell their states apart: give one another `seed`, or leave it out."
        )


def check_remedy(on_forgetting: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """See that nothing undoes at the end of the run what an alarm does to the adapters, or passes it by in silence.

    Args:
        on_forgetting: What an alarm does.
        trainer: As ``fit`` starts.
        pl_module: What is trained.

    Raises:
        UnsupportedError: The strategy cannot roll back, the method has no scale, or a callback puts other weights in
            place when training ends.
    """
    if on_forgetting not in ("rollback", "scale"):
        return
    strategy, callbacks = trainer.strategy, trainer.callbacks  # type: ignore[attr-defined]
    if on_forgetting == "scale":
        check_divisible(pl_module, '`on_forgetting="scale"`', 'Use "rollback", "stop" or "warn"')
    if on_forgetting == "rollback" and isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        raise UnsupportedError(
            f'`on_forgetting="rollback"` is not built under {type(strategy).__name__}, which keeps its own copies '
            f'of the adapters. Use "scale" or "stop", or the strategy "ddp" or "model_parallel" (FSDP 2).'
        )
    if any(isinstance(other, WeightAveraging) for other in callbacks):
        raise UnsupportedError(
            "`WeightAveraging` puts its average in place when training ends, and would undo what "
            f'`on_forgetting={on_forgetting!r}` leaves: take it out, or use "warn" or "stop"'
        )
    if trainer.is_global_zero and any(isinstance(c, MergeOnFitEnd) and c.weights == "best" for c in callbacks):
        warnings.warn(
            f'`MergeOnFitEnd(weights="best")` merges a checkpoint as it was when it was measured; what '
            f'`on_forgetting={on_forgetting!r}` leaves is that of the end, merged with weights="last"',
            Notice,
            stacklevel=2,
        )


def renew_checkpoints(trainer: Trainer) -> None:
    """Write the newest checkpoints again, since the adapters have changed after they were written.

    Those are ``last.ckpt``, and what was saved at this very step; of `AdapterCheckpoint` with the adapter folders
    beside them. Checkpoints that were chosen by a metric stay as they were when it was measured. Where there are no
    others, and the changed adapters would be nowhere, a ``last.ckpt`` is written and named. Every rank takes part.
    """
    keepers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    renewed = [path for callback in keepers for path in _renewed(trainer, callback)]
    asked = [callback for callback in keepers if callback.save_top_k != 0 or callback.save_last]
    if asked and not renewed and not getattr(trainer, "fast_dev_run", False):
        path = _write_last(trainer, asked[0])
        notice(
            f"The adapters were changed when training ended, and no checkpoint was kept of its end: {path} holds them "
            f"as they are now. The others stay as they were when they were written."
        )


def _renewed(trainer: Trainer, callback: ModelCheckpoint) -> list[str]:
    """The checkpoints of one callback that are written again."""
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
    return paths


def _write_last(trainer: Trainer, callback: ModelCheckpoint) -> str:
    """Have a callback write the ``last.ckpt`` that it was not asked for, under a name that is free."""
    asked, callback.save_last = callback.save_last, True
    try:
        callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    finally:
        callback.save_last = asked
    return callback.last_model_path
