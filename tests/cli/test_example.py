# SPDX-License-Identifier: Apache-2.0
"""The configuration of the CLI example runs the main job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from demo.shakespeare import Shakespeare, ShakespeareData
from lightning_lora import ForgettingMonitor
from tests.test_readme import write_tasks

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/02_lightning_cli/config.yaml"


def test_first_line_is_the_command_that_runs_it() -> None:
    first = CONFIG.read_text().splitlines()[0]
    script, _, _, config = first.removeprefix("# python ").split()
    assert (ROOT / script).is_file()
    assert ROOT / config == CONFIG


def test_config_runs_the_main_job(tmp_path: Path) -> None:
    """The file as it is, but a few steps over the first items of the tasks."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_tasks(tmp_path / "tasks")
    config = yaml.safe_load(CONFIG.read_text().replace("examples/small_base/tasks/", "tasks/"))
    config["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "logger": False, "enable_progress_bar": False}
    config["data"] |= {"block_size": 32, "batch_size": 2, "val_rows": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    args = ["fit", "--config", "config.yaml"]
    cli = LightningCLI(Shakespeare, ShakespeareData, args=args, save_config_callback=None)

    (monitor,) = (c for c in cli.trainer.callbacks if isinstance(c, ForgettingMonitor))
    assert monitor.report.kind == "verdict"
    assert set(monitor.report.tasks) == {Path(t).stem for t in monitor.tasks}
    folders = [p.parent for p in (tmp_path / "outputs/cli/adapters").rglob("adapter_model.safetensors")]
    assert folders
    assert json.loads((folders[0] / "adapter_config.json").read_text())["r"] == 16
    assert (tmp_path / "outputs/cli/merged/merge_report.json").is_file()


@pytest.mark.slow
def test_example_runs_as_its_first_line_says(tmp_path: Path) -> None:
    """The command itself, in a folder that has the examples where the repository has them."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    command = [
        sys.executable,
        "examples/02_lightning_cli/main.py",
        "fit",
        "--config",
        "examples/02_lightning_cli/config.yaml",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "--trainer.max_steps=12"], cwd=tmp_path, env=env, check=True, timeout=900)
    assert (tmp_path / "outputs/cli/merged/config.json").is_file()
