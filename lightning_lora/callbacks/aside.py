# SPDX-License-Identifier: Apache-2.0
"""Validation aside: the run's own validation loop once more, in the middle of ``fit``, without a trace in the run."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage, TrainerFn

from lightning_lora.rng import preserve_rng


def validate_aside(trainer: Trainer) -> dict[str, float]:
    """What `Trainer.validate` would give for the model as it stands: the logged metrics by name.

    `Trainer.validate` itself cannot be called inside ``fit``: it sets the strategy up and takes it down. This is its
    loop, run as ``validate`` and not as ``fit``, so that no callback saves a checkpoint or stops the run for it. Random
    states, loggers (a user's code finds one that does nothing), the trainer's metrics and the modules' train flags are
    as before, on exceptions too. Every rank takes part.

    Args:
        trainer: with a validation loop, inside ``fit``.
    """
    loop = trainer.validate_loop
    modes = [(module, module.training) for module in trainer.lightning_module.modules()]
    verbose, loop.verbose = loop.verbose, False
    try:
        with (
            _kept(trainer.callback_metrics), _kept(trainer.logged_metrics), _kept(trainer.progress_bar_metrics),
            preserve_rng(), _as_validate(trainer), without_loggers(trainer),
        ):  # fmt: skip
            loop.run()
            return {name: float(value) for name, value in trainer.callback_metrics.items()}
    finally:
        loop.teardown()
        loop.verbose = verbose
        for module, mode in modes:
            module.training = mode


def is_of_run(trainer: Trainer) -> bool:
    """Whether the validation that ends now is one of the run's own: no sanity check, and none aside.

    Args:
        trainer: in ``on_validation_end``.
    """
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


@contextmanager
def _as_validate(trainer: Trainer) -> Iterator[None]:
    state = trainer.state
    before = state.fn, state.stage
    state.fn, state.stage = TrainerFn.VALIDATING, RunningStage.VALIDATING
    try:
        yield
    finally:
        state.fn, state.stage = before


@contextmanager
def without_loggers(trainer: Trainer) -> Iterator[None]:
    """Inside, the trainer's loggers are ones that do nothing."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


@contextmanager
def _kept(metrics: MutableMapping[str, Any]) -> Iterator[None]:
    """The trainer's own mapping, emptied inside and with its values again after."""
    before = dict(metrics)
    metrics.clear()
    try:
        yield
    finally:
        metrics.clear()
        metrics.update(before)
