# SPDX-License-Identifier: Apache-2.0
"""`RunReport` in real runs: what the page and the record hold, that training is the same, and the command after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import AdapterCheckpoint, AdapterDiagnostics, ForgettingMonitor, LoRA, RunReport, ScaleSweep
from lightning_lora.cli.main import main
from lightning_lora.errors import WriteError
from lightning_lora.model.summary import summarize
from lightning_lora.reporting.page import render
from lightning_lora.reporting.reading import read_run
from tests.forgetting import tiny
from tests.helpers import make_trainer, named_tensors


class Noted(tiny.Student):
    """A module with hyperparameters, that remembers its losses by optimizer step."""

    def __init__(self, lr: float = 5e-3, api_key: str = "k") -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.losses: dict[int, list[float]] = {}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.trainer.training:
            self.losses.setdefault(self.trainer.global_step + 1, []).append(float(loss))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log_dict({"val_loss": self.training_step(batch, batch_idx), "val_rows": float(len(batch))})


def fit(folder: Path, callbacks: list[Any], **kwargs: Any) -> Noted:
    L.seed_everything(3)
    module = Noted()
    values: dict[str, Any] = {"max_steps": 6, "val_check_interval": 4, "accumulate_grad_batches": 2, **kwargs}
    trainer = make_trainer(folder, [LoRA(r=4), *callbacks], log_every_n_steps=3, **values)
    trainer.fit(module, tiny.loader(), torch.utils.data.DataLoader(tiny.Sequences(8), batch_size=4))
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Noted, RunReport]:
    """A run with every callback that the page shows."""
    folder = tmp_path_factory.mktemp("run")
    task = str(tiny.write_task(folder / "tasks", "a<b>", tiny.items(12, seed=1)))
    report = RunReport()
    callbacks = [
        ForgettingMonitor(task, tiny.tokenizer(), every_n_steps=3, items_per_eval=6), ScaleSweep((0.5,)),
        AdapterDiagnostics(), AdapterCheckpoint(folder / "logs" / "adapters", save_last=True), report,
    ]  # fmt: skip
    module = fit(folder, callbacks, logger=CSVLogger(folder, name="logs", version=""))
    return folder / "logs", module, report


def test_the_record_holds_what_the_run_did(run: tuple[Path, Noted, RunReport]) -> None:
    folder, module, report = run
    record = report.record
    assert record is not None
    assert record.to_json() == (folder / "run.json").read_text()
    assert (folder / "report.html").read_text() == render(record)
    assert record.facts["optimizer steps"] == "6"
    losses = dict(record.curves["training loss"])
    for last in (3, 6):  # the mean of all batches of three steps
        own = [loss for step in range(last - 2, last + 1) for loss in module.losses[step]]
        assert losses[last] == pytest.approx(sum(own) / 6, rel=1e-6)
    assert sorted(record.curves) == ["training loss", "val_loss", "val_rows"]
    assert [step for step, _ in record.curves["val_loss"]] == [2, 4, 6]
    assert record.sizes["trainable_params"] == summarize(module).total.trainable_params
    assert [look["kind"] for look in record.watches[0].history][:3] == ["look", "look", "look"]
    assert record.watches[0].tolerance == 0.005
    assert record.sweep is not None
    assert record.diagnosis is not None
    assert record.configuration["LoRA"]["r"] == 4
    assert record.configuration["Noted"] == {"lr": 5e-3, "api_key": "(hidden)"}
    assert record.configuration["ForgettingMonitor"]["tasks"].endswith("a<b>.yaml")
    assert any(name.startswith("adapters") and size > 1_000 for name, size in record.files.items())
    assert record.environment["torch"] == torch.__version__


def test_the_curve_is_that_of_the_logger(run: tuple[Path, Noted, RunReport], tmp_path: Path) -> None:
    """The steps of the callback and those read from the logger's file are the same."""
    folder, _, report = run
    (tmp_path / "metrics.csv").write_text((folder / "metrics.csv").read_text())
    assert report.record is not None
    read = read_run(tmp_path).curves["val_loss"]
    assert [step for step, _ in read] == [step for step, _ in report.record.curves["val_loss"]]
    assert [y for _, y in read] == pytest.approx([y for _, y in report.record.curves["val_loss"]])


def test_the_command_makes_the_page_again(
    run: tuple[Path, Noted, RunReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = run
    out = tmp_path / "again.html"
    assert main(["report", str(folder), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["page"] == str(out)
    assert set(said["parts"].values()) == {True}
    assert out.read_text() == (folder / "report.html").read_text()
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("lightning-lora report: error: there is no folder")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "forgetting.json").write_text((folder / "forgetting.json").read_text())
    assert main(["report", str(tmp_path / "bare"), "--title", "mine"]) == 0
    assert "not known of this run: curves, sweep" in capsys.readouterr().out
    assert "<h1>mine</h1>" in (tmp_path / "bare" / "report.html").read_text()


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    runs = [fit(tmp_path / str(number), callbacks) for number, callbacks in enumerate([[], [RunReport()]])]
    first, second = (dict(named_tensors(module)) for module in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "1" / "report.html").exists()
    assert "No forgetting was measured in this run" in (tmp_path / "1" / "report.html").read_text()


def test_nothing_is_written_in_a_fast_run_and_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    fit(tmp_path / "fast", [RunReport()], fast_dev_run=True)
    assert not (tmp_path / "fast").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises((WriteError, NotADirectoryError, FileExistsError)):
        fit(tmp_path / "run", [RunReport(tmp_path / "file")])


RANKS = """
import sys
from pathlib import Path
from lightning_lora import RunReport
from tests.callbacks.test_run_report import fit
report = RunReport()
module = fit(Path(sys.argv[1]), [report], devices=2, strategy="ddp", val_check_interval=None, limit_val_batches=0)
own = [loss for losses in module.losses.values() for loss in losses]
Path(sys.argv[1], f"losses{module.global_rank}").write_text(repr((sum(own[:6]) / 6, report.record is None)))
"""


@pytest.mark.slow
def test_two_ranks_write_one_page_with_the_mean_of_their_losses(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "script.py").write_text(RANKS)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, none), (second, none_too) = (eval((tmp_path / f"losses{rank}").read_text()) for rank in (0, 1))
    assert (none, none_too) == (False, True)
    assert first != second
    record = read_run(tmp_path)
    assert record.curves["training loss"][0] == pytest.approx((3, (first + second) / 2))
    assert record.facts["processes"] == "2"
