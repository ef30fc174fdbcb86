# SPDX-License-Identifier: Apache-2.0
"""A run that saves at every step is killed at 200 random moments: what it had saved is whole, and goes on exactly.

One process that has imported everything forks the runs, so that a run costs what training costs.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import AsyncCheckpointIO
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import AdapterCheckpoint, LoRA, adapter_state_dict
from lightning_lora.io.atomic import recover
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.folder import AdapterFolder
from tests.helpers import LM, TinyNet, Tokens, make_trainer

pytestmark = pytest.mark.slow

KILLS, RESUMED, STEPS, SEED = 200, 20, 12, 11


class Tells(L.Callback):
    """Writes the step into a pipe after each finished save."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:  # the save of the step before is over
        os.write(self.pipe, bytes([trainer.global_step]))


def fit(folder: Path, pipe: int | None = None, ckpt: Path | None = None, later: bool = False) -> LM:
    """The run; `later` writes in a thread."""
    torch.manual_seed(3)
    module = LM(TinyNet(vocab=16, width=16, dropout=0.1))
    torch.manual_seed(5)
    data = StatefulDataLoader(Tokens(40, 8, vocab=16), batch_size=4, shuffle=True)
    saver = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True)
    callbacks: list[L.Callback] = [LoRA(r=2, lora_dropout=0.1), saver, *([Tells(pipe)] if pipe is not None else [])]
    plugins = [AsyncCheckpointIO()] if later else None
    trainer = make_trainer(folder, callbacks, max_steps=STEPS, max_epochs=-1, plugins=plugins)
    trainer.fit(module, data, ckpt_path=ckpt)
    return module


def forked(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's threads are not here
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def killed(folder: Path, after: float, later: bool) -> int | None:
    """Kill a run some time after its first save; the last step whose save it told of, None if it ended before."""
    read, write = os.pipe()
    pid = forked(lambda: fit(folder, write, later=later))
    os.close(write)
    start = time.monotonic()
    while not any(folder.glob("*.ckpt")):
        assert time.monotonic() < start + 60, "the run saved nothing"
        time.sleep(0.001)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    told = b"".join(iter(lambda: os.read(read, 4096), b""))
    os.close(read)
    return max(told) if os.WIFSIGNALED(status) else None


def step_of(path: Path) -> int:
    return int(read_checkpoint(path)["global_step"])


def newest(folder: Path) -> Path | None:
    """The newest checkpoint; every one there is, and every adapter folder, is read and compared with its digests."""
    for link in folder.glob("*"):
        if link.suffix != ".ckpt" and not link.name.startswith("."):
            AdapterFolder.open(link).tensors()
    return max(folder.glob("*.ckpt"), key=step_of, default=None)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], float]:
    """The adapters of the run that nobody kills, and how long it trains."""
    folder = tmp_path_factory.mktemp("uncut")
    fit(folder / "warm")
    start = time.perf_counter()
    state = adapter_state_dict(fit(folder / "run"))
    return {name: t.clone() for name, t in state.items()}, time.perf_counter() - start


def test_no_kill_loses_a_checkpoint(uncut: tuple[dict[str, torch.Tensor], float], tmp_path: Path) -> None:
    wanted, seconds = uncut
    chance = random.Random(SEED)
    kills, resumed, inside = 0, 0, 0
    warnings.simplefilter("ignore")
    for number in range(10 * KILLS):
        if kills == KILLS:
            break
        folder = tmp_path / str(number)
        later = kills % 4 == 3
        told = killed(folder, chance.uniform(0, seconds), later)
        if told is None:
            continue
        kills += 1
        inside += bool(list(folder.glob(".*")))
        for hidden in folder.glob(".*.old-*"):  # a reader puts a folder back that was moved aside
            recover(folder / hidden.name[1:].split(".old-")[0])
        path = newest(folder)
        assert path is not None
        assert step_of(path) >= (1 if later else told)  # in a thread, what was told of may be on its way
        if resumed < RESUMED and kills % (KILLS // RESUMED) in (0, 3):
            out = tmp_path / f"{number}.pt"
            work = lambda p=path, o=out, f=folder: torch.save(adapter_state_dict(fit(f, ckpt=p)), o)  # noqa: E731
            assert os.waitpid(forked(work), 0)[1] == 0
            state = torch.load(out)
            assert state.keys() == wanted.keys()
            assert all(torch.equal(state[name], t) for name, t in wanted.items()), (number, path)
            resumed += 1
        shutil.rmtree(folder)
    print(f"{kills} kills within {seconds:.2f} s after the first save: {inside} cut a write, {resumed} resumed")
    assert kills == KILLS
    assert inside >= 10
    assert resumed == RESUMED
