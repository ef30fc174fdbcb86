# SPDX-License-Identifier: Apache-2.0
"""Runs that are cut and resumed, in this process or, as a script, in two.

``python tests/e2e/runs.py scenario.json``: Lightning's subprocess launcher starts the same command again
for the second rank. Every rank leaves what it found in ``<folder>/rank<n>.pt``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import BaseKL, LoRA, ReplayMix, adapter_state_dict
from lightning_lora.errors import Notice
from tests.helpers import LM, TinyNet, Tokens

STEPS, CUT = 60, 37

#: Constant rows, as `Tokens` has none.
GENERAL = torch.arange(24)[:, None].repeat(1, 16)


class Noisy(Dataset):
    """Tokens that are changed at random when they are read, by all three global generators."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randint(4, (16,)) + random.randrange(4) + int(np.random.randint(4))
        return (self.data[index] + noise) % 64


class Module(LM):
    """A plain net with dropout; with a scheduler when asked to; may draw in hooks and in validation."""

    def __init__(
        self, seed: int = 0, schedule: bool | str = False, drawing: bool = False, optimizer: str = "AdamW"
    ) -> None:
        torch.manual_seed(0)
        super().__init__(TinyNet(dropout=0.1), lr=5e-3)
        self.seed, self.schedule, self.drawing, self.optimizer = seed, schedule, drawing, optimizer
        self.seen: list[Tensor] = []
        self.epochs: list[int] = []

    def on_fit_start(self) -> None:
        """Seeds each rank its own way: Lightning seeds all alike when they start."""
        seed_all(self.seed + self.global_rank)

    def on_train_start(self) -> None:
        """Notes the adapters that the run begins with."""
        self.began = {name: tensor.clone() for name, tensor in adapter_state_dict(self).items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Notes what it saw."""
        self.seen.append(batch.clone())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """May draw."""
        if self.drawing:
            batch = (batch + torch.randint(3, batch.shape)) % 64
        super().validation_step(batch, batch_idx)

    def on_train_epoch_start(self) -> None:
        """May draw; notes the epoch."""
        self.epochs.append(self.current_epoch)
        if self.drawing:
            torch.rand(3)

    def configure_optimizers(self) -> Any:
        """AdamW or one of bitsandbytes', with a scheduler a step when asked to."""
        optimizer: torch.optim.Optimizer = super().configure_optimizers()
        if self.optimizer != "AdamW":
            from bitsandbytes import optim

            few = {"min_8bit_size": 16} if "8bit" in self.optimizer else {}
            optimizer = getattr(optim, self.optimizer)(self.parameters(), lr=self.lr, **few)
        if self.schedule == "length":  # asked for here, it makes the loader before the checkpoint is read
            assert self.trainer.estimated_stepping_batches > 0
            self.schedule = True  # a run that is cut by `max_steps` has another length
        if not self.schedule:
            return optimizer
        if isinstance(self.schedule, str):  # reads as "step val_loss"
            interval, monitor = self.schedule.split()
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=0.5)
            scheduler = {"scheduler": plateau, "interval": interval, "monitor": monitor}
            return [optimizer], [{**scheduler, "frequency": 5 if interval == "step" else 1}]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.05 * step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def seed_all(seed: int) -> None:
    """Seed the three global generators, and not the seed that Lightning's samplers take."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@dataclass
class Scenario:
    """One kind of run. ``size`` items, ``batch`` of them a step and a process."""

    folder: str
    quantize: str = "none"
    devices: int = 1
    loader: str = "stateful"  # plain, generator, weighted, batches, no_batches, iterable, stateful, stateful_injected
    size: int = STEPS * 4
    batch: int = 4
    workers: int = 0
    noisy: bool = False
    schedule: bool | str = False
    drawing: bool = False
    optimizer: str = "AdamW"
    loraplus_lr_ratio: float | None = None
    validation: bool = False
    replay: float = 0.0  # share of general batches
    base_kl: float = 0.0  # weight of the divergence from the base
    steps: int = STEPS
    cut: int = CUT
    save: str = "every"  # batches, every, epoch_end, last, monitor, inside, after
    trainer: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)  # more arguments of it


def train_loader(s: Scenario) -> DataLoader:
    """The scenario's loader, shuffled."""
    data: Dataset = Tokens(s.size)
    data = Noisy(data) if s.noisy else data
    values: dict[str, Any] = {"batch_size": s.batch, "num_workers": s.workers}
    if s.loader == "stateful" and s.devices > 1:
        sampler = StatefulDistributedSampler(data, seed=3, num_replicas=s.devices, rank=_rank())
        return StatefulDataLoader(data, sampler=sampler, **values)
    if s.loader.startswith("stateful"):
        return StatefulDataLoader(data, shuffle=True, **values)
    if s.loader == "generator":
        return DataLoader(data, shuffle=True, generator=torch.Generator().manual_seed(5), **values)
    if s.loader == "weighted":
        return DataLoader(data, sampler=WeightedRandomSampler(torch.arange(s.size) + 1.0, s.size), **values)
    if s.loader == "batches":
        return DataLoader(data, batch_sampler=Neighbours(s.size, s.batch), num_workers=s.workers)
    if s.loader == "no_batches":
        return DataLoader(Batched(data), batch_size=None, sampler=RandomSampler(data), num_workers=s.workers)
    if s.loader == "iterable":
        return DataLoader(Stream(data), **values)
    return DataLoader(data, shuffle=True, **values)


