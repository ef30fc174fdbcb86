# SPDX-License-Identifier: Apache-2.0
"""Every method on the small base: learning against forgetting, at equal data and at equal arithmetic; time and memory.

    python benchmarks/methods.py --out outputs/methods [--steps 60] [--seeds 0 1 2] [--only NAME] [--report]

The methods and the learning rates that are tried stand in `methods.yaml`. The small base (presidents' speeches) learns
Shakespeare. Seed 0 runs at every rate; the rate with the lowest loss on held-out text is run with the other seeds too.
A run is looked at twice: after all its steps (equal data), and after as many as cost what the cheapest method spends on
all of its own (equal arithmetic; floating point operations are counted, not estimated). Runs are written to `OUT/runs`
and not made again, so a script that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # the examples are not a package
sys.path.insert(0, str(Path(__file__).resolve().parent))
from forgetting import TASK_NAMES, quiet, share_out, target_loss, trainer
from memory import saved_by_layer
from methods_report import best_rate, report

import lightning_lora
from demo.shakespeare import Shakespeare, ShakespeareData
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import load_tasks
from small_base.data import MODEL_DIR

STRIDE = 2  # every second document of the held half is asked
METHODS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def callbacks_of(name: str) -> list[L.Callback]:
    """The one callback that makes the method."""
    row = METHODS[name]
    return [getattr(lightning_lora, row["class_path"])(**row.get("init_args", {}))]


class Early(L.Callback):
    """Keeps what is trained as it is after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            self.state = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}


def converted(name: str) -> tuple[L.Trainer, Shakespeare]:
    """The small base with the method's adapters in it, after one step."""
    L.seed_everything(0, verbose=False)
    module = Shakespeare(lr=1e-4)
    run = trainer(1, callbacks_of(name))
    run.fit(module, ShakespeareData())
    return run, module.train()


def batch() -> torch.Tensor:
    """One batch of training."""
    data = ShakespeareData()
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def step(module: Shakespeare, optimizer: torch.optim.Optimizer, rows: torch.Tensor) -> None:
    """What a step of training computes."""
    module.model(input_ids=rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure_costs(names: list[str], rounds: int = 8) -> dict[str, dict[str, float]]:
    """By method: operations of a step, its time against LoRA's (turns taken, CPU clock, medians), and bytes."""
    rows, built = batch(), {name: converted(name)[1] for name in names}
    found: dict[str, dict[str, float]] = {}
    optimizers = {}
    for name, module in built.items():
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizers[name] = torch.optim.AdamW(trained, lr=1e-5)
        saved = saved_by_layer(module, module.model, lambda m=module: m.model(input_ids=rows, labels=rows))
        with FlopCounterMode(display=False) as counter:
            step(module, optimizers[name], rows)
        found[name] = {
            "flops": float(counter.get_total_flops()),
            "trainable": float(sum(p.numel() for p in trained)),
            "state_bytes": float(sum(3 * p.nbytes for p in trained)),  # a gradient and Adam's two moments
            "saved_bytes": float(saved),
        }
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, module in built.items():
            begun = time.process_time()
            step(module, optimizers[name], rows)
            if turn:
                times[name].append(time.process_time() - begun)
    for name in names:
        found[name]["seconds"] = sorted(times[name])[rounds // 2]
    return found


def look(run: L.Trainer, module: L.LightningModule, tasks: Path) -> dict[str, Any]:
    """What was learned and, on the held half of the tasks, what was forgotten: each document's answer, by task."""
    loaded = load_tasks([str(tasks / "held" / f"{name}.yaml") for name in TASK_NAMES])
    scorer = Scorer(module, str(MODEL_DIR))
    with scorer.quietly():
        scores = scorer.score(loaded, {name: range(0, task.n_docs, STRIDE) for name, task in loaded.items()})
    held = {name: [score.correct for score in found] for name, found in scores.items()}
    return {"loss": target_loss(run, module), "held": held}


def make_run(name: str, lr: float, seed: int, steps: int, early: int, tasks: Path) -> dict[str, Any]:
    """Train, and look at the end and at the step of equal arithmetic."""
    L.seed_everything(seed, verbose=False)
    module, keeper = Shakespeare(lr=lr), Early(early)
    run = trainer(steps, [*callbacks_of(name), keeper])
    run.fit(module, ShakespeareData())
    found = {"steps": run.global_step, "early": early, **look(run, module, tasks)}
    if early == steps:
        return {**found, "equal_flops": {key: found[key] for key in ("loss", "held")}}
    module.load_state_dict(keeper.state)
    return {**found, "equal_flops": look(run, module, tasks)}


def main() -> int:
    """Make the runs that are missing; then say what came of all."""
    args = arguments()
    quiet()
    torch.set_num_threads(1)
    tasks, runs = share_out(args.out / "tasks"), args.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    names = [name for name in METHODS if not args.only or name in args.only]
    if not args.report:
        _once(runs / "base.json", lambda: look(trainer(1, []), Shakespeare(), tasks))
        for name in names:
            _once(runs / f"costs-{name}.json", lambda name=name: measure_costs(list(dict.fromkeys(["lora", name]))))
        costs = {name: json.loads((runs / f"costs-{name}.json").read_text()) for name in names}
        for name in names:
            early = _equal_steps(args.steps, costs[name][name]["flops"], args.cheapest * costs[name]["lora"]["flops"])
            for seed in args.seeds:
                rates = METHODS[name]["lrs"] if seed == args.seeds[0] else [best_rate(runs, name, args.seeds[0])]
                for lr in rates:
                    make = lambda name=name, lr=lr, seed=seed, early=early: make_run(  # noqa: E731
                        name, lr, seed, args.steps, early, tasks
                    )
                    _once(runs / f"{name}_lr{lr:g}_seed{seed}.json", make)
    return report(args.out, METHODS, args.seeds) if not args.only else 0


def _equal_steps(steps: int, flops: float, cheapest: float) -> int:
    """How many steps cost what ``steps`` of the cheapest method do."""
    return max(1, min(steps, round(steps * cheapest / flops)))


def _once(path: Path, make: Any) -> None:
    if path.exists():
        return
    begun = time.perf_counter()
    found = make()
    path.write_text(json.dumps(found) + "\n")
    loss = f"loss {found['loss']:.3f} " if "loss" in found else ""
    print(f"{path.stem}: {loss}[{time.perf_counter() - begun:.0f} s]", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/methods"), help="folder for everything it writes")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first one chooses the rates")
    parser.add_argument("--cheapest", type=float, default=0.9, help="operations of the cheapest step, LoRA's being 1")
    parser.add_argument("--only", nargs="+", help="these methods and no report, such as lora")
    parser.add_argument("--report", action="store_true", help="make no run: table and plot of those there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
