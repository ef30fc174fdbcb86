# SPDX-License-Identifier: Apache-2.0
"""What a run forgets, and what two remedies leave of it: plain LoRA, a KL term to the base, replayed general text.

    python examples/04_forgetting.py

The built-in small base, which knows presidents' speeches, learns Shakespeare. A task about speeches that it never saw
is asked before, during and after, each item of the model and of its base: a table, a plot, and the reports as JSON.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import lightning as L

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the examples are not a package
from demo.shakespeare import Shakespeare, ShakespeareData
from lightning_lora import BaseKL, ForgettingMonitor, LoRA, ReplayMix
from small_base.corpus import split_speeches
from small_base.data import MODEL_DIR, TASKS_DIR, blocks, load_tokenizer


def remedies(block_size: int) -> dict[str, list[L.Callback]]:
    """What is added to `LoRA` in each run."""
    speeches = " ".join(split_speeches()[0].values())  # general text: what the base was trained on
    rows = blocks(load_tokenizer()(speeches, verbose=False)["input_ids"], block_size)
    return {"LoRA": [], "with BaseKL": [BaseKL(weight=1.0)], "with ReplayMix": [ReplayMix(rows, share=0.25)]}


def run(added: list[L.Callback], out: Path, args: argparse.Namespace) -> tuple[float, ForgettingMonitor]:
    """Train; the loss on held-out Shakespeare, and the monitor with its verdict."""
    L.seed_everything(0, verbose=False)
    monitor = ForgettingMonitor(
        tasks=args.task,
        tokenizer=str(MODEL_DIR),
        at_fractions=[0.1, 0.25, 0.5],  # early and often: most is learned at first
        items_per_eval=args.items,
        tolerance=0.01,
        on_forgetting="warn",  # or "stop", "rollback", "scale"
        dirpath=out,  # every look as JSON, every item, a plot
    )
    trainer = L.Trainer(
        max_steps=args.steps,
        callbacks=[LoRA(r=16, lora_alpha=32), monitor, *added],
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, data = Shakespeare(), ShakespeareData(block_size=args.block_size)
    trainer.fit(module, data)
    (found,) = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(
        module, data, verbose=False
    )
    return found["val_loss"], monitor


def main() -> None:
    args = arguments()
    warnings.filterwarnings("ignore", message=".*(set_vital|treespec|many workers).*")
    lines = [f"{'':<16}{'loss':>6}{'accuracy':>20}{'difference':>18}{'lost':>6}{'gained':>8}"]
    for name, added in remedies(args.block_size).items():
        loss, monitor = run(added, args.out / name.replace(" ", "_"), args)
        task = monitor.report.pooled
        lines.append(
            f"{name:<16}{loss:>6.2f}{100 * task.acc_base:>10.1f} -> {100 * task.acc:.1f} %"
            f"{100 * task.delta:>+9.1f} +- {100 * task.delta_se:.1f}{task.flips_lost:>8}{task.flips_gained:>8}"
        )
    print("\n" + "\n".join(lines))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/forgetting"), help="folder for reports and plots")
    parser.add_argument("--task", default=str(TASKS_DIR / "speech_continuation.yaml"), help="an lm-eval task")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument("--items", type=int, default=200, help="items in each look")
    parser.add_argument("--block_size", type=int, default=128, help="tokens a row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
