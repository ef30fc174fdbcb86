# SPDX-License-Identifier: Apache-2.0
"""Rows about what cannot be written: disks that are full, folders that may not be written to, names that are taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import nn

from lightning_lora import (
    AdapterCheckpoint,
    LoRA,
    LoRAConfig,
    MergeOnFitEnd,
    apply_lora,
    load_adapter,
    merge_to_disk,
    save_adapter,
)
from lightning_lora.errors import Notice
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.merged_folder import write_merged
from tests.bad_input.row import Row, forked, full_disk, without_rights
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore")

ROOM = 30_000  # bytes; less than any of the files
FOR_FOLDERS = 100_000  # bytes; more than an adapter folder's, less than a checkpoint's
FULL, MAY_NOT = "could not be written: File too large", "could not be written: Permission denied"
WAS = "What stood there before is as it was"


def adapted(seed: int = 0) -> nn.Module:
    torch.manual_seed(0)
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=32))
    return random_adapters(model, seed)


def write_checkpoint(path: Path) -> None:
    trainer = make_trainer(path.parent, [LoRA(r=32)], max_steps=1)
    trainer.fit(LM(TinyNet()), loader())
    trainer.save_checkpoint(path)


def write_adapter(path: Path) -> None:
    save_adapter(adapted(), path)


def write_merge(path: Path) -> None:
    write_merged(adapted(), path)


def write_transformers(path: Path) -> None:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4))
    write_merged(model, path)


def merge_on_disk(path: Path) -> None:
    source = path.parent / "source"
    if not source.is_dir():
        tiny_llama().save_pretrained(source / "base")
        model = tiny_llama()
        apply_lora(model, LoRAConfig(r=4))
        save_adapter(random_adapters(model), source / "adapter")
    merge_to_disk(source / "base", source / "adapter", path)


#: What is written, by the first part of a row's name.
WRITERS: dict[str, Callable[[Path], None]] = {
    "checkpoint": write_checkpoint, "adapter": write_adapter, "merge": write_merge,
    "transformers": write_transformers, "disk": merge_on_disk,
}  # fmt: skip


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


ROWS = [
    *(Row(f"{kind}-disk-full", "WriteError", f"{FULL}. {WAS} ... Make room there") for kind in WRITERS),
    *(Row(f"{kind}-no-permission", "WriteError", f"{MAY_NOT}. {WAS} ... Give this user write permission")
      for kind in ("checkpoint", "adapter")),
    Row("merge-no-permission", "MergeError", "is not writable: choose another folder"),
    Row("checkpoint-over-a-folder", "CheckpointError", "a folder stands there ... choose another path", a_folder),
    Row("adapter-over-a-file", "CheckpointError", "a file stands there: move it", a_file),
    Row("adapter-over-other-things", "CheckpointError", "is not replaced. Choose another folder", a_folder),
    Row("merge-over-a-file", "MergeError", "is a file: choose another path", a_file),
    Row("merge-over-other-things", "MergeError", "it is not overwritten. Choose another folder", a_folder),
]  # fmt: skip


def contents(path: Path) -> Any:
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, tmp_path: Path) -> None:
    path = tmp_path / "out" / "target"
    path.parent.mkdir()
    write = WRITERS[row.name.split("-")[0]]
    taken = "-over-" in row.name
    if taken:
        row.make(path)
    elif row.name == "merge-no-permission":
        path.parent.chmod(0o500)
    else:
        write(path)
    before = contents(path)
    if row.name.endswith("no-permission"):
        path.parent.chmod(0o500)
        prepare: Callable[[], None] = without_rights
    else:
        prepare = full_disk(ROOM) if not taken else lambda: None
    _, kind, text = forked(lambda: write(path), prepare)
    path.parent.chmod(0o700)
    row.check(kind, text, file=path)
    assert contents(path) == before
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []  # nothing half written is left
    if not taken:
        write(path)  # with room again


class FullAfter(L.Callback):
    """The disk is full from some step on, and not before a checkpoint stands in `folder`, if one is named."""

    def __init__(self, step: int, folder: Path | None = None, room: int = ROOM) -> None:
        self.step, self.folder, self.room = step, folder, room

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            deadline = time.monotonic() + 240
            while self.folder is not None and not any(self.folder.glob("*.ckpt")):
                assert time.monotonic() < deadline, "no checkpoint was written"
                time.sleep(0.01)  # a writer of its own may be behind the run by any number of steps
            full_disk(self.room)()


def run(folder: Path, *callbacks: L.Callback, ckpt: Path | None = None, **kwargs: Any) -> L.Trainer:
    torch.manual_seed(0)
    trainer = make_trainer(folder, [LoRA(r=32), *callbacks], **{"max_steps": 4, **kwargs})
    trainer.fit(LM(TinyNet()), loader(), ckpt_path=ckpt)
    return trainer


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)


def adapters_every_step(folder: Path) -> AdapterCheckpoint:
    return AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)


class SlowFolders(AdapterCheckpoint):
    """Its checkpoint has failed before the old one's removal is asked for."""

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        time.sleep(0.3)
        super()._remove_checkpoint(trainer, filepath)


