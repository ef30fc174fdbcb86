# SPDX-License-Identifier: Apache-2.0
"""A run of `CausalLMModule` on two processes: ``python tests/causal_lm/two_ranks.py FOLDER STRATEGY LOSS``.

Lightning's subprocess launcher starts the same command again for the second rank. Every rank leaves what it logged
and trained in ``FOLDER/rank<n>.pt``; ``FOLDER/base`` is the model.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdapterDDPStrategy, AdapterModelParallelStrategy, CausalLMModule, InstructionDataModule, LoRA
from lightning_lora.errors import Notice
from tests.helpers import make_trainer

ROWS: list[Any] = [{"question": f"what is {i}?", "answer": f"the number {i}" + " so" * (i % 7)} for i in range(60)]


class Notes(L.Callback):
    """Keeps the adapters as they are when training ends: whole tensors on every rank."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tensors = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
        self.trained = {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in tensors.items()}


def main(folder: Path, strategy: str, loss: Any) -> None:
    """Train four steps on two ranks."""
    warnings.simplefilter("ignore", Notice)
    L.seed_everything(0)
    kinds: dict[str, Any] = {
        "ddp": lambda: AdapterDDPStrategy(process_group_backend="gloo"),
        "fsdp2": lambda: AdapterModelParallelStrategy(data_parallel_size=2, process_group_backend="gloo"),
    }
    module = CausalLMModule(str(folder / "base"), lr=1e-2, warmup=0, loss=loss, chunk=16, gradient_checkpointing=True)
    data = InstructionDataModule(ROWS, packing=True, batch_size=2, max_length=64)
    notes = Notes()
    trainer = make_trainer(
        folder, [LoRA(r=4, quantize="nf4"), notes], devices=2, strategy=kinds[strategy](), max_steps=4,
        val_check_interval=2, log_every_n_steps=2,
    )  # fmt: skip
    trainer.fit(module, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save({"logged": logged, "trained": notes.trained}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
