# SPDX-License-Identifier: Apache-2.0
"""What one of two gloo processes does; run by test_two_ranks.py as a module, results as JSON in a folder.

``python -m tests.forgetting.two_ranks TASKS OUT JOB ...``
"""

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
from lightning_lora.strategies.model_parallel import AdapterModelParallelStrategy
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


def sharded(model: nn.Module) -> nn.Module:
    """The model in halves, by FSDP 2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


#: Documents to pick: more than ranks, fewer, of one task and of two, a whole task.
PICKS: list[dict[str, list[int]]] = [
    {"alpha": list(range(17)), "beta": [0, 3, 19]},
    {"alpha": [5]},
    {"beta": [2, 7]},
    {"alpha": list(range(40))},
]


def scores(rank: int, folder: Path) -> Any:
    """Every item's answers from model and base, whole on each rank and in halves, each choice alone and shared."""
    tasks = load_tasks([str(folder / "alpha.yaml"), str(folder / "beta.yaml")])
    found = {}
    for how, place in (("copies", lambda m: m), ("fsdp2", sharded)):
        for share in (True, False):
            scorer = Scorer(place(tiny.adapted(0.3)), tiny.tokenizer(), batch_tokens=200, share_context=share)
            found[f"{how}, {share}"] = [ask(scorer, tasks, picked) for picked in PICKS]
    return found


def ask(scorer: Scorer, tasks: Any, picked: dict[str, list[int]]) -> Any:
    """Log-likelihoods and verdicts of model and base, in primitives."""
    with scorer.quietly():
        model = scorer.score(tasks, picked)
        with scorer.base():
            base = scorer.score(tasks, picked)
    return [[[s.doc_id, list(s.loglikelihoods), s.correct] for s in own[n]] for own in (model, base) for n in picked]


def dies(rank: int, folder: Path) -> Any:
    """Rank 1 fails in the middle of a sharded forward, where rank 0 waits for it; neither goes on after that."""

    def fail(*args: Any) -> None:
        if dist.get_rank() == 1:
            raise MemoryError("rank 1 is out of memory")

    model = sharded(tiny.adapted(0.3))
    scorer = Scorer(model, tiny.tokenizer(), batch_tokens=64)
    tasks = load_tasks(str(folder / "alpha.yaml"))
    with scorer.quietly():
        scorer.score(tasks, {"alpha": [0]})
        model.model.layers[1].mlp.register_forward_pre_hook(fail)
        with together("look at forgetting", TaskError):
            scorer.score(tasks, {"alpha": list(range(9))})


def refuses_to_write(rank: int, folder: Path) -> Any:
    """Text is written by whole models only, the same by two ranks as by one."""
    prompts = ["the cat", "a river of stone", "old", "new house and blue moon"]
    texts = []
    for place in (lambda m: m, sharded):
        scorer = Scorer(place(tiny.adapted(0.3)), tiny.tokenizer(), batch_tokens=30)
        try:
            with scorer.quietly():
                texts.append(scorer.generate(prompts, max_new_tokens=6))
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    return texts


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
        enable_progress_bar=False, enable_model_summary=False, callbacks=[LoRA(r=4), monitor], default_root_dir=folder,
    )  # fmt: skip
    student = tiny.Student(lr=0.5)
    trainer.fit(student, tiny.loader())
    weights = sum(float(p.double().sum()) for p in student.parameters())
    return {"step": trainer.global_step, "reports": [r.to_dict() for r in monitor.history], "weights": weights}


def watched(folder: Path, adapter: str, **kwargs: Any) -> Any:
    """The looks of a run that learns nothing (its rate is 0) from adapters that already do something."""
    monitor = ForgettingMonitor(
        [str(folder / "alpha.yaml"), str(folder / "beta.yaml")], tiny.tokenizer(), every_n_steps=2, items_per_eval=21,
        batch_tokens=100,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LoRA(r=4, init_from=adapter), monitor], default_root_dir=folder,
        **kwargs,
    )  # fmt: skip
    trainer.fit(tiny.Student(lr=0.0), tiny.loader())
    return [{**report.to_dict(), "seconds": 0} for report in monitor.history]


def watched_ddp(rank: int, folder: Path) -> Any:
    """Whole on each rank."""
    return watched(folder, os.environ["ADAPTER"], devices=2, strategy="ddp")


def watched_fsdp2(rank: int, folder: Path) -> Any:
    """In halves."""
    strategy = AdapterModelParallelStrategy(process_group_backend="gloo")
    return watched(folder, os.environ["ADAPTER"], devices=2, strategy=strategy)


#: Jobs that have a process group made for them; the others have Lightning make theirs, in processes of their own.
GROUPED = (look, failing_look, scores, refuses_to_write, dies)

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    rank, folder, out = int(os.environ["LOCAL_RANK"]), Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    jobs = [globals()[name] for name in sys.argv[3:]]
    results = {}
    if any(job in GROUPED for job in jobs):
        dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=240))
    for job in jobs:
        try:
            results[job.__name__] = job(rank, folder)
        except Exception as error:
            (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
            raise
    if dist.is_initialized():
        dist.destroy_process_group()
    (out / f"{rank}.json").write_text(json.dumps(results))
