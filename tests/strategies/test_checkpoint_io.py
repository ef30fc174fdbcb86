# SPDX-License-Identifier: Apache-2.0
"""The writer's order: what waits for a save, what a failed save keeps, and folders of shards in the way."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.errors import CheckpointError, Notice, WriteError
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint
from lightning_lora.io.distributed import is_distributed, read_distributed, write_distributed
from lightning_lora.strategies.checkpoint_io import AtomicCheckpointIO
from tests.bad_input.row import forked, full_disk
from tests.io.traced import traced


def checkpoint(value: float = 0.0) -> dict[str, Any]:
    return {"state_dict": {"a": torch.full((5000,), value)}, "optimizer_states": [], KEY: {"version": 2}}


def shards(path: Path) -> Path:
    path.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_distributed(checkpoint(1.0), path)
    return path


def fails(io: AtomicCheckpointIO, path: Path) -> None:
    path.mkdir()
    with pytest.raises(CheckpointError, match="a folder stands there"):
        io.save_checkpoint(checkpoint(), path)
    path.rmdir()


def test_what_is_asked_for_after_a_failed_save_is_not_done_until_one_succeeds(tmp_path: Path) -> None:
    io, good = AtomicCheckpointIO(), tmp_path / "1.ckpt"
    io.save_checkpoint(checkpoint(), good)
    io.expect(tmp_path / "2.ckpt")
    fails(io, tmp_path / "2.ckpt")
    io.remove_checkpoint(good)
    io.after_saves(lambda: pytest.fail("done after a save that failed"))
    assert good.exists()
    io.save_checkpoint(checkpoint(), tmp_path / "3.ckpt")
    io.remove_checkpoint(good)
    assert not good.exists()


def test_what_waits_for_a_save_is_done_in_order_after_it(tmp_path: Path) -> None:
    io, done = AtomicCheckpointIO(), []
    for name in ("1.ckpt", "2.ckpt"):
        io.expect(tmp_path / name)
        for i in range(2):
            io.after_saves(lambda name=name, i=i: done.append((name, i, (tmp_path / name).is_file())))
    io.save_checkpoint(checkpoint(), tmp_path / "1.ckpt")
    assert done == [("1.ckpt", 0, True), ("1.ckpt", 1, True)]
    fails(io, tmp_path / "2.ckpt")
    assert len(done) == 2
    io.expect(tmp_path / "3.ckpt")
    io.after_saves(lambda: done.append(("3.ckpt", 0, (tmp_path / "3.ckpt").is_file())))
    io.save_checkpoint(checkpoint(), tmp_path / "3.ckpt")
    assert done[2:] == [("3.ckpt", 0, True)]


def test_work_that_fails_after_a_save_is_told_and_stops_what_comes_after_it(tmp_path: Path) -> None:
    io, good = AtomicCheckpointIO(), tmp_path / "1.ckpt"
    io.save_checkpoint(checkpoint(), good)
    io.expect(tmp_path / "2.ckpt")
    io.after_saves(lambda: (tmp_path / "missing" / "link").symlink_to(good))
    io.remove_checkpoint(good)
    with pytest.raises(FileNotFoundError):
        io.save_checkpoint(checkpoint(), tmp_path / "2.ckpt")
    assert good.exists()
    io.save_checkpoint(checkpoint(), tmp_path / "3.ckpt")
    io.remove_checkpoint(good)
    assert not good.exists()


def test_a_file_takes_the_place_of_a_folder_of_shards(tmp_path: Path) -> None:
    path = shards(tmp_path / "last.ckpt")
    AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), path)
    assert float(read_checkpoint(path)["state_dict"]["a"][0]) == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_of_shards_stays_where_the_file_cannot_be_written(tmp_path: Path) -> None:
    path = shards(tmp_path / "last.ckpt")
    _, kind, text = forked(lambda: AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), path), full_disk(1000))
    assert (kind, "What stood there before is as it was" in text) == (WriteError.__name__, True)
    assert float(read_distributed(path)["state_dict"]["a"][0]) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_kill_at_any_moment_leaves_the_shards_or_the_file(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        AtomicCheckpointIO().save_checkpoint(checkpoint(2.0), path)

    log = tmp_path / "log"
    (tmp_path / "0").mkdir()
    first = shards(tmp_path / "0" / "last.ckpt")
    calls = traced(lambda: write(first), log)
    assert len(calls) > 4
    found = []
    for count in range(1, len(calls) + 1):
        (tmp_path / str(count)).mkdir()
        path = shards(tmp_path / str(count) / "last.ckpt")
        traced(lambda: write(path), log, die_after=count)  # noqa: B023 (done before the next turn)
        read = read_distributed if is_distributed(path) else read_checkpoint
        found.append(float(read(path)["state_dict"]["a"][0]))
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}


def test_an_old_folder_of_shards_is_gone_at_once(tmp_path: Path) -> None:
    path = shards(tmp_path / "1.ckpt")
    calls = traced(lambda: AtomicCheckpointIO().remove_checkpoint(path), tmp_path / "log")
    assert calls[0].kind == "rename"
    assert calls[0].path == str(path)
    assert not path.exists()


def test_a_path_that_leads_out_of_the_runs_folders_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    io, mine = AtomicCheckpointIO(), tmp_path / "thesis.tex"
    mine.write_text("mine")
    for name in ("../out/1.ckpt", "../out/2.ckpt"):
        io.save_checkpoint(checkpoint(), name)
    with pytest.warns(Notice, match=r"out/\.\./thesis.tex is not removed: it leads out of the folders of this run"):
        io.remove_checkpoint(tmp_path / "out" / ".." / "thesis.tex")
    io.remove_checkpoint("../out/1.ckpt")
    assert mine.exists()
    assert os.listdir(tmp_path / "out") == ["2.ckpt"]
