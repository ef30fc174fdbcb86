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
from lightning_lora.errors import Notice
from lightning_lora.forgetting.scoring import ItemScore
from lightning_lora.reporting.items import item_rows, write_items
from lightning_lora.reporting.output import ForgettingOutput
from lightning_lora.reporting.table import markdown_table, plain_table
from tests.forgetting import tiny
from tests.helpers import make_trainer
from tests.reporting.test_forgetting import HISTORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with files and three loggers."""
    folder = tmp_path_factory.mktemp("run")
    tasks = [tiny.write_task(folder / "tasks", name, tiny.items(24, seed=seed)) for seed, name in enumerate("ab")]
    target = tiny.write_task(folder / "tasks", "domain", tiny.items(12, seed=2))
    monitor = ForgettingMonitor(
        [str(task) for task in tasks], tiny.tokenizer(), every_n_steps=2, items_per_eval=8, dirpath=folder / "out",
        target_tasks=str(target),
    )  # fmt: skip
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
    for name in ("forgetting", "learning"):
        assert (folder / f"out/{name}.png").read_bytes()[:4] == b"\x89PNG"
    files = sorted((folder / "out/items").iterdir())
    assert [file.stem for file in files] == [
        "0000-look-step=0", "0001-look-step=2", "0002-look-step=4", "0003-verdict-step=4"
    ]  # fmt: skip
    rows = read(files[-1])
    assert len(rows) == 60
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
    assert [row["task"] for row in rows] == ["a", "b", "pooled", "domain (target)"]
    assert rows[2]["items"] == "48"
    for name in ("forgetting", "learning"):
        assert (log / f"{name}.png").stat().st_size > 5_000
    assert "forgetting/kl_general" in (log / "metrics.csv").read_text().splitlines()[0]


def test_tensorboard_gets_text_and_image(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = (folder / "board").iterdir()
    events = EventAccumulator(str(log), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    (text,) = events.Tensors("forgetting/table/text_summary")
    assert b"| pooled | 48 |" in text.tensor_proto.string_val[0]
    for plot in ("forgetting/plot", "learning/plot"):
        (image,) = events.Images(plot)
        assert (image.step, image.width > 400) == (4, True)
    assert [event.step for event in events.Scalars("forgetting/pooled/delta")] == [0, 2, 4, 4]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_wandb_gets_numbers_a_table_and_images_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run with the real logger, offline: nothing is sent, and nothing is left outside its folder."""
    import wandb

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")  # wandb reports its own errors home, offline too
    (tmp_path / "wandb-home").mkdir()
    logger = WandbLogger(save_dir=tmp_path / "logs", offline=True)
    tasks = [str(tiny.write_task(tmp_path / "tasks", name, tiny.items(8, seed=1))) for name in ("a", "domain")]
    monitor = ForgettingMonitor(tasks[0], tiny.tokenizer(), items_per_eval=4, target_tasks=tasks[1])
    trainer = make_trainer(tmp_path, [LoRA(r=4), monitor], max_steps=2, logger=logger)
    trainer.fit(tiny.Student(), tiny.loader())
    run = logger.experiment
    summary, folder = dict(run.summary), Path(run.dir)
    wandb.teardown()  # ends its process too
    assert run.offline
    assert monitor.report is not None
    assert summary["forgetting/a/acc"] == monitor.report.tasks["a"].acc
    assert summary["forgetting/table"]["_type"] == "table-file"
    assert summary["forgetting/table"]["nrows"] == 2
    for name in ("forgetting/plot", "learning/plot"):
        assert summary[name]["_type"].startswith("images")
    media = sorted(path.suffix for path in folder.rglob("media/**/*.*"))
    assert media == [".json", ".png", ".png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "tasks", "wandb-home"]
    assert (tmp_path / "logs/forgetting.json").exists()


def test_files_go_beside_the_logs_by_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = tiny.write_task(tmp_path / "tasks", "a", tiny.items(8, seed=1))

    def fit(steps: int, logger: Any = False, beside: bool = False, **kwargs: Any) -> None:
        monitors = [
            ForgettingMonitor(str(task), tiny.tokenizer(), every_n_steps=1, items_per_eval=4, gauges=False, seed=seed)
            for seed in range(1 + beside)
        ]
        trainer = make_trainer(tmp_path / "root", [LoRA(r=4), *monitors], max_steps=steps, logger=logger, **kwargs)
        trainer.fit(tiny.Student(), tiny.loader(), tiny.loader(8))

    fit(1, fast_dev_run=True)
    assert not (tmp_path / "root").exists()
    with caplog.at_level("INFO", "lightning.pytorch"):
        fit(3)
    said = [record.message for record in caplog.records if "what the looks found" in record.message]
    assert said == [f"ForgettingMonitor has written what the looks found to {tmp_path / 'root'}"]
    assert len(list((tmp_path / "root/items").iterdir())) == 5
    fit(1)  # another run in the same folder: no look of the first is left
    assert [path.stem for path in sorted((tmp_path / "root/items").iterdir())] == [
        "0000-look-step=0", "0001-look-step=1", "0002-verdict-step=1"
    ]  # fmt: skip
    fit(1, beside=True, default_root_dir=tmp_path / "two")
    for folder in ("two", "two/monitor_2"):
        assert len(json.loads((tmp_path / folder / "forgetting.json").read_text())) == 3
    fit(1, logger=CSVLogger(tmp_path / "logs"))
    (log,) = (tmp_path / "logs/lightning_logs").iterdir()
    assert {"forgetting.json", "forgetting.png", "forgetting.csv", "metrics.csv", "items"} <= {
        path.name for path in log.iterdir()
    }


def test_a_default_folder_where_a_file_stands_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = ForgettingOutput()
    with pytest.warns(Notice, match="cannot be written to"):
        output.begin(tmp_path / "file", 0, asked=False)
    assert output.folder is None


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


PYPLOT = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("svg")
from tests.reporting.test_forgetting import HISTORY
from lightning_lora.reporting.output import ForgettingOutput
output = ForgettingOutput()
output.begin(Path(sys.argv[1]), 0)
output.learned = {0: 4.0, 10: 3.0}
output.finish(HISTORY)
assert matplotlib.get_backend() == "svg", matplotlib.get_backend()
assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
"""


def test_backend_stays_the_users_and_no_figure_is_kept(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]  # from where `tests` can be imported
    done = subprocess.run([sys.executable, "-c", PYPLOT, str(tmp_path)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"forgetting.json", "forgetting.png", "learning.png"}
