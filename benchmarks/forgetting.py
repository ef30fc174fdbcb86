# SPDX-License-Identifier: Apache-2.0
"""Learning against forgetting: plain LoRA, full fine-tuning, and what makes either forget less, on the small base.

    python benchmarks/forgetting.py --out outputs/forgetting [--steps 60] [--seeds 0 1 2] [--only NAME] [--report]

The small base (presidents' speeches) learns Shakespeare. The items of two of its tasks are shared out: even documents
for looks, alarms and every choice of a scale, odd ones for what is reported, which nothing in a run has seen. A run
takes about a minute on one core and is written to `OUT/runs`; runs that are there are not made again, so a script
that was stopped goes on. Then come a table, a plot and the checks; the exit code is 1 where one of them fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # the examples are not a package
sys.path.insert(0, str(Path(__file__).resolve().parent))
from forgetting_report import report

from demo.shakespeare import Shakespeare, ShakespeareData
from lightning_lora import BaseKL, ForgettingMonitor, LoRA, ReplayMix, ScaleSweep
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import load_tasks
from small_base.corpus import split_speeches
from small_base.data import MODEL_DIR, TASKS_DIR, blocks, load_tokenizer

#: What may be forgotten. The base's third task, `word_order`, is hardly touched by any of the runs.
TASK_NAMES = ("speech_continuation", "function_words")
BLOCK = 128  # tokens a row
LR = 2e-3  # of LoRA, where it is not the learning rate that is varied
TOLERANCE = 0.01
LOOKS = (1, 2, 3, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 50)  # optimizer steps
ITEMS = 95  # of a look: the half of the bank lasts for all looks


@dataclass(frozen=True)
class Method:
    """What is run: its place in the plot, and what it adds to the Trainer."""

    label: str
    lr: float
    callbacks: Callable[[Path], list[L.Callback]]


def lora() -> LoRA:
    """The adapters of every run but full fine-tuning."""
    return LoRA(r=16, lora_alpha=32)


def monitor(tasks: Path, on_forgetting: str) -> ForgettingMonitor:
    """A monitor of the even half; its alarm ends the run."""
    return ForgettingMonitor(
        [str(tasks / "looks" / f"{name}.yaml") for name in TASK_NAMES],
        tokenizer=str(MODEL_DIR), at_steps=LOOKS, items_per_eval=ITEMS, tolerance=TOLERANCE, on_fit_start=False,
        on_fit_end=False, on_forgetting=on_forgetting, dirpath=tasks.parent / on_forgetting,
    )  # fmt: skip


def sweep(tasks: Path) -> ScaleSweep:
    """Scales tried on the even half when training ends."""
    return ScaleSweep(
        (0.125, 0.25, 0.375, 0.5, 0.75, 1.0), tolerance=TOLERANCE, dirpath=tasks.parent / "sweep",
        tasks=[str(tasks / "looks" / f"{name}.yaml") for name in TASK_NAMES], tokenizer=str(MODEL_DIR),
    )  # fmt: skip


METHODS = {
    "full": Method("full fine-tuning", 5e-4, lambda tasks: []),
    "lora-low": Method("LoRA, lr 5e-4", 5e-4, lambda tasks: [lora()]),
    "lora": Method("LoRA, lr 2e-3", LR, lambda tasks: [lora()]),
    "lora-high": Method("LoRA, lr 8e-3", 8e-3, lambda tasks: [lora()]),
    "base_kl": Method("BaseKL(1.0)", LR, lambda tasks: [lora(), BaseKL(1.0)]),
    "base_kl-rest": Method("BaseKL(1.0, non_target_only)", LR, lambda tasks: [lora(), BaseKL(1.0, True)]),
    "replay": Method("ReplayMix(0.25)", LR, lambda tasks: [lora(), ReplayMix(speeches(), share=0.25)]),
    "rollback": Method('on_forgetting="rollback"', LR, lambda tasks: [lora(), monitor(tasks, "rollback")]),
    "scale": Method('on_forgetting="scale"', LR, lambda tasks: [lora(), monitor(tasks, "scale")]),
    "sweep": Method("ScaleSweep", LR, lambda tasks: [lora(), sweep(tasks)]),
}


def speeches() -> torch.Tensor:
    """The speeches that the base was trained on, as rows of tokens: what is replayed."""
    text = "\n".join(split_speeches()[0].values())
    return blocks(load_tokenizer()(text, verbose=False)["input_ids"], BLOCK)


def share_out(folder: Path) -> Path:
    """Write the tasks twice, over the even and over the odd documents."""
    for half, first in (("looks", 0), ("held", 1)):
        (folder / half).mkdir(parents=True, exist_ok=True)
        for name in TASK_NAMES:
            config = yaml.safe_load((TASKS_DIR / f"{name}.yaml").read_text())
            (file,) = config["dataset_kwargs"]["data_files"].values()
            lines = (TASKS_DIR / file).read_text().splitlines(keepends=True)
            (folder / half / file).write_text("".join(lines[first::2]))
            (folder / half / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


def score_held(module: torch.nn.Module, tasks: Path) -> dict[str, list[float]]:
    """Whether each document of the held half is answered right, by task."""
    loaded = load_tasks([str(tasks / "held" / f"{name}.yaml") for name in TASK_NAMES])
    scorer = Scorer(module, str(MODEL_DIR))
    with scorer.quietly():
        scores = scorer.score(loaded, {name: range(task.n_docs) for name, task in loaded.items()})
    return {name: [score.correct for score in found] for name, found in scores.items()}


def trainer(steps: int, callbacks: list[L.Callback]) -> L.Trainer:
    """One core, nothing written."""
    return L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, limit_val_batches=1.0,
        val_check_interval=1.0, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks,
    )  # fmt: skip


def target_loss(run: L.Trainer, module: L.LightningModule) -> float:
    """Nats a token on 64 rows of Shakespeare that no run trains on."""
    (found,) = run.validate(module, ShakespeareData(), verbose=False)
    return float(found["val_loss"])


def measure_base(tasks: Path) -> dict[str, Any]:
    """The base itself: what every run is compared with."""
    module = Shakespeare()
    return {"loss": target_loss(trainer(1, []), module), "held": score_held(module, tasks)}


def make_run(method: Method, seed: int, steps: int, tasks: Path) -> dict[str, Any]:
    """Train, then measure what was learned and, on the held half, what was forgotten."""
    begun = time.process_time()
    L.seed_everything(seed, verbose=False)
    module = Shakespeare(lr=method.lr)
    callbacks = method.callbacks(tasks)
    run = trainer(steps, callbacks)
    run.fit(module, ShakespeareData())
    trained = time.process_time() - begun
    watch = next((c for c in callbacks if isinstance(c, ForgettingMonitor)), None)
    scales = next((c.result for c in callbacks if isinstance(c, ScaleSweep)), None)
    return {
        "loss": target_loss(run, module),
        "held": score_held(module, tasks),
        "steps": run.global_step,
        "train_seconds": trained,
        "outcome": watch and watch.outcome,
        "curve": [(p.target, 100 * p.pooled.delta) for p in scales.points] if scales else [],
        "looks": [look.to_dict() for look in watch.history] if watch else [],
    }


def main() -> int:
    """Make the runs that are missing; then say what came of all."""
    args = arguments()
    quiet()
    torch.set_num_threads(1)
    tasks = share_out(args.out / "tasks")
    runs = args.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    wanted = {"base": lambda: measure_base(tasks)}
    for key, method in METHODS.items():
        for seed in args.seeds:
            wanted[f"{key}-{seed}"] = lambda method=method, seed=seed: make_run(method, seed, args.steps, tasks)
    chosen = args.only or ([] if args.report else list(wanted))
    for name in chosen:
        if (runs / f"{name}.json").exists():
            continue
        begun = time.perf_counter()
        found = wanted[name]()
        (runs / f"{name}.json").write_text(json.dumps(found) + "\n")
        print(f"{name}: loss {found['loss']:.3f} [{time.perf_counter() - begun:.0f} s]", flush=True)
    if args.only:
        return 0
    return report(args.out, {key: method.label for key, method in METHODS.items()}, args.seeds, TOLERANCE)


def quiet() -> None:
    """Libraries' warnings about each other."""
    warnings.filterwarnings("ignore", module="lightning|torch")
    transformers.utils.logging.disable_progress_bar()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/forgetting"), help="folder for everything it writes")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="make these runs and nothing else, such as lora-0")
    parser.add_argument("--report", action="store_true", help="make no run: table, plot and checks of those there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
