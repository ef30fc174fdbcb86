# SPDX-License-Identifier: Apache-2.0
"""Runs that a signal cuts, and that go on from the newest checkpoint, against runs that are never cut.

``python tests/e2e/matrix.py FOLDER single-none-step ddp-nf4-validation ...``: one process imports everything and
forks the ranks of each run. A case is a strategy, a packing of the base, and where the run was cut:

    step        a signal after a random step; on from the newest checkpoint
    validation  a signal inside a validation in the middle of an epoch; on from the newest checkpoint
    monitor     on from the newest checkpoint that a validation's monitor wrote

What was found is printed as JSON, a case a line.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdapterModelParallelStrategy, LoRA, adapter_state_dict
from lightning_lora.io.checkpoint import KEY
from lightning_lora.io.distributed import read_either
from lightning_lora.nn.sharded import whole
from tests.e2e.runs import Noisy, seed_all
from tests.helpers import LM, Tokens, tiny_llama

STEPS, EPOCH, VALIDATION = 20, 8, 3  # validations after steps 3, 6, 11, 14, 19
STRATEGIES: dict[str, tuple[int, Callable[[], Any]]] = {
    "single": (1, lambda: "auto"),
    "ddp": (2, lambda: "ddp"),
    "fsdp2_full": (2, lambda: AdapterModelParallelStrategy(process_group_backend="gloo")),
    "fsdp2_distributed": (
        2,
        lambda: AdapterModelParallelStrategy(process_group_backend="gloo", save_distributed_checkpoint=True),
    ),
}
QUANTIZE, CUTS = ("none", "nf4"), ("step", "validation", "monitor")
CASES = [f"{strategy}-{quantize}-{cut}" for strategy in STRATEGIES for quantize in QUANTIZE for cut in CUTS]


class Module(LM):
    """A tiny Llama; validation draws random numbers, and so do the items as they are read."""

    def __init__(self) -> None:
        super().__init__(tiny_llama(), lr=5e-3)
        self.net.train()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Draws."""
        super().validation_step((batch + torch.randint(3, batch.shape)) % 64, batch_idx)


class Cut(L.Callback):
    """Sends this process a signal, after a step or inside a validation."""

    def __init__(self, where: str, step: int, number: signal.Signals) -> None:
        self.where, self.step, self.number = where, step, number

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """After a step."""
        if self.where == "step" and trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Between two batches."""
        if self.where == "validation" and trainer.global_step == self.step and batch_idx == 0:
            os.kill(os.getpid(), self.number)


def train(
    strategy: str, quantize: Any, folder: Path, seed: int, ckpt: Path | None = None, cut: Cut | None = None
) -> None:
    """Train on one rank; its adapters are left in ``folder/adapters<rank>.pt`` if it comes to an end."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    world, make = STRATEGIES[strategy]
    L.seed_everything(7, verbose=False)
    module = Module()
    rank = int(os.environ.get("LOCAL_RANK", 0))
    seed_all(seed + rank)
    callbacks: list[L.Callback] = [
        LoRA(r=4, lora_dropout=0.1, quantize=quantize),
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(folder, filename="monitor-{step}", monitor="val_loss", save_top_k=-1),
        *([cut] if cut is not None else []),
    ]
    trainer = L.Trainer(
        accelerator="cpu", devices=world, strategy=make(), logger=False, max_steps=STEPS, max_epochs=-1,
        num_sanity_val_steps=0, val_check_interval=VALIDATION, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, callbacks=callbacks,
    )  # fmt: skip
    loader = DataLoader(Noisy(Tokens(EPOCH * 4 * world)), batch_size=4, shuffle=True)
    trainer.fit(module, loader, DataLoader(Tokens(8 * world), batch_size=4), ckpt_path=ckpt)
    if cut is None:
        adapters = {name: whole(tensor).clone() for name, tensor in adapter_state_dict(module).items()}
        torch.save(adapters, folder / f"adapters{rank}.pt")


