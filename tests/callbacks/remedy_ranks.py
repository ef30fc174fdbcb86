# SPDX-License-Identifier: Apache-2.0
"""What one of two gloo processes does; run by test_forgetting_ranks.py as a module, results as JSON in a folder."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.nn.sharded import whole
from lightning_lora.strategies.model_parallel import AdapterModelParallelStrategy
from tests.callbacks.test_forgetting_remedies import Worsens
from tests.forgetting import tiny


class Slow(tiny.Student):
    """Takes a fixed time for a step."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


def fit(out: Path, how: Any, monitor: ForgettingMonitor, student: tiny.Student, *callbacks: L.Callback) -> Any:
    """The run's end: where, what was done, what is left and what is in the file."""
    saves = AdapterCheckpoint(dirpath=out, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=how, logger=False, default_root_dir=out, enable_progress_bar=False,
        callbacks=[
            LoRA(r=4), *callbacks, monitor, saves
        ], enable_model_summary=False, max_steps=60 if isinstance(student, Slow) else 12, min_epochs=0,
    )  # fmt: skip
    trainer.fit(student, tiny.loader())
    left = {name: whole(tensor).double().sum().item() for name, tensor in adapter_state_dict(student).items()}
    saved = torch.load(saves.last_model_path, weights_only=True)
    return {
        "step": trainer.global_step,
        "outcome": monitor.outcome,
        "reports": [{**r.to_dict(), "seconds": 0} for r in monitor.history],
        "strengths": sorted({m.strength for _, m in adapter_modules(student)}),
        "left": left,
        "saved": {name: tensor.double().sum().item() for name, tensor in saved["state_dict"].items()},
        "said": saved["callbacks"][monitor.state_key]["response"]["outcome"],
    }


def run(folder: Path, out: Path) -> dict[str, Any]:
    """Rollback under DDP and FSDP 2, a scale under DDP, a time budget under DDP."""
    known, found = str(folder / "known.yaml"), {}

    def monitor(**kwargs: Any) -> ForgettingMonitor:
        return ForgettingMonitor(known, tiny.tokenizer(), items_per_eval=12, **kwargs)

    sharded = AdapterModelParallelStrategy(process_group_backend="gloo", fsdp_plan="auto")
    for name, how in (("ddp", "ddp"), ("fsdp2", sharded)):
        watched = monitor(every_n_steps=2, on_forgetting="rollback", seed=2)
        found[name] = fit(out / name, how, watched, tiny.Student(dropout=0.0), Worsens(step=4, keep=False))
    watched = monitor(every_n_steps=2, on_forgetting="scale", tolerance=0.05)
    found["scale"] = fit(out / "scale", "ddp", watched, tiny.Student(dropout=0.0), Worsens(0, 0.02, keep=False))
    watched = monitor(max_time_fraction=0.6)
    found["budget"] = fit(out / "budget", "ddp", watched, Slow(dropout=0.0, lr=1e-5))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    (out / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(run(folder, out)))
