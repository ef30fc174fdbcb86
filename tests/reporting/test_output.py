# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: a table, files, and what each logger takes; no figure stays open."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lightning_lora import ForgettingMonitor, LoRA
from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.scoring import ItemScore
from lightning_lora.reporting import plot_learning
from lightning_lora.reporting.items import item_rows, write_items
from lightning_lora.reporting.output import hand_out
from lightning_lora.reporting.table import markdown_table, plain_table
from tests.forgetting import tiny
from tests.helpers import make_trainer
from tests.reporting.test_forgetting import HISTORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with files and three loggers."""
    folder = tmp_path_factory.mktemp("run")
    tasks = [tiny.write_task(folder / "tasks", name, tiny.items(24, seed=seed)) for seed, name in enumerate("ab")]
    monitor = ForgettingMonitor(
        [str(task) for task in tasks], tiny.tokenizer(), every_n_steps=2, items_per_eval=8, dirpath=folder / "out"
    )
    loggers = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board")]
    checkpoint = ModelCheckpoint(folder / "kept", every_n_train_steps=2, save_top_k=-1)
    L.seed_everything(0)
    trainer = make_trainer(folder, [LoRA(r=4), monitor, checkpoint], max_steps=4, logger=loggers)
    trainer.fit(tiny.Student(), tiny.loader())
    (folder / "history.json").write_text(json.dumps([report.to_dict() for report in monitor.history]))
    return folder


def test_files_of_a_run(folder: Path) -> None:
    written = json.loads((folder / "out/forgetting.json").read_text())
    assert written == json.loads((folder / "history.json").read_text())
    assert [(report["kind"], report["step"]) for report in written] == [
        ("look", 0), ("look", 2), ("look", 4), ("verdict", 4)
    ]  # fmt: skip
    assert (folder / "out/forgetting.png").read_bytes()[:4] == b"\x89PNG"
    files = sorted((folder / "out/items").iterdir())
    assert [file.stem for file in files] == [
        "0000-look-step=0", "0001-look-step=2", "0002-look-step=4", "0003-verdict-step=4"
    ]  # fmt: skip
    rows = read(files[-1])
    assert len(rows) == 48
    for name in "ab":
        own = [row for row in rows if row["task"] == name]
        assert sum(row["correct"] for row in own) / 24 == pytest.approx(written[-1]["tasks"][name]["acc"])
        assert sum(row["correct_base"] for row in own) / 24 == pytest.approx(written[-1]["tasks"][name]["acc_base"])
    assert all(len(row["loglikelihoods"]) == 4 and row["doc_hash"] for row in rows)


def read(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        import pyarrow.parquet as parquet

        rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
        return rows
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_items_without_pyarrow_are_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = ItemScore(3, ("a", "b"), (-1.0, -2.5), 1.0, 1.5)
    rows = list(item_rows(HISTORY[1], {"t": [score]}, {"t": [score]}))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    path = write_items(tmp_path / "items", 7, HISTORY[1], rows)
    assert path.name == "0007-look-step=10.jsonl"
    assert read(path) == rows


def test_csv_logger_gets_files(folder: Path) -> None:
    (log,) = (folder / "csv").iterdir()
    rows = list(csv.DictReader((log / "forgetting.csv").open()))
    assert [row["task"] for row in rows] == ["a", "b", "pooled"]
    assert rows[-1]["items"] == "48"
    assert (log / "forgetting.png").stat().st_size > 5_000
    assert "forgetting/kl_general" in (log / "metrics.csv").read_text().splitlines()[0]


def test_tensorboard_gets_text_and_image(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (folder / "board").iterdir()
    events = EventAccumulator(str(log), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    (text,) = events.Tensors("forgetting/table/text_summary")
    assert b"| pooled | 48 |" in text.tensor_proto.string_val[0]
    (image,) = events.Images("forgetting/plot")
    assert (image.step, image.width > 400) == (4, True)
    assert [event.step for event in events.Scalars("forgetting/pooled/delta")] == [0, 2, 4, 4]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_gets_a_table_and_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.reporting import plot_forgetting

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    hand_out(logger, HISTORY[-1], plot_forgetting(HISTORY)[0])
    summary = dict(logger.experiment.summary)
    media = [path.suffix for path in Path(logger.experiment.dir).rglob("media/**/*.*")]
    logger.experiment.finish()
    assert summary["forgetting/table"]["_type"] == "table-file"
    assert summary["forgetting/plot"]["_type"].startswith("images")
    assert sorted(media) == [".json", ".png"]


def test_tables_say_what_the_report_says() -> None:
    text, markdown = plain_table(HISTORY[-1]), markdown_table(HISTORY[-1])
    assert "Forgetting, verdict at step 10" in text.splitlines()[0]
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
    assert "| a | 100 | 50.0 | 47.0 | -3.0 +- 1.0 | 3 | 1 | 0.6 |" in markdown


@pytest.mark.parametrize("rich", [True, False])
def test_table_is_printed_with_and_without_rich(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_lora.reporting.table import print_forgetting

    monkeypatch.setenv("COLUMNS", "140")
    if not rich:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    print_forgetting(HISTORY[-1])
    shown = capsys.readouterr().out
    assert "pooled" in shown
    assert "-3.0 +- 1.0" in shown
    assert ("━" in shown) == rich


def test_learning_against_forgetting() -> None:
    fig, ax = plot_learning(
        {"LoRA": [(3.9, -9.0), (3.7, -8.0)], "BaseKL": [(4.1, -3.0)]}, {"scales": [(5.2, 0.0), (4.4, -1.0)]}, base=5.2
    )
    centres = {c.get_label(): (c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in ax.containers}
    assert centres["LoRA"] == pytest.approx((3.8, -8.5))
    assert centres["BaseKL"] == pytest.approx((4.1, -3.0))
    assert ax.xaxis_inverted()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"LoRA", "BaseKL", "scales", "base"}
    with pytest.raises(ConfigError, match="`points` is empty"):
        plot_learning({})


PYPLOT = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("svg")
from tests.reporting.test_forgetting import HISTORY
from lightning_lora.reporting.output import ForgettingOutput
ForgettingOutput(Path(sys.argv[1])).finish(HISTORY)
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
"""


def test_backend_stays_the_users_and_no_figure_is_kept(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]  # from where `tests` can be imported
    done = subprocess.run([sys.executable, "-c", PYPLOT, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "forgetting.png").exists()