def launch(world: int, work: Callable[[], None]) -> list[int]:
    """Run ``work`` in ``world`` forked processes; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(number: int) -> None:
        if world > 1:
            os.environ.update(LOCAL_RANK=str(number), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        work()

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank, args=(number,)) for number in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
            process.join()
    return [int(process.exitcode or 0) for process in ranks]


def newest(folder: Path, prefix: str = "") -> tuple[int, Path]:
    """The last complete checkpoint in a folder and its step."""
    names = {path: re.fullmatch(rf"{prefix}step=(\d+)\.ckpt", path.name) for path in folder.iterdir()}
    return max((int(match[1]), path) for path, match in names.items() if match)


def same(a: Path, b: Path, world: int) -> bool:
    """Whether the ranks of two runs, and of each run among themselves, ended with the same bits."""
    states = [torch.load(folder / f"adapters{rank}.pt") for folder in (a, b) for rank in range(world)]
    first = states[0]
    return all(s.keys() == first.keys() and all(torch.equal(s[n], t) for n, t in first.items()) for s in states)


class Player:
    """Plays cases; runs that several of them need are made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.codes: dict[Path, list[int]] = {}

    def run(self, strategy: str, quantize: str, name: str, **values: Any) -> Path:
        """One run, in a folder of its own."""
        path = self.folder / f"{strategy}-{quantize}-{name}"
        if path not in self.codes:
            path.mkdir(parents=True)
            self.codes[path] = launch(STRATEGIES[strategy][0], lambda: train(strategy, quantize, path, **values))
        return path

    def play(self, case: str) -> dict[str, Any]:
        """What came of a case."""
        strategy, quantize, where = case.split("-")
        chance = random.Random(f"{strategy}-{quantize}")
        cut = Cut("step", chance.randrange(7, STEPS), chance.choice([signal.SIGKILL, signal.SIGTERM]))
        if where == "validation":
            cut = Cut("validation", 14, signal.SIGKILL)
        uncut = self.run(strategy, quantize, "uncut", seed=7)
        died = self.run(strategy, quantize, f"cut-by-{cut.number.name}-in-{cut.where}-{cut.step}", seed=7, cut=cut)
        step, ckpt = newest(died, "monitor-" if where == "monitor" else "")
        resumed = self.run(strategy, quantize, f"resumed-{where}", seed=12345, ckpt=ckpt)
        adapters = torch.load(uncut / "adapters0.pt")
        checkpoint = read_either(ckpt)
        return {
            "case": case,
            "cut": died.name,
            "codes": [self.codes[path] for path in (uncut, died, resumed)],
            "from": step,
            "newest": newest(died)[0],
            "same": same(uncut, resumed, STRATEGIES[strategy][0]),
            "learned": any(bool(t.abs().sum() > 0) for n, t in adapters.items() if n.endswith("lora_B")),
            "adapter_only": checkpoint["state_dict"].keys() == adapters.keys(),
            "ranks": len(checkpoint[KEY]["rng"]),
        }


def played(folder: Path, cases: list[str]) -> dict[str, Any]:
    """What a fresh process found that played ``cases``, by case."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__)), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400 + 90 * len(cases))
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["case"]: row for row in rows}


def assert_resumed(found: dict[str, Any]) -> None:
    """The cut run died on the way, and the resumed one ended as the uncut one."""
    strategy, _, where = found["case"].split("-")
    uncut, _, resumed = found["codes"]
    assert not any(uncut + resumed)
    assert found["newest"] < STEPS
    assert found["from"] == 14 if where == "validation" else 0 < found["from"] <= found["newest"]
    assert found["same"]
    assert found["learned"]
    assert found["adapter_only"]
    assert found["ranks"] == STRATEGIES[strategy][0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    player = Player(Path(sys.argv[1]))
    for name in sys.argv[2:] or CASES:
        print(json.dumps(player.play(name)), flush=True)
