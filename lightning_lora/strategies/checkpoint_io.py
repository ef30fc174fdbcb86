# SPDX-License-Identifier: Apache-2.0
"""`AtomicCheckpointIO`: Lightning's own checkpoint file, whole at any moment, compared with its digests when read.

`OrderedAsyncCheckpointIO` is Lightning's `AsyncCheckpointIO` that removes an old file after the new one is durable.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

from lightning_lora.errors import Notice, UnsupportedError
from lightning_lora.io.atomic import remove_folder
from lightning_lora.io.checkpoint_file import Pending, open_checkpoint, verify, write_checkpoint
from lightning_lora.io.distributed import is_distributed


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own format; a local file is written beside its target, synced and renamed over it.

    A removal waits for the saves that were announced by `expect` before it. Where the last of them fails, or has failed
    by then, the old file stays.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._expected: list[tuple[str, list[Callable[[], None]]]] = []  # saves to come, each with what waits for it
        self._failed = False  # whether the last save did
        self._folders: set[str] = set()  # where this process has saved

    def expect(self, path: str | Path) -> None:
        """Say that a save to `path` is on its way."""
        with self._lock:
            self._expected.append((os.fspath(path), []))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint``; a process killed at any moment leaves the old file or the new one.

        A folder of shards that stands at `path` is replaced like a file.
        """
        self._folders.add(_real_folder(path))
        try:
            if storage_options is not None or "://" in os.fspath(path):
                super().save_checkpoint(checkpoint, path, storage_options)
            else:
                write_checkpoint(checkpoint, path, over_folder=is_distributed(path))
        except BaseException:
            self._end(path, failed=True)
            raise
        self._end(path, failed=False)

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
        self.after_saves(lambda: self._remove(os.fspath(path)))

    def after_saves(self, work: Callable[[], None]) -> None:
        """Do `work` as soon as every save before is done; never where the last of them fails.

        Args:
            work: What needs the new file: removals of old ones, links to it.
        """
        with self._lock:
            if self._expected:
                self._expected[-1][1].append(work)
                return
            if self._failed:
                return
        work()

    def _end(self, path: str | Path, failed: bool) -> None:
        """Do what waited for the save to `path`; saves that were announced before it and never came are forgotten."""
        with self._lock:
            self._failed = failed
            places = [i for i, (expected, _) in enumerate(self._expected) if expected == os.fspath(path)]
            if not places:
                return
            del self._expected[: places[0]]
            _, waiting = self._expected[0]
        try:
            while not failed:
                with self._lock:
                    if not waiting:
                        del self._expected[0]  # with the lock held: what comes from here on is done at once
                        return
                    work = waiting.pop(0)
                work()
        except BaseException:
            failed = True
            raise
        finally:
            if failed:
                with self._lock:
                    del self._expected[0]

    def _remove(self, path: str) -> None:
        if ".." in PurePath(path).parts and _real_folder(path) not in self._folders:
            warnings.warn(f"{path} is not removed: it leads out of the folders of this run", Notice, stacklevel=3)
            return
        try:
            if os.path.isdir(path):
                left = remove_folder(path)
                if left is not None:
                    raise OSError(f"what is left of it is {left}")
            else:
                super().remove_checkpoint(path)
        except OSError as error:
            text = f"the old checkpoint {path} could not be removed ({error}): training goes on, remove it by hand"
            warnings.warn(text, Notice, stacklevel=3)


def after_saves(io: CheckpointIO, work: Callable[[], None]) -> None:
    """`AtomicCheckpointIO.after_saves` of a strategy's writer; at once where that is the user's own.

    Args:
        io: The strategy's ``checkpoint_io``.
        work: What needs the new file.
    """
    writer = io.checkpoint_io if isinstance(io, AsyncCheckpointIO) else io
    if isinstance(writer, AtomicCheckpointIO):
        writer.after_saves(work)
    else:
        work()


def _real_folder(path: str | Path) -> str:
    """The folder of a path, without ``..``."""
    return os.path.dirname(os.path.abspath(path))


class OrderedAsyncCheckpointIO(AsyncCheckpointIO):
    """Writes later, in a thread; `ModelCheckpoint` asks at once for the old file's removal, which waits its turn."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Announce the save to the writer and hand it to the thread."""
        if isinstance(self.checkpoint_io, AtomicCheckpointIO):
            self.checkpoint_io.expect(path)
        super().save_checkpoint(checkpoint, path, *args, **kwargs)
