# SPDX-License-Identifier: Apache-2.0
"""Everything that looks at a run, at once: the trained weights are those of a run that nothing looks at."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_lora import AdapterDiagnostics, AdapterSummary, ForgettingMonitor, LoRA, RunReport
from tests.forgetting import tiny
from tests.helpers import make_trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", [None, 0.5], ids=["all items", "time budget"])
def test_weights_are_the_same_bits_whatever_looks_on(budget: float | None, tmp_path: Path) -> None:
    tasks = [str(tiny.write_task(tmp_path, name, tiny.items(12, seed=i))) for i, name in enumerate(("kept", "wanted"))]
    (tmp_path / "general.txt").write_text("the cat sat on the mat\na dog ran\n" * 3)
    digests = {}
    for watched in (False, True):
        callbacks: list[L.Callback] = [LoRA(r=4, lora_dropout=0.1)]
        loggers: Any = False
        if watched:
            monitor = ForgettingMonitor(
                tasks[0], tiny.tokenizer(), every_n_steps=3, items_per_eval=6, target_tasks=tasks[1], gauges=True,
                general_text=str(tmp_path / "general.txt"), max_time_fraction=budget,
            )  # fmt: skip
            callbacks += [AdapterSummary(), AdapterDiagnostics(), monitor, RunReport()]
            loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(str(tmp_path / "tb"))]
        L.seed_everything(1)
        student = tiny.Student(dropout=0.1)
        run = make_trainer(tmp_path, callbacks, max_steps=8, val_check_interval=4, logger=loggers)
        run.fit(student, tiny.loader(), tiny.loader(8))
        state = student.state_dict().values()
        bits = b"".join(t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in state)
        digests[watched] = hashlib.md5(bits).hexdigest(), torch.get_rng_state().sum().item()
    assert digests[True] == digests[False]
    assert monitor.history
    assert list(tmp_path.rglob("*.png"))
    assert list(tmp_path.rglob("report.html"))
    assert list((tmp_path / "tb").rglob("events.*"))
