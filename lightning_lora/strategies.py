# SPDX-License-Identifier: Apache-2.0
"""`AdapterStateMixin`: a strategy that saves and loads adapters only, atomically, and resumes exactly.

Everything that a checkpoint's content depends on is here and nowhere else. A user's own strategy is given
the same behaviour by `attach`, so that there is one code path.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lightning_lora.errors import CheckpointError, ConfigError, Notice, UnsupportedError
from lightning_lora.io.atomic import atomic_write
from lightning_lora.io.checkpoint import KEY, load_state, metadata
from lightning_lora.model.apply import adapter_state_dict, is_adapted
from lightning_lora.rng import RNGState


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own format; a local file is written beside its target, synced and renamed over it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; a process killed at any moment leaves the old file or the new one."""
        if storage_options is not None or "://" in os.fspath(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(path) as part:
            torch.save(checkpoint, part)


class AdapterStateMixin(Strategy):
    """Put before a strategy's class: its checkpoints hold adapters, and resume is exact.

    The frozen base is never gathered, written or asked for; the user's own ``state_dict()`` stays whole.
    Each process's random state travels with training checkpoints. It is put back when training resumes:
    before the loader's iterator is made where the next thing is a new epoch (it draws the order), and after
    every ``on_train_start`` hook where the cut was inside one (the iterator stands already).
    """

    # Lightning's strategies have these, though their common base does not declare them.
    world_size: int
    global_rank: int

    _resumed: dict[str, Any] | None = None
    _at_train_end: dict[str, Any] | None = None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's plain writer made atomic; one of the user's own is left alone."""
        current = super().checkpoint_io
        if type(current) is TorchCheckpointIO:
            self.checkpoint_io = current = AtomicCheckpointIO()
        elif isinstance(current, AsyncCheckpointIO) and type(current.checkpoint_io) is TorchCheckpointIO:
            current.checkpoint_io = AtomicCheckpointIO()
        return current

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO | None) -> None:
        Strategy.checkpoint_io.fset(self, io)  # type: ignore[attr-defined]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The adapters and ``modules_to_save``, and nothing of the frozen base."""
        module = self._converted_module()
        return dict(adapter_state_dict(module))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load adapters; every one of them must be in the checkpoint and fit."""
        load_state(self._converted_module(), checkpoint, strict=strict)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Add the ``lightning_lora`` entry and write; called on every rank."""
        entry = metadata(self._converted_module())
        if "loops" in checkpoint:
            entry.update(self._training_state())
        checkpoint[KEY] = entry
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Lightning calls this when training resumes, and only then; so the random state is taken here."""
        super().load_optimizer_state_dict(checkpoint)
        entry = checkpoint.get(KEY) or {}
        if "rng" not in entry:
            return
        states = entry["rng"]
        if len(states) != self.world_size:
            _notice(
                f"the checkpoint was written by {len(states)} processes and is resumed by {self.world_size}: the "
                "adapters are the same, the order of the data and the random numbers are not"
            )
        if entry["after_fit"]:
            _notice(
                "the checkpoint was saved after `fit` had returned: its place in the epoch may be lost. Use "
                "`ModelCheckpoint(save_last=True)` to resume exactly"
            )
        if self.global_rank < len(states):
            mid_epoch = _is_mid_epoch(checkpoint["loops"]["fit_loop"])
            self._resumed = {"state": states[self.global_rank], "mid_epoch": mid_epoch}
            RNGState.from_dict(states[self.global_rank]).restore()

    def on_train_start(self) -> None:
        """Lightning calls the strategy's hook after all callbacks' and the module's."""
        super().on_train_start()
        self._at_train_end = None
        resumed, self._resumed = self._resumed, None
        if resumed is not None and resumed["mid_epoch"]:
            self._check_loaders()
            RNGState.from_dict(resumed["state"]).restore()

    def on_train_end(self) -> None:
        """What is drawn after training is not part of the run: a checkpoint saved later does not see it."""
        super().on_train_end()
        self._at_train_end = RNGState.capture().to_dict()

    def _converted_module(self) -> torch.nn.Module:
        module = self.lightning_module
        if module is None or not is_adapted(module):
            raise CheckpointError(
                f"`{type(self).__name__}` saves and loads adapters, and the module has none: add the "
                "`lightning_lora.LoRA` callback, or call `apply_lora(self, config)` in `configure_model`"
            )
        return module

    def _training_state(self) -> dict[str, Any]:
        own = self._at_train_end or RNGState.capture().to_dict()
        states: list[Any] = [own]
        if self.world_size > 1:
            states = [None] * self.world_size
            torch.distributed.all_gather_object(states, own)
        return {"rng": states, "after_fit": self._at_train_end is not None}

    def _check_loaders(self) -> None:
        """Say which train loader cannot go on inside an epoch."""
        module = self.lightning_module
        loaders = torch.utils._pytree.tree_leaves(module.trainer.train_dataloader) if module else []
        for loader in loaders:
            if not hasattr(loader, "load_state_dict"):
                _notice(
                    f"the train loader ({type(loader).__name__}) cannot go on inside an epoch: it starts the epoch "
                    "anew, so this run will see other batches than an uncut one. Use torchdata's `StatefulDataLoader`"
                )
            elif self.world_size > 1 and _draws_own_order(loader):
                _notice(
                    "the shuffled train loader has a sampler without a state (Lightning's own on several "
                    "processes): the resumed epoch has another order. Use torchdata's "
                    "`StatefulDistributedSampler(dataset, seed=...)`"
                )


class AdapterSingleDeviceStrategy(AdapterStateMixin, SingleDeviceStrategy):
    """One device, adapter-only checkpoints. As ``strategy="lora"`` it takes the device that the Trainer chose."""

    strategy_name = "lora"

    def __init__(self, device: str | torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(device=device or "cpu", **kwargs)
        self._chosen: list[torch.device] | None = [torch.device(device)] if device is not None else None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device; None until the Trainer fills it in."""
        return self._chosen

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise ConfigError(
                f'`strategy="lora"` runs on one device, got `devices={len(devices)}`; use "lora_ddp" for several'
            )
        self._chosen = devices

    @property
    def root_device(self) -> torch.device:
        """Where the model lives."""
        return self._chosen[0] if self._chosen else torch.device("cpu")


class AdapterDDPStrategy(AdapterStateMixin, DDPStrategy):
    """`DDPStrategy` with adapter-only checkpoints; ``strategy="lora_ddp"``."""

    strategy_name = "lora_ddp"


def register_strategies() -> None:
    """Make ``strategy="lora"`` and ``"lora_ddp"`` known to the Trainer. Calling it again does nothing."""
    for strategy in (AdapterSingleDeviceStrategy, AdapterDDPStrategy):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(
                strategy.strategy_name, strategy, description=(strategy.__doc__ or "").split("\n")[0]
            )


def attach(strategy: Strategy) -> None:
    """Give a strategy of the user's the behaviour of `AdapterStateMixin`, in place.

    Raises:
        UnsupportedError: The strategy is not one whose checkpoints this version can keep to adapters, or it
            launches by ``spawn`` or ``fork``: the adapters would not come back from the processes it starts.
    """
    kind = type(strategy)
    if getattr(strategy.launcher, "_start_method", None) is not None:  # no public way to tell the launchers apart
        raise UnsupportedError(
            f"`strategy={kind.__name__}` starts its processes by spawn or fork: the trained adapters would be lost "
            'with them. Use `strategy="ddp"`'
        )
    if isinstance(strategy, AdapterStateMixin):
        return
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise UnsupportedError(
            f"`LoRA` does not work with `{kind.__name__}` in this version; it works on a single device and with "
            '`strategy="ddp"`'
        )
    strategy.__class__ = type(f"Adapter{kind.__name__}", (AdapterStateMixin, kind), {})


def _is_mid_epoch(fit_loop: Mapping[str, Any]) -> bool:
    progress = fit_loop["epoch_loop.batch_progress"]
    return progress["current"]["ready"] > 0 and not progress["is_last_batch"]


def _draws_own_order(loader: DataLoader) -> bool:
    sampler = getattr(loader, "sampler", None)
    if hasattr(sampler, "state_dict") or isinstance(sampler, SequentialSampler):
        return False
    return not isinstance(sampler, DistributedSampler) or sampler.shuffle


def _notice(text: str) -> None:
    warnings.warn(text, Notice, stacklevel=3)