class Neighbours(Sampler):
    """Batches of neighbours in a random order, a batch sampler as people write them."""

    def __init__(self, size: int, batch: int) -> None:
        self.batches = [list(range(start, start + batch)) for start in range(0, size, batch)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        random.shuffle(order)
        return iter([self.batches[i] for i in order])


class Batched(Dataset):
    """One item is a batch."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index][None]


class Stream(IterableDataset):
    """The items in order, without indices."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        return (self.data[i] for i in range(len(self.data)))  # type: ignore[arg-type]


def _rank() -> int:

    return int(os.environ.get("LOCAL_RANK", 0))


class SaveInside(L.Callback):
    """Saves as a user does, from a hook, after a step or some batches later."""

    def __init__(self, step: int, path: Path, batches: int = 0) -> None:
        self.step, self.path, self.wait = step, path, batches

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Save once."""
        if trainer.global_step >= self.step and not self.path.exists():
            if self.wait == 0:
                trainer.save_checkpoint(self.path)
            self.wait -= 1


def fit(
    s: Scenario, name: str, steps: int, seed: int, ckpt: Path | None = None, devices: int | None = None
) -> tuple[Module, list[str]]:
    """Train; returns the module and the notices."""
    folder = Path(s.folder, name)
    L.seed_everything(7, verbose=False)  # the same in all runs, as a script has it
    module = Module(seed, s.schedule, s.drawing, s.optimizer)
    seed_all(seed)
    loader = train_loader(s)
    words: dict[str, Any] = {"quantize": s.quantize, "loraplus_lr_ratio": s.loraplus_lr_ratio}
    lora = LoRA(r=4, lora_dropout=0.1, **words, **s.lora)
    callbacks: list[L.Callback] = [lora, BaseKL(s.base_kl, forward="net")]
    if s.replay:
        callbacks.append(ReplayMix(GENERAL, share=s.replay))
    if s.save == "every":
        callbacks.append(ModelCheckpoint(folder, filename="cut", every_n_train_steps=s.cut, save_top_k=-1))
    elif s.save == "epoch_end":
        callbacks.append(ModelCheckpoint(folder, filename="cut"))
    elif s.save == "monitor":
        callbacks.append(ModelCheckpoint(folder, filename="{step}", monitor="val_loss", save_top_k=-1))
    elif s.save == "last":
        callbacks.append(ModelCheckpoint(folder, filename="other", save_last=True))
    elif s.save == "inside":
        callbacks.append(SaveInside(s.cut, folder / "cut.ckpt"))
    elif s.save == "batches":
        callbacks.append(SaveInside(s.cut, folder / "cut.ckpt", batches=1))
    devices = devices or s.devices
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, max_steps=steps, default_root_dir=folder,
        enable_checkpointing=s.save in ("every", "epoch_end", "last", "monitor"), callbacks=callbacks,
        **{"max_epochs": -1, **s.trainer},
    )  # fmt: skip
    val = DataLoader(Tokens(8), batch_size=4) if s.validation else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, val, ckpt_path=ckpt)
        if s.save == "after":
            trainer.save_checkpoint(folder / "cut.ckpt")
    assert trainer.global_step == steps
    return module, [str(w.message) for w in caught if issubclass(w.category, Notice)]


def cut_path(s: Scenario) -> Path:
    """The checkpoint that the cut run left."""
    name = {"last": "last.ckpt", "monitor": f"step={s.cut}.ckpt"}.get(s.save, "cut.ckpt")
    return Path(s.folder, "cut", name)


def play(s: Scenario, uncut: tuple[Module, list[str]] | None = None) -> dict[str, Any]:
    """An uncut run, one that is cut, and the cut one resumed under another seed."""
    whole, _ = uncut or fit(s, "whole", s.steps, seed=7)
    fit(s, "cut", s.cut + (s.save == "batches"), seed=7)
    resumed, notices = fit(s, "resumed", s.steps, seed=12345, ckpt=cut_path(s))
    return {
        "whole": {k: v.clone() for k, v in adapter_state_dict(whole).items()},
        "resumed": {k: v.clone() for k, v in adapter_state_dict(resumed).items()},
        "batches": [bool((a == b).all()) for a, b in zip(whole.seen[-len(resumed.seen) :], resumed.seen, strict=True)],
        "seen": whole.seen,
        "notices": notices,
    }


def main() -> None:
    """Play the scenarios of a file, in order, on every rank."""
    scenarios = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    for values in scenarios:
        s = Scenario(**values)
        result = play(s)
        torch.save(result, Path(s.folder, f"rank{_rank()}.pt"))


if __name__ == "__main__":
    main()
