# SPDX-License-Identifier: Apache-2.0
"""`AdapterCheckpoint`: a `ModelCheckpoint` whose every kept checkpoint also stands beside it as an adapter folder.

::

    adapters/epoch=0-step=100.ckpt    Lightning's checkpoint: resumes, adapters only
    adapters/epoch=0-step=100/        the same adapters in PEFT's layout
    adapters/last.ckpt, adapters/last/
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_lora.errors import CheckpointError, ConfigError, Notice, UnsupportedError, WriteError
from lightning_lora.io.adapter import save_adapter
from lightning_lora.io.atomic import atomic_link, clean_leftovers, remove_folder
from lightning_lora.io.folder import check_target
from lightning_lora.io.peft_config import peft_config
from lightning_lora.model.slots import is_adapted
from lightning_lora.ranks import together
from lightning_lora.strategies.checkpoint_io import after_saves
from lightning_lora.strategies.registry import whole_module


class AdapterCheckpoint(ModelCheckpoint):
    """Keeps the ``save_top_k`` best checkpoints by ``monitor`` and the ``keep_last_n`` most recent ones.

    A checkpoint that is in either set stays. Each has an adapter folder beside it, named like the file
    without ``.ckpt``, that PEFT loads over the same base; it is written as a whole by the first process and
    removed with its checkpoint.

    Example::

        AdapterCheckpoint(dirpath="adapters", monitor="val_loss", save_top_k=3, keep_last_n=2)

    Args:
        dirpath: Local folder for checkpoints and adapter folders; the logger's folder if null.
        filename: Name template without suffix, e.g. ``"{step}-{val_loss:.2f}"``.
        monitor: Logged quantity that `save_top_k` ranks by.
        keep_last_n: How many of the most recent checkpoints to keep beside the best ones; 0 for none.
        kwargs: Every other argument of Lightning's `ModelCheckpoint`, with its meaning: ``mode``,
            ``save_top_k``, ``save_last``, ``every_n_train_steps``, ``save_weights_only`` ...

    Raises:
        ConfigError: `keep_last_n` is negative.
        UnsupportedError: `dirpath` is no local folder, or PEFT's format cannot express the adapters.
        CheckpointError: The model has no adapters, or a folder that is no adapter folder stands in the way.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        *,
        keep_last_n: int = 0,
        **kwargs: Any,
    ) -> None:
        if not isinstance(keep_last_n, int) or isinstance(keep_last_n, bool) or keep_last_n < 0:
            raise ConfigError(f"`keep_last_n` must be an integer of at least 0, got {keep_last_n!r}")
        super().__init__(dirpath=dirpath, filename=filename, monitor=monitor, **kwargs)
        self.keep_last_n = keep_last_n
        self._recent: list[str] = []  # oldest first; one more than `keep_last_n` while a new one is written

    @property
    def best_adapter_path(self) -> str:
        """The adapter folder of the best checkpoint; empty before there is one."""
        return adapter_path(self.best_model_path)

    @property
    def recent(self) -> list[str]:
        """The `keep_last_n` most recent checkpoints, oldest first."""
        return list(self._recent)

    @property
    def last_adapter_path(self) -> str:
        """The adapter folder of ``last.ckpt``; empty without `save_last`."""
        return adapter_path(self.last_model_path)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what is no local folder."""
        super().setup(trainer, pl_module, stage)
        if "://" in str(self.dirpath):
            raise UnsupportedError(
                f"`dirpath` {str(self.dirpath)!r}: adapter folders are written to local disks only; "
                "use a local folder, or Lightning's ModelCheckpoint for checkpoints alone"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See now, and not at the first save, that the adapters can be written."""
        if not is_adapted(pl_module):
            raise CheckpointError(
                "AdapterCheckpoint: the model has no adapters; add the `LoRA` callback, "
                "or use Lightning's ModelCheckpoint"
            )
        peft_config(pl_module)
        if trainer.is_global_zero and self.dirpath is not None and os.path.isdir(self.dirpath):
            clean_leftovers(self.dirpath)

    def state_dict(self) -> dict[str, Any]:
        """ModelCheckpoint's state and the most recent checkpoints."""
        return {**super().state_dict(), "recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; as ModelCheckpoint does, what lies in another `dirpath` is forgotten."""
        super().load_state_dict(state_dict)
        if state_dict.get("dirpath") == self.dirpath:
            self._recent = list(state_dict.get("recent", []))

    # ModelCheckpoint has no public way to see what it writes and removes. These four methods are where its
    # subclasses have hooked in since Lightning 1.x; the tests run each of them through a Trainer.

    def _save_topk_checkpoint(self, trainer: pl.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        before = self._last_checkpoint_saved, self._last_global_step_saved
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        saved = (self._last_checkpoint_saved, self._last_global_step_saved) != before
        if self.keep_last_n and not saved:  # not among the best: kept as one of the most recent
            path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer)
            self._save_checkpoint(trainer, path)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if self.keep_last_n and filepath != self.last_model_path:
            # before the save, since the list is part of the state that is saved
            self._recent = [p for p in self._recent if p != filepath] + [filepath]
        folder = adapter_path(filepath)
        with together(f"save {folder}", WriteError):
            if trainer.is_global_zero:
                check_target(folder)
        super()._save_checkpoint(trainer, filepath)
        with together(f"save {folder}", WriteError):
            module = whole_module(trainer)
            if module is not None:
                save_adapter(module, folder)
        while len(self._recent) > self.keep_last_n:
            old = self._recent.pop(0)
            if not self._is_among_best(old) and self._should_remove_checkpoint(trainer, old, filepath):
                self._remove_checkpoint(trainer, old)

    def _remove_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        if filepath in self._recent:
            return  # no longer among the best, still among the most recent
        last, newest = self.last_model_path, self._last_checkpoint_saved

        def let_go() -> None:
            if os.path.islink(last) and os.path.realpath(last) == os.path.realpath(filepath):
                _link(newest, last)  # else it would point to nothing until Lightning links anew
            _remove_adapter(adapter_path(filepath))

        with together(f"remove {filepath}", WriteError):
            if trainer.is_global_zero:
                after_saves(trainer.strategy.checkpoint_io, let_go)
            super()._remove_checkpoint(trainer, filepath)

    @staticmethod
    def _link_checkpoint(trainer: pl.Trainer, filepath: str, linkpath: str) -> None:
        with together(f"link {linkpath}", WriteError):
            if trainer.is_global_zero:
                link = adapter_path(linkpath)
                if not os.path.islink(link):
                    check_target(link)
                if os.path.abspath(filepath) != os.path.abspath(linkpath):
                    after_saves(trainer.strategy.checkpoint_io, lambda: _link(filepath, linkpath))

    def _is_among_best(self, filepath: str) -> bool:
        """Whether ModelCheckpoint still keeps a checkpoint as one of its own."""
        if self.save_top_k == -1:
            return True
        if self.save_top_k == 0:
            return False
        return filepath in self.best_k_models or filepath == self.best_model_path


def _link(checkpoint: str, link: str) -> None:
    """Make ``last.ckpt`` and the folder beside it links to a checkpoint and its folder."""
    atomic_link(link, checkpoint)
    atomic_link(adapter_path(link), adapter_path(checkpoint))


def _remove_adapter(folder: str) -> None:
    """Remove a checkpoint's adapter folder; one in which a user has put something stays."""
    try:
        if not os.path.islink(folder):
            check_target(folder)
    except CheckpointError:
        text = f"{folder} is kept though its checkpoint is removed: it holds more than an adapter"
        warnings.warn(text, Notice, stacklevel=2)
        return
    remove_folder(folder)


def adapter_path(checkpoint: str) -> str:
    """The adapter folder beside a checkpoint: its path without ``.ckpt``.

    Args:
        checkpoint: Path of a checkpoint; an empty one gives an empty one.
    """
    if checkpoint and not checkpoint.endswith(".ckpt"):  # a changed FILE_EXTENSION: the file's name is taken
        return f"{checkpoint}.adapter"
    return checkpoint.removesuffix(".ckpt")
