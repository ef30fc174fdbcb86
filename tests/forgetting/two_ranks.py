# SPDX-License-Identifier: Apache-2.0
"""What one of two gloo processes does; run by test_two_ranks.py as a module, results as JSON in a folder."""

from __future__ import annotations

import datetime
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.errors import TaskError
from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import load_tasks
from lightning_lora.ranks import together
from tests.forgetting import tiny


def look(rank: int, folder: Path) -> Any:
    """One look, in small batches, of which each rank computes its share."""
    calls = []

    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        calls.append(len(ids))
        return module(ids).logits

    scorer = Scorer(tiny.adapted(0.3), tiny.tokenizer(), forward=forward, batch_tokens=64)
    tasks = load_tasks([str(folder / "alpha.yaml"), str(folder / "beta.yaml")])
    report = Monitor(tasks, items_per_look=31).look(scorer, step=1)
    return {**report.to_dict(), "seconds": 0, "forwards": len(calls)}


def failing_look(rank: int, folder: Path) -> Any:
    """Rank 1's model fails, in the middle of the look or before it."""
    said = []
    tasks = load_tasks(str(folder / "alpha.yaml"))
    for early in (False, True):

        def forward(module: nn.Module, ids: Tensor) -> Tensor:
            if dist.get_rank() == 1:
                raise RuntimeError("rank 1 is out of memory")
            return module(ids).logits

        scorer = Scorer(tiny.adapted(0.3), tiny.tokenizer(), forward=forward, batch_tokens=64)
        if early and rank == 1:
            scorer.encoder.tokenizer = None
        try:
            with together("look", TaskError):
                Monitor(tasks, items_per_look=20).look(scorer, step=1)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def fit(rank: int, folder: Path) -> Any:
    """A DDP run that forgets and is stopped."""
    monitor = ForgettingMonitor(
        str(folder / "known.yaml"), tiny.tokenizer(), every_n_steps=3, items_per_eval=60, on_forgetting="stop"
    )
    trainer = L.Trainer(
        max_steps=30, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[LoRA(r=4), monitor],
    )  # fmt: skip
    student = tiny.Student(lr=0.5)
    trainer.fit(student, tiny.loader())
    weights = sum(float(p.double().sum()) for p in student.parameters())
    return {"step": trainer.global_step, "reports": [r.to_dict() for r in monitor.history], "weights": weights}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank, folder, out = int(os.environ["LOCAL_RANK"]), Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    for job in (look, failing_look):
        results[job.__name__] = job(rank, folder)
    dist.destroy_process_group()
    results["fit"] = fit(rank, folder)
    (out / f"{rank}.json").write_text(json.dumps(results))
