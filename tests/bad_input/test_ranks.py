# SPDX-License-Identifier: Apache-2.0
"""Rows about several processes: a rank that fails inside a save, two runs in one folder. Real processes, over gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import AdapterCheckpoint, LoRA, LoRAConfig, apply_lora, save_adapter
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint
from lightning_lora.io.folder import AdapterFolder
from tests.bad_input.row import Row
from tests.helpers import LM, TinyNet, loader, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

LIMIT = 240  # s, by which every process has ended


def start(work: Callable[[], object], out: Path, env: dict[str, str] | None = None) -> int:
    """Begin `work` in a child, which leaves name and text of what it raised in `out`; its id."""
    pid = os.fork()
    if pid == 0:
        kind, text = "-", ""
        try:
            os.environ.update(env or {})
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            torch.set_num_threads(1)
            work()
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        finally:
            out.write_text(json.dumps([kind, text]))
            os._exit(0 if kind == "-" else 1)
    return pid


def ended(pids: list[int]) -> list[int]:
    """The status of each child; one that is still there at the limit is killed and is a failure."""
    found: dict[int, int] = {}
    limit = time.monotonic() + LIMIT
    while len(found) < len(pids) and time.monotonic() < limit:
        for pid in set(pids) - found.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found[pid] = status
        time.sleep(0.01)
    for pid in set(pids) - found.keys():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(found) == len(pids), "a rank waited for ever"
    return [found[pid] for pid in pids]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Kill:
    """Kills the process that writes it."""

    def __reduce__(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class AtSecondSave(L.Callback):
    """What happens while the second checkpoint is made, on one rank."""

    def __init__(self, rank: int, what: Callable[[], Any]) -> None:
        self.rank, self.what, self.saves = rank, what, 0

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        here = int(os.environ["RANK"]) == self.rank
        return {"found": self.what() if here and self.saves == 2 else None}


def folder_in_the_way(folder: Path, name: str = "step=2.ckpt") -> None:
    """The writer raises: where its second file, or the adapter folder beside it, goes, a user's folder stands."""
    (folder / name).mkdir()
    (folder / name / "mine.txt").write_text("mine")


def bad_state() -> None:
    raise ValueError("no state")


ROWS = [
    Row("rank-raises", "WriteError", "rank 0 failed to save ... and so all stop: ... choose another path",
        lambda folder: AtSecondSave(0, lambda: folder_in_the_way(folder))),
    Row("rank-raises-adapter", "WriteError", "rank 0 failed to save ... and so all stop: ... Choose another folder",
        lambda folder: AtSecondSave(0, lambda: folder_in_the_way(folder, "step=2"))),
    Row("rank-raises-second", "WriteError", "another rank ended while this one was to save ... start all of them",
        lambda folder: AtSecondSave(1, bad_state)),
    Row("rank-killed-writing", "WriteError", "another rank ended while this one was to save ... start all of them",
        lambda folder: AtSecondSave(0, Kill)),
    Row("rank-killed-waiting", "WriteError", "another rank ended while this one was to save ... start all of them",
        lambda folder: AtSecondSave(1, lambda: os.kill(os.getpid(), signal.SIGKILL))),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_no_rank_waits_for_ever(row: Row, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    adapters = row.name.endswith("adapter")

    def work() -> None:
        torch.manual_seed(0)
        saver = (AdapterCheckpoint if adapters else ModelCheckpoint)(
            folder, filename="{step}", every_n_train_steps=1, save_top_k=1, enable_version_counter=False
        )
        callbacks = [LoRA(r=4), saver, row.make(folder)]
        trainer = make_trainer(folder, callbacks, strategy="ddp", devices=2, max_steps=4)
        trainer.fit(LM(TinyNet()), loader(16))

    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "ours", "GROUP_RANK": "0",
    }  # fmt: skip
    outs = [tmp_path / f"{rank}.json" for rank in (0, 1)]
    pids = [start(work, outs[rank], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)]
    statuses = ended(pids)
    assert all(status != 0 for status in statuses)
    survivor = 0 if row.name in ("rank-killed-waiting", "rank-raises-second") else 1
    row.check(*json.loads(outs[survivor].read_text()), file=folder / ("step=2" if adapters else "step=2.ckpt"))
    if row.name.startswith("rank-raises"):
        kind = "ValueError" if survivor == 0 else "CheckpointError"
        assert json.loads(outs[1 - survivor].read_text())[0] == kind
    else:
        assert os.WTERMSIG(statuses[1 - survivor]) == signal.SIGKILL
    assert read_checkpoint(folder / "step=1.ckpt")["global_step"] == 1


TWO_RUNS = [
    Row("two-runs-one-adapter", "-", "the last one's folder stands, whole"),
    Row("two-runs-one-folder", "-", "both end; every file is whole and of one of them"),
]


def test_two_runs_that_write_one_adapter(tmp_path: Path) -> None:
    def work(value: float) -> None:
        torch.manual_seed(0)
        model = TinyNet()
        apply_lora(model, LoRAConfig(r=4))
        for _ in range(40):
            for layer in (model.first, model.second):
                nn.init.constant_(layer.adapter.lora_B, value)
            save_adapter(model, tmp_path / "adapter")

    pids = [start(lambda v=v: work(v), tmp_path / f"{v}.json") for v in (1.0, 2.0)]
    assert ended(pids) == [0, 0], [(tmp_path / f"{v}.json").read_text() for v in (1.0, 2.0)]
    tensors = AdapterFolder.open(tmp_path / "adapter").tensors()
    assert {float(t.mean()) for name, t in tensors.items() if "lora_B" in name} in ({1.0}, {2.0})  # whole, of one run
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


class AfterTheOther(L.Callback):
    """Both runs are at work at once: the second begins to save when the first has, and the first waits for that."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        limit = time.monotonic() + LIMIT
        while trainer.global_step == self.step and not self.file.exists() and time.monotonic() < limit:
            time.sleep(0.005)


def test_two_runs_that_save_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = AfterTheOther(6, folder / "last-v1.ckpt"), AfterTheOther(0, folder / "last.ckpt")

    def work(seed: int, wait: L.Callback) -> None:
        torch.manual_seed(seed)
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
        make_trainer(folder, [LoRA(r=4), saver, wait], max_steps=12).fit(LM(TinyNet()), loader())

    pids = [start(lambda i=i, w=w: work(i, w), tmp_path / f"{i}.json") for i, w in ((1, first), (2, second))]
    assert ended(pids) == [0, 0], [(tmp_path / f"{i}.json").read_text() for i in (1, 2)]
    found = {path.name: read_checkpoint(path) for path in folder.glob("*.ckpt")}  # every one of them is whole
    assert [found[name]["global_step"] for name in ("last.ckpt", "last-v1.ckpt")] == [12, 12]
    assert {name for name in found if name.startswith("step=12")}
    bases = [found[name][KEY]["fingerprint"] for name in ("last.ckpt", "last-v1.ckpt")]
    assert bases[0] != bases[1]  # each is of its own run
