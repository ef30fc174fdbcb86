# SPDX-License-Identifier: Apache-2.0
"""Adapters looked at on two processes: ``python tests/callbacks/diagnostics_ranks.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdapterDDPStrategy, AdapterDiagnostics, AdapterSummary, LoRA
from tests.helpers import LM, loader, make_trainer, tiny_llama


def main(folder: Path) -> None:
    """Train four steps on two ranks; each leaves what its diagnostics found."""
    L.seed_everything(0)
    diagnostics = AdapterDiagnostics(every_n_steps=2, dirpath=str(folder / "found"))
    strategy = AdapterDDPStrategy(process_group_backend="gloo")
    callbacks = [LoRA(r=4), AdapterSummary(), diagnostics]
    trainer = make_trainer(folder, callbacks, devices=2, strategy=strategy)
    trainer.fit(LM(tiny_llama()), loader())
    looks = [(look.step, look.metrics()) for look in diagnostics.history]
    torch.save(looks, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
