# SPDX-License-Identifier: Apache-2.0
"""`AtomicCheckpointIO`: Lightning's own checkpoint file, whole at any moment, compared with its digests when read.

`OrderedAsyncCheckpointIO` is Lightning's `AsyncCheckpointIO` that removes an old file after the new one is durable.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_lora.errors import Notice, UnsupportedError
from lightning_lora.io.checkpoint_file import Pending, open_checkpoint, verify, write_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own format; a local file is written beside its target, synced and renamed over it.

    A removal waits for the saves that were announced by `expect` before it; where the last of them fails, the old
    file stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._expected: list[tuple[str, list[str]]] = []  # saves to come, each with the removals that wait for it

    def expect(self, path: str | Path) -> None:
        """Say that a save to `path` is on its way."""
        with self._lock:
            self._expected.append((os.fspath(path), []))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; a process killed at any moment leaves the old file or the new one."""
        due: list[str] = []
        try:
            if storage_options is not None or "://" in os.fspath(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write_checkpoint(checkpoint, path)
            due = self._removals(path)
        except BaseException:
            self._removals(path)
            raise
        for old in due:
            self._remove(old)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; every tensor is compared with its digest, and no pickle is run."""
        checkpoint, pending = self.open_checkpoint(path, map_location, weights_only)
        pending.check()
        return checkpoint

    def open_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> tuple[dict[str, Any], Pending]:
        """The same, with what is to be compared before adapters and optimizers are used."""
        if weights_only is False:
            raise UnsupportedError(
                f"`weights_only=False` for {os.fspath(path)}: pickles are not loaded, they run what they are told to. "
                "Leave it out, and name classes of your own in `torch.serialization.add_safe_globals`"
            )
        if "://" not in os.fspath(path):
            return open_checkpoint(path, map_location)
        checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
        return checkpoint, verify(checkpoint, path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file as soon as every save before is done."""
        with self._lock:
            if self._expected:
                self._expected[-1][1].append(os.fspath(path))
                return
        self._remove(os.fspath(path))

    def _removals(self, path: str | Path) -> list[str]:
        """What waited for the save to `path`; saves that were announced before it and never came are forgotten."""
        with self._lock:
            places = [i for i, (expected, _) in enumerate(self._expected) if expected == os.fspath(path)]
            if not places:
                return []
            _, removals = self._expected[places[0]]
            del self._expected[: places[0] + 1]
            return removals

    def _remove(self, path: str) -> None:
        try:
            super().remove_checkpoint(path)
        except OSError as error:
            text = f"the old checkpoint {path} could not be removed ({error}): training goes on, remove it by hand"
            warnings.warn(text, Notice, stacklevel=3)


class OrderedAsyncCheckpointIO(AsyncCheckpointIO):
    """Writes later, in a thread; `ModelCheckpoint` asks at once for the old file's removal, which waits its turn."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Announce the save to the writer and hand it to the thread."""
        if isinstance(self.checkpoint_io, AtomicCheckpointIO):
            self.checkpoint_io.expect(path)
        super().save_checkpoint(checkpoint, path, *args, **kwargs)
