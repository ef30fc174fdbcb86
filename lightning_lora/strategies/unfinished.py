# SPDX-License-Identifier: Apache-2.0
"""`Unfinished`: what a batch leaves to be done after the hooks in which checkpoints are written.

Lightning steps a `ReduceLROnPlateau` after validation and after the hooks of an epoch's end, and gradients that
are being accumulated wait for the batches to come. A checkpoint that is written before knows of neither, so both
are noted in it and done, or put back, when the run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from lightning_lora.model.inner import clean_name

_LATER = "the value that it waits for came after the checkpoint was written"


class Unfinished:
    """Watches one process's run."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # steps that each plateau scheduler had taken before this batch
        self._before: dict[str, float] = {}  # metrics before the validation that runs
        self._held: dict[int, int] = {}  # frequencies of plateau schedulers that wait for the next batch

    def note_batch(self, trainer: Trainer) -> None:
        """A batch was computed; what belongs to it has not been done."""
        self._counts = {i: config.scheduler.last_epoch for i, config in _plateaus(trainer)}
        for i, frequency in self._held.items():
            trainer.lr_scheduler_configs[i].frequency = frequency
        self._held = {}

    def note_validation(self, trainer: Trainer) -> None:
        """A validation begins."""
        self._before = _metrics(trainer)

    def state(self, trainer: Trainer, progress: Mapping[str, Any]) -> dict[str, Any]:
        """What is not done yet.

        Args:
            trainer: In the hook in which a checkpoint is written.
            progress: ``loops.fit_loop`` of that checkpoint.

        Returns:
            ``plateaus``: by the scheduler's number, the metric that it will be given, and whether it is sure that
            this is the value; empty where nothing is left to do.
        """
        batches, metrics = progress["epoch_loop.batch_progress"], _metrics(trainer)
        ready = batches["current"]["ready"]
        epochs = progress["epoch_progress"]["current"]["started"]
        waiting: dict[str, Any] = {}
        for i, config in _plateaus(trainer):
            due = ready if config.interval == "step" else epochs * batches["is_last_batch"]
            if not due or due % config.frequency or config.scheduler.last_epoch != self._counts.get(i):
                continue
            value = metrics.get(str(config.monitor))
            if batches["current"]["completed"] < ready:  # before validation, if there is one
                sure = not trainer.enable_validation
            else:
                sure = not trainer.validating or value != self._before.get(str(config.monitor))
            waiting[str(i)] = [value, sure and value is not None]
        return {"plateaus": waiting} if waiting else {}

    def finish(self, trainer: Trainer, state: Mapping[str, Any]) -> Iterator[str]:
        """Step the schedulers that a checkpoint left; what cannot be done exactly is told, a sentence each.

        Lightning goes once more through the end of a batch after which it validated, with no metric at hand:
        until the next batch no plateau scheduler is due there.
        """
        waiting = state.get("plateaus", {})
        for i, config in _plateaus(trainer):
            value, sure = waiting.get(str(i), (None, True))
            if value is not None:
                trainer.lightning_module.lr_scheduler_step(config.scheduler, value)
            if config.interval == "step":
                self._held[i], config.frequency = config.frequency, sys.maxsize
            if not sure:
                yield (
                    f"the checkpoint was written before a `ReduceLROnPlateau` on {config.monitor!r} was stepped, and "
                    f"{_LATER if value is None else 'perhaps ' + _LATER}: the learning rate may differ from an uncut "
                    "run's. Resume from the checkpoint that a `ModelCheckpoint` wrote after a validation"
                )


def set_accumulation(trainer: Trainer) -> None:
    """Inside an epoch nobody tells a `GradientAccumulationScheduler` that it has begun: do what it would have done."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(trainer.current_epoch)


def is_accumulating(progress: Mapping[str, Any], every: int) -> bool:
    """Whether gradients wait for more batches at this place.

    Args:
        progress: ``loops.fit_loop`` of a checkpoint.
        every: ``accumulate_grad_batches``.
    """
    batches = progress["epoch_loop.batch_progress"]
    return bool(batches["current"]["ready"] % every) and not batches["is_last_batch"]


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients that a module holds, by their parameters' names, on the CPU."""
    held = [(clean_name(name), p.grad) for name, p in module.named_parameters() if p.requires_grad]
    return {name: grad.detach().cpu() for name, grad in held if grad is not None}


def put_back(module: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Give a module's parameters the gradients that `gradients` gave."""
    for name, parameter in module.named_parameters():
        grad = kept.get(clean_name(name))
        if grad is not None and grad.shape == parameter.shape:
            parameter.grad = grad.to(parameter.device, parameter.dtype, copy=True)


def _plateaus(trainer: Trainer) -> list[tuple[int, Any]]:
    return [(i, config) for i, config in enumerate(trainer.lr_scheduler_configs) if config.reduce_on_plateau]


def _metrics(trainer: Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
