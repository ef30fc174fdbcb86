# SPDX-License-Identifier: Apache-2.0
"""The main job on the built-in small base: learn Shakespeare by QLoRA, see what is forgotten, merge.

    python examples/demo/main.py --out outputs/demo

    presidents' speeches (the base)  --nf4, LoRA, Shakespeare-->  adapters, a verdict on forgetting, a merged model

The lines that matter are in `callbacks` and `main`; the LightningModule and its data are in `shakespeare.py` and
know nothing of adapters. The exit code is 0 only if everything held that the last block of the output lists.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are not a package
from demo.shakespeare import Shakespeare, ShakespeareData
from demo.summary import Outcome, checks, tables
from lightning_lora import AdapterCheckpoint, ForgettingMonitor, LoRA, MergeOnFitEnd
from lightning_lora.reporting import plot_forgetting
from small_base.data import MODEL_DIR, TASKS

#: Optimizer steps with a look at forgetting: dense at first, where most is learned.
LOOKS = (10, 20, 40, 70, 120)


def callbacks(out: Path, items: int) -> list[L.Callback]:
    """All that is added to an ordinary Trainer."""
    return [
        LoRA(r=16, lora_alpha=32, target_modules="all-linear", quantize="nf4"),
        AdapterCheckpoint(dirpath=out / "adapters", monitor="val_loss", save_top_k=2, keep_last_n=1),
        ForgettingMonitor(
            tasks=[str(task) for task in TASKS],
            tokenizer=str(MODEL_DIR),
            at_steps=LOOKS,
            items_per_eval=items,
            dirpath=out / "looks",
        ),
        MergeOnFitEnd(out / "merged"),
    ]


class TargetLoss(L.Callback):
    """Remembers the held-out loss by optimizer step, for the plot; says when training is over."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        print(
            "     trained; now every item of the general tasks, by model and base (a minute or two), and the merge",
            flush=True,
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.by_step[trainer.global_step] = loss = float(trainer.callback_metrics["val_loss"])
        print(f"     step {trainer.global_step}: loss {loss:.3f}", flush=True)


def main() -> int:
    """Run the job, print what came of it, and say whether it held."""
    args = arguments()
    prepare(args.out)
    quiet()
    begun = time.perf_counter()
    L.seed_everything(args.seed, verbose=False)

    module, data = Shakespeare(), ShakespeareData()
    loss = TargetLoss()
    lora, adapters, monitor, merge = added = callbacks(args.out, args.items)
    trainer = L.Trainer(
        max_epochs=1,
        max_steps=args.steps,
        val_check_interval=10,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        logger=False,
        callbacks=[loss, *added],
    )
    print("1/3  the base's loss on Shakespeare", flush=True)
    trainer.validate(module, data, verbose=False)
    print(f"2/3  {args.steps} steps, with looks at {len(TASKS)} general tasks; the verdict; the merge", flush=True)
    trainer.fit(module, data)
    print("3/3  what came of it\n", flush=True)

    outcome = Outcome(args.out, lora.report, adapters, monitor, merge.report, loss.by_step)
    figure, _ = plot_forgetting(monitor.history, learned=loss.by_step, learned_label="loss on Shakespeare [nats/token]")
    figure.savefig(outcome.plot, dpi=120)
    text = tables(outcome)
    (args.out / "table.txt").write_text(text + "\n")
    looks = {"loss": loss.by_step, "looks": [report.to_dict() for report in monitor.history]}
    (args.out / "forgetting.json").write_text(json.dumps(looks, indent=2) + "\n")
    print(text)
    held = checks(outcome)
    print("\n" + "\n".join(f"{'ok    ' if good else 'FAILED'}  {what}" for what, good in held))
    print(f"\nplot: {outcome.plot}\n{time.perf_counter() - begun:.0f} s")
    return 0 if all(good for _, good in held) else 1


def prepare(out: Path) -> None:
    """An empty folder for the run; only what an earlier run of the demo wrote is removed."""
    mark = out / "made_by_the_demo"
    if mark.exists():
        shutil.rmtree(out)
    elif out.exists() and any(out.iterdir()):
        sys.exit(f"{out} holds something that the demo did not write: give another folder with --out")
    out.mkdir(parents=True)
    mark.touch()


def quiet() -> None:
    """Libraries' warnings about each other: nothing that a reader of this output could act upon."""
    for text in (".*set_vital.*", ".*treespec, LeafSpec.*", ".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message=text)
    transformers.utils.logging.disable_progress_bar()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder for everything it writes")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps, at most an epoch")
    parser.add_argument("--items", type=int, default=300, help="items of general tasks in each look")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
