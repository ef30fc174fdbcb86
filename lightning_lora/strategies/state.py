# SPDX-License-Identifier: Apache-2.0
"""`AdapterStateMixin`: a strategy that saves and loads adapters only, atomically, and resumes exactly.

Everything that a checkpoint's content depends on is here and nowhere else. A user's own strategy is given
the same behaviour by `attach`, so that there is one code path.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.errors import CheckpointError, Notice, WriteError
from lightning_lora.io.checkpoint import KEY, load_state, metadata
from lightning_lora.io.checkpoint_file import Pending, unmapped
from lightning_lora.io.distributed import is_distributed, read_distributed
from lightning_lora.io.progress import Place, lost_places, rewind, settle
from lightning_lora.io.resumable import resumable
from lightning_lora.model.apply import refuse_merged
from lightning_lora.model.inner import clean_name
from lightning_lora.model.optimizers import fitting_state, held_by
from lightning_lora.model.slots import is_adapted
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.ranks import gather, together
from lightning_lora.rng import RNGState
from lightning_lora.strategies.checkpoint_io import AtomicCheckpointIO, OrderedAsyncCheckpointIO
from lightning_lora.strategies.unfinished import Unfinished, gradients, is_accumulating, put_back, set_accumulation


class AdapterStateMixin(Strategy):
    """Put before a strategy's class: its checkpoints hold adapters, and resume is exact.

    The frozen base is never gathered, written or asked for; the user's own ``state_dict()`` stays whole.
    Each process's random state travels with training checkpoints, and is put back after every
    ``on_train_start`` hook when training resumes. What validation draws is not part of the run (resumed at
    a step where it is due, Lightning leaves it out), nor is what is drawn after training: however often it
    validates and saves, a run trains the same weights.
    """

    # Lightning's strategies have these, though their common base does not declare them.
    world_size: int
    is_global_zero: bool
    global_rank: int

    #: Whether a process holds the whole gradient of what it trains, and not a share of it.
    whole_gradients = True

    _resumed: tuple[Place, dict[str, Any]] | None = None  # where, and our entry in the checkpoint
    _unfinished: Unfinished  # made by `setup`
    _run_state: dict[str, Any] | None = None  # random state of the run, while something else may draw
    _ended_at: dict[str, Any] | None = None  # the loops' state at the end of training
    _said_modules = False
    _pending: Pending | None = None  # what is left to compare of the checkpoint that was read
    _read_from = "the checkpoint"  # for the texts of errors

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Lightning's plain writer made atomic; one of the user's own is left alone."""
        if isinstance(self._checkpoint_io, AsyncCheckpointIO):
            if type(self._checkpoint_io.checkpoint_io) in (type(None), TorchCheckpointIO):
                self._checkpoint_io._checkpoint_io = AtomicCheckpointIO()  # its own setter works once only
            if type(self._checkpoint_io) is AsyncCheckpointIO:
                self._checkpoint_io.__class__ = OrderedAsyncCheckpointIO
            return self._checkpoint_io
        current = super().checkpoint_io
        if type(current) is TorchCheckpointIO:
            self.checkpoint_io = current = AtomicCheckpointIO()
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
        module = self._converted_module()
        self._compare("state_dict")
        load_state(module, checkpoint, strict=strict, file=self._read_from)
        if "current_model_state" in checkpoint and isinstance(checkpoint, dict):
            # Lightning's weight averaging goes on to load two whole states from here.
            whole = {name: (clean_name(name), tensor) for name, tensor in module.state_dict().items()}
            for key in ("state_dict", "current_model_state"):
                kept = checkpoint[key]
                checkpoint[key] = {name: kept.get(clean, tensor) for name, (clean, tensor) in whole.items()}

    def whole_module(self, base: bool = False) -> torch.nn.Module | None:
        """The module on the first process, None on the others; every process calls it.

        Args:
            base: Whether the frozen base is wanted too, where the module is spread over processes.
        """
        return self._converted_module() if self.is_global_zero else None

    @property
    def steps_now(self) -> bool:
        """Whether the optimizer step that Lightning is about to take is one; DeepSpeed counts batches itself."""
        return True

    def held_by(self, optimizer: Optimizer) -> set[int]:
        """The ids of the module's parameters that an optimizer moves."""
        return held_by(optimizer)

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The gradient that the next step will use; every process calls it."""
        return parameter.grad

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Add the ``lightning_lora`` entry and write; called on every rank."""
        module = self._converted_module()
        entry = metadata(module)
        own = adapter_state_dict(module)
        names = {name: clean_name(name) for name in checkpoint["state_dict"]}  # hooks may have put in a whole state
        checkpoint["state_dict"] = {
            clean: checkpoint["state_dict"][name] for name, clean in names.items() if clean in own
        }
        self._leave_modules_out(checkpoint)
        with together(f"save {os.fspath(filepath)}", WriteError):
            if "optimizer_states" in checkpoint:  # not in weights-only checkpoints
                entry["rng"] = self._gather_random_states()
                if self._ended_at is not None:  # the loader has forgotten its place by now
                    checkpoint["loops"]["fit_loop"] = self._ended_at
                if self.world_size > 1:
                    loader = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader")
                    entry["loaders"] = gather(loader)
                entry |= self._unfinished.state(self._trainer, checkpoint["loops"]["fit_loop"])
                entry |= self._held_gradients(checkpoint["loops"]["fit_loop"])
            checkpoint[KEY] = entry
            self._write(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint and tell its place in the epoch as Lightning resumes it rightly."""
        self._pending = None
        checkpoint = self._read(checkpoint_path, weights_only)
        self._read_from = os.fspath(checkpoint_path)
        if "fit_loop" in checkpoint.get("loops", {}):
            fit_loop = checkpoint["loops"]["fit_loop"]
            settle(fit_loop)
            entry = checkpoint.get(KEY) or {}
            loaders = entry.get("loaders") or []
            if len(entry.get("rng", [])) not in (0, self.world_size):
                fit_loop["state_dict"].pop("combined_loader", None)  # of one rank's share of the data
            elif len(loaders) == self.world_size and loaders[self.global_rank] is not None:
                fit_loop["state_dict"]["combined_loader"] = loaders[self.global_rank]  # Lightning keeps rank 0's
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Lightning calls this when training resumes, and only then; so the random state is taken here."""
        self._compare("optimizer_states")
        self._load_optimizers(checkpoint)
        entry = checkpoint.get(KEY) or {}
        if "rng" not in entry:
            return
        states = entry["rng"]
        if len(states) != self.world_size:
            self._notice(
                f"the checkpoint was written by {len(states)} processes and is resumed by {self.world_size}: the "
                "adapters are the same; the random numbers are not, and the epoch's data begins anew"
            )
        self._run_state = self._ended_at = None
        progress = checkpoint["loops"]["fit_loop"]
        self._resumed = (settle(progress), {**entry, "progress": progress})
        _give_places(self._trainer.fit_loop, progress)
        self._restore_random_state(entry)

    def setup(self, trainer: Trainer) -> None:
        """Forget the run before."""
        self._unfinished = Unfinished()
        if trainer.state.fn == TrainerFn.FITTING:
            self._resumed = self._run_state = self._ended_at = None
        super().setup(trainer)

    def process_dataloader(self, dataloader: object) -> object:
        """A plain train loader is given a place in its epoch, which Lightning then keeps as it does torchdata's."""
        dataloader = super().process_dataloader(dataloader)
        return resumable(dataloader) if self._trainer.training else dataloader

    def on_train_start(self) -> None:
        """Lightning calls the strategy's hook after all callbacks' and the module's: the last before the loop."""
        super().on_train_start()
        self._validate_aside()
        if self._resumed is None:
            return
        (place, entry), self._resumed = self._resumed, None
        if place == "start":
            return
        if len(entry["rng"]) == self.world_size:  # else it was said that the epoch's data begins anew
            for loader in torch.utils._pytree.tree_leaves(self._trainer.train_dataloader):
                for text in lost_places(loader, place):
                    self._notice(text)
        if place == "inside":
            set_accumulation(self._trainer)
        for text in [*self._unfinished.finish(self._trainer, entry), *self._put_gradients_back(entry)]:
            self._notice(text)
        if place == "inside":
            _pass_validation_by(self._trainer.fit_loop)
        else:
            _begin_epoch(self._trainer.fit_loop)
        self._restore_random_state(entry)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step, of which something may be left to do when a checkpoint is written."""
        output = super().training_step(*args, **kwargs)
        self._unfinished.note_batch(self._trainer)
        return output

    def on_validation_start(self) -> None:
        """Metrics are about to change."""
        super().on_validation_start()
        self._unfinished.note_validation(self._trainer)

    def on_train_end(self) -> None:
        """What comes after training is not part of the run: a checkpoint saved later does not see it."""
        super().on_train_end()
        self._run_state = RNGState.capture().to_dict()
        self._ended_at = self._trainer.fit_loop.state_dict()

    def _validate_aside(self) -> None:
        """Training goes on after validation with the random state that it had before.

        Lightning calls no hook between the last of a batch and the making of the iterator over validation's data,
        which draws already.
        """
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        validate = type(loop).run

        def aside() -> Any:
            self._run_state = RNGState.capture().to_dict()
            found = validate(loop)
            RNGState.from_dict(self._run_state).restore()
            return found

        loop.run = aside  # type: ignore[method-assign]

    def _restore_random_state(self, entry: Mapping[str, Any]) -> None:
        if self.global_rank < len(entry["rng"]):  # a process that was not there has none
            RNGState.from_dict(entry["rng"][self.global_rank]).restore()

    def _held_gradients(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        """Of each process what the next step will add to; an empty list where there are some and none is kept."""
        module = self._converted_module()
        manual = not self.lightning_module.automatic_optimization  # type: ignore[union-attr]
        if not manual and not is_accumulating(progress, self._trainer.accumulate_grad_batches):
            return {}
        held = gather(gradients(module)) if self.whole_gradients else []
        some = any(held) or any(p.grad is not None for p in module.parameters())
        return {"gradients": held} if some or not manual else {}

    def _put_gradients_back(self, entry: Mapping[str, Any]) -> Iterator[str]:
        automatic = self.lightning_module.automatic_optimization  # type: ignore[union-attr]
        accumulating = is_accumulating(entry["progress"], self._trainer.accumulate_grad_batches)
        if not (accumulating if automatic else "gradients" in entry):
            return
        kept = entry.get("gradients", [])
        if len(kept) == self.world_size:
            put_back(self._converted_module(), kept[self.global_rank])
        else:
            yield (
                "the checkpoint was written between two batches whose gradients are accumulated, and those of the "
                "first are not in it (sharded models' are not kept): they are missing from the next step. Save after "
                "an optimizer step and, in manual optimization, its `zero_grad`"
            )

    def _write(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None) -> None:
        """Bring a checkpoint to the disk; called on every rank."""
        super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def _read(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        """A checkpoint of one file, or of shards that any number of processes wrote."""
        if is_distributed(path):
            return read_distributed(path, self._shard_like, optimizers=self._trainer.state.fn == TrainerFn.FITTING)
        writer = self.checkpoint_io
        if isinstance(writer, AsyncCheckpointIO):
            writer = writer.checkpoint_io or writer
        if not isinstance(writer, AtomicCheckpointIO):
            return writer.load_checkpoint(path, weights_only=weights_only)
        checkpoint, self._pending = writer.open_checkpoint(path, weights_only=weights_only)
        return checkpoint

    def _compare(self, entry: str) -> None:
        """See that what is about to be used of a checkpoint is what was written."""
        if self._pending is not None:
            self._pending.check(entry)

    def _load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        checkpoint = unmapped(checkpoint, "optimizer_states", self.root_device)
        pairs = zip(checkpoint["optimizer_states"], self.optimizers, strict=False)
        fitting = [fitting_state(state, optimizer) for state, optimizer in pairs]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": fitting})

    def _shard_like(self, name: str) -> Tensor | None:
        """The sharded tensor that a tensor of a distributed checkpoint will be copied into."""
        return None

    def _converted_module(self) -> torch.nn.Module:
        module = self.lightning_module
        if module is not None and not is_adapted(module):
            refuse_merged(module)
        if module is None or not is_adapted(module):
            raise CheckpointError(
                f"`{type(self).__name__}` saves and loads adapters, and the module has none: add the "
                "`lightning_lora.LoRA` callback, or call `apply_lora(self, config)` in `configure_model`"
            )
        return module

    @property
    def _trainer(self) -> Trainer:
        return self.lightning_module.trainer  # type: ignore[union-attr]

    def _leave_modules_out(self, checkpoint: dict[str, Any]) -> None:
        """A module among the hyperparameters is the model once more, base and all."""
        values = checkpoint.get("hyper_parameters") or {}
        leaves = torch.utils._pytree.tree_leaves
        held = [k for k, v in values.items() if any(isinstance(x, torch.nn.Module) for x in leaves(v))]
        if not held:
            return
        checkpoint["hyper_parameters"] = {key: value for key, value in values.items() if key not in held}
        if not self._said_modules:
            self._said_modules = True
            self._notice(
                f"the hyperparameters {held} are modules and are not written into checkpoints: pass them to "
                "`load_from_checkpoint`, and leave them out by `save_hyperparameters(ignore=...)`"
            )

    def _notice(self, text: str) -> None:
        if self.global_rank == 0:  # every rank would say the same
            warnings.warn(text, Notice, stacklevel=3)

    def _gather_random_states(self) -> list[dict[str, Any]]:
        """The run's random state on each process."""
        aside = self._ended_at is not None or (self._trainer.validating and self._trainer.state.fn == TrainerFn.FITTING)
        return gather(self._run_state if aside and self._run_state is not None else RNGState.capture().to_dict())


def _give_places(fit_loop: _FitLoop, progress: Mapping[str, Any]) -> None:
    """Let loaders go on that were made, and begun, before the checkpoint was read.

    `Trainer.estimated_stepping_batches` does that in `configure_optimizers`; Lightning gives places to later ones only.
    """
    made = torch.utils._pytree.tree_leaves(fit_loop.trainer.train_dataloader)
    places = progress["state_dict"].get("combined_loader") or []
    pairs = list(zip([x for x in made if hasattr(x, "load_state_dict")], places, strict=False))
    for loader, place in pairs:
        loader.load_state_dict(place)
    if pairs and fit_loop._data_fetcher is not None:
        iter(fit_loop._data_fetcher)


def _begin_epoch(fit_loop: _FitLoop) -> None:
    """Begin the epoch as any other: the iterator that Lightning made on restart drew from another random state."""
    for loader in torch.utils._pytree.tree_leaves(fit_loop.trainer.train_dataloader):
        rewind(loader)
    fit_loop.restarting = False
    fit_loop.epoch_loop.on_iteration_done()
    fit_loop.on_iteration_done()


def _pass_validation_by(fit_loop: _FitLoop) -> None:
    """Where validation is due, Lightning pretends to have run it, and draws for it; after validation it does not."""
    loop = fit_loop.epoch_loop
    if loop.restarted_on_train_batch_end and loop._should_check_val_fx(fit_loop._data_fetcher):  # type: ignore[arg-type]
        module = fit_loop.trainer.lightning_module
        if not module.automatic_optimization:
            module.on_validation_model_zero_grad()  # Lightning forgets what manual optimization accumulates there
        loop.batch_progress.increment_completed()
        loop.update_restart_stage()