def slow_folders(folder: Path) -> AdapterCheckpoint:
    return SlowFolders(folder, filename="{step}", every_n_train_steps=1, save_top_k=1)


RUNS = [
    Row("run-disk-full", "WriteError", f"{FULL}. {WAS} ... Make room there",
        lambda d: run(d, FullAfter(2), every_step(d))),
    Row("run-disk-full-async", "WriteError", f"{FULL}. {WAS} ... Make room there",
        lambda d: run(d, FullAfter(2, d), every_step(d), plugins=[AsyncCheckpointIO()])),
    Row("run-disk-full-adapters", "WriteError", f"{FULL}. {WAS} ... Make room there",
        lambda d: run(d, FullAfter(2), adapters_every_step(d))),
    Row("run-disk-full-adapters-async", "WriteError", f"{FULL}. {WAS} ... Make room there",
        lambda d: run(d, FullAfter(2, d, FOR_FOLDERS), slow_folders(d), enable_checkpointing=True,
                      plugins=[AsyncCheckpointIO()])),
]  # fmt: skip


@pytest.mark.parametrize("row", RUNS, ids=lambda row: row.name)
def test_a_run_on_a_full_disk_ends_and_goes_on_from_its_last_checkpoint(row: Row, tmp_path: Path) -> None:
    _, kind, text = forked(lambda: row.make(tmp_path))
    later = row.name.endswith("async")  # the save of step 2 may meet the full disk already
    row.check(kind, text, file=tmp_path / ("step=" if later else "step=3"))
    (kept,) = tmp_path.glob("*.ckpt")  # the old one is not removed
    assert read_checkpoint(kept)["global_step"] in ((1, 2) if later else (2,))
    if row.name.endswith("adapters"):
        load_adapter(LM(TinyNet()), tmp_path / "step=2")
    assert run(tmp_path, ckpt=kept).global_step == 4


GOES_ON = Row("run-old-file-stays", "Notice", "could not be removed ... training goes on, remove it by hand")
MERGE = Row("run-disk-full-at-merge", "WriteError", f"{FULL}. {WAS} ... Make room there")


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(tmp_path: Path) -> None:
    class InTheWay(L.Callback):
        """Puts a folder that may not be emptied in the place of the old file."""

        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                (tmp_path / "step=1.ckpt").rename(tmp_path / "kept.ckpt")
                a_folder(tmp_path / "step=1.ckpt")
                (tmp_path / "step=1.ckpt").chmod(0o500)

    def work() -> None:
        with pytest.warns(Notice) as caught:
            assert run(tmp_path, every_step(tmp_path), InTheWay()).global_step == 4
        raise Notice(next(str(w.message) for w in caught if "removed" in str(w.message)))

    _, kind, text = forked(work, without_rights)
    GOES_ON.check(kind, text, file=tmp_path / "step=1.ckpt")
    assert read_checkpoint(tmp_path / "step=4.ckpt")["global_step"] == 4
    (left,) = tmp_path.glob(".step=1.ckpt.*")
    left.chmod(0o700)


def test_a_full_disk_at_the_merge_leaves_the_trained_adapters(tmp_path: Path) -> None:
    merged = MergeOnFitEnd(tmp_path / "merged")
    work = lambda: run(tmp_path, adapters_every_step(tmp_path), FullAtEnd(), merged)  # noqa: E731
    _, kind, text = forked(work)
    MERGE.check(kind, text, file=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert read_checkpoint(tmp_path / "step=4.ckpt")["global_step"] == 4
    load_adapter(LM(TinyNet()), tmp_path / "step=4")


class FullAtEnd(L.Callback):
    def on_train_end(self, *_: Any) -> None:
        full_disk(ROOM)()
