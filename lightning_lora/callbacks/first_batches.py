# SPDX-License-Identifier: Apache-2.0
"""First batches: what a run is about to train on goes through the module once before, without a trace in the run."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.hooks import DataHooks
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import Metric

from lightning_lora.callbacks.aside import without_loggers
from lightning_lora.errors import UnsupportedError
from lightning_lora.io.mixed_loader import apart
from lightning_lora.io.resumable import ResumableLoader, same_draws

_INSTEAD = "call `eva_start(model, batches)` on the converted model before the run"


class FirstBatches:
    """The first batches of a run's train loader, and the module's ``training_step`` on each, in its place.

    Random states, the loader's place, generators of its sampler, loggers and metrics are as before; ``log`` does
    nothing. Worker processes are not used.

    Args:
        trainer: In ``on_train_start``.
        pl_module: Its module.
        count: How many batches, if there are so many.

    Raises:
        UnsupportedError: The loader cannot be read without moving it, or there are several; or the module optimizes
            by hand, which its ``training_step`` would do here too.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, count: int) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self.count = int(min(count, trainer.num_training_batches))
        self.loader = _readable(trainer.train_dataloader)
        # As the class has it: callbacks may have put something of theirs around the module's own.
        self._step = type(pl_module).training_step
        takes = list(inspect.signature(self._step).parameters)[1:]
        if "dataloader_iter" in takes or not pl_module.automatic_optimization:
            raise UnsupportedError(
                f"{type(pl_module).__name__} optimizes by hand or reads its batches by itself in `training_step`, "
                f"which would train here already: {_INSTEAD}"
            )
        self._indexed, self._number = len(takes) > 1, 0

    def __iter__(self) -> Iterator[Any]:
        """The batches, on the module's device."""
        prepared = _before_transfer(self.trainer, self.pl_module)
        with same_draws(self.loader):
            for number, batch in enumerate(itertools.islice(iter(self.loader), self.count)):
                self._number = number
                yield self.trainer.strategy.batch_to_device(prepared(batch, 0), dataloader_idx=0)

    def run(self, module: nn.Module, batch: Any) -> None:
        """``training_step`` on what the iterator gave last."""
        with (
            without_loggers(self.trainer), _without_log(self.pl_module), _own_metrics(self.pl_module),
            self.trainer.precision_plugin.train_step_context(),
        ):  # fmt: skip
            batch = self.trainer.precision_plugin.convert_input(batch)
            self._step(self.pl_module, *((batch, self._number) if self._indexed else (batch,)))


def _readable(loader: Any) -> Any:
    """A copy that reads the same batches in this process, and leaves the run's own loader where it is."""
    leaves = tree_leaves(loader)
    loader, kind = leaves[0] if len(leaves) == 1 else loader, type(loader).__name__
    if not isinstance(loader, DataLoader):
        raise UnsupportedError(
            f'`init_lora_weights="eva"` reads the first batches of one `DataLoader`, and the run has a {kind}: '
            f"{_INSTEAD}"
        )
    if _has_own_state(loader):
        raise UnsupportedError(
            f'`init_lora_weights="eva"` cannot read the first batches of a {kind} over {type(loader.dataset).__name__} '
            f"and leave it at its beginning: it has a place or an `__iter__` of its own, or its data passes once only: "
            f"{_INSTEAD}"
        )
    copied = apart(loader)
    # Samplers may keep a place of their own: a copy of them is read, over the same data.
    same = {id(loader.dataset): loader.dataset}
    own = {name: copy.deepcopy(getattr(loader, name), same) for name in ("batch_sampler", "sampler", "generator")}
    vars(copied).update(num_workers=0, timeout=0, persistent_workers=False, prefetch_factor=None, _iterator=None, **own)
    return copied


def _has_own_state(loader: DataLoader) -> bool:
    if isinstance(loader, ResumableLoader) or _is_stateful(loader):
        return False
    if type(loader).__iter__ is not DataLoader.__iter__ or hasattr(loader, "state_dict"):
        return True
    return isinstance(loader.dataset, IterableDataset) and iter(loader.dataset) is loader.dataset


def _is_stateful(loader: DataLoader) -> bool:
    """Whether it is torchdata's, over data with indices: its place is in its iterator, of which a copy has another."""
    package = sys.modules.get("torchdata.stateful_dataloader")  # not loaded: no such loader can exist
    known = package is not None and isinstance(loader, package.StatefulDataLoader)
    return known and not isinstance(loader.dataset, IterableDataset)


def _before_transfer(trainer: Trainer, pl_module: LightningModule) -> Any:
    """The hook of whichever overrides it, as Lightning chooses: the data module first."""
    data: Any = getattr(trainer, "datamodule", None)
    if data is not None and type(data).on_before_batch_transfer is not DataHooks.on_before_batch_transfer:
        return data.on_before_batch_transfer
    return pl_module.on_before_batch_transfer


@contextmanager
def _without_log(pl_module: LightningModule) -> Iterator[None]:
    """``log`` and ``log_dict`` that do nothing: what comes before the first step is no step."""
    before: dict[str, Any] = {name: vars(pl_module)[name] for name in ("log", "log_dict") if name in vars(pl_module)}
    try:
        for name in ("log", "log_dict"):
            vars(pl_module)[name] = lambda *args, **kwargs: None
        yield
    finally:
        for name in ("log", "log_dict"):
            vars(pl_module).pop(name, None)
        vars(pl_module).update(before)


@contextmanager
def _own_metrics(pl_module: LightningModule) -> Iterator[None]:
    """Copies of the module's metrics in their places, so that these count nothing."""
    found = [
        (parent, own, child)
        for parent in pl_module.modules()
        if not isinstance(parent, Metric)
        for own, child in parent.named_children()
        if isinstance(child, Metric)
    ]
    try:
        for parent, own, child in found:
            setattr(parent, own, copy.deepcopy(child))
        yield
    finally:
        for parent, own, child in found:
            setattr(parent, own, child)
