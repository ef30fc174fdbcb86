# SPDX-License-Identifier: Apache-2.0
"""The numbered examples run as they are, made small by their own options, and show what they say they show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_readme import execute, run_script, write_tasks

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/07_tour.ipynb"


def printed(capsys: pytest.CaptureFixture[str], script: str, *args: str) -> str:
    """What an example prints, run in this process."""
    assert run_script(f"examples/{script}", list(args)) == 0
    return capsys.readouterr().out


def numbers(line: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


def test_minimal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = printed(capsys, "01_minimal.py", "--out", str(tmp_path), "--steps", "60")
    rows = {line[:18].strip(): numbers(line) for line in out.splitlines()}
    assert rows["adapters on"][1] < 0.3 < rows["adapters off"][1]  # the second wave is learned by the adapters
    assert rows["adapters off"][0] < 0.3 < rows["adapters on"][0]  # and the first is left as it was without them
    assert rows["loaded from folder"] == rows["adapters on"]


def test_classification(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    args = ["--examples", "480", "--epochs", "3", "--lr", "6e-3"]
    out = printed(capsys, "03_classification.py", "--out", str(tmp_path), *args)
    (line,) = (x for x in out.splitlines() if x.startswith("accuracy"))
    before, after = numbers(line)
    assert after > max(before, 0.6)
    assert "peft: ok" in out
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_vision(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = printed(capsys, "06_vision.py", "--out", str(tmp_path / "merged"), "--images", "300", "--epochs", "1")
    size, accuracy, merged = out.splitlines()
    assert numbers(size)[1] < 0.5 * numbers(size)[0]
    assert numbers(accuracy)[1] > max(numbers(accuracy)[0], 0.6)
    assert numbers(merged)[0] > 0.5


@pytest.mark.slow
def test_forgetting(tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    args = ["--task", str(tmp_path / "tasks/speech_continuation.yaml"), "--steps", "4", "--items", "4"]
    out = finished("04_forgetting.py", *args, "--block_size", "32", "--out", str(tmp_path / "out"))
    rows = out.strip().splitlines()[-3:]
    assert [row.split("  ")[0] for row in rows] == ["LoRA", "with BaseKL", "with ReplayMix"]
    for name in ("LoRA", "with_BaseKL", "with_ReplayMix"):
        assert (tmp_path / f"out/{name}/forgetting.png").is_file()
        looks = json.loads((tmp_path / f"out/{name}/forgetting.json").read_text())
        assert looks[-1]["kind"] == "verdict"
        assert looks[0]["pooled"]["delta"] == 0  # nothing is trained yet


@pytest.mark.slow
def test_fsdp2(tmp_path: Path) -> None:
    out = finished("05_fsdp2.py", "--steps", "2", "--block_size", "16", "--out", str(tmp_path))
    (held,) = (line for line in out.splitlines() if line.startswith("2 processes"))
    first, second, whole = numbers(held)
    assert first + second == pytest.approx(whole, rel=0.02)
    assert max(first, second) < 0.6 * whole
    assert "gone on from step 2 to 4" in out
    assert (tmp_path / "merged/model.safetensors").is_file()


def finished(script: str, *args: str) -> str:
    """What an example prints, run by an interpreter of its own."""
    command = [sys.executable, str(ROOT / "examples" / script), *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


# The notebook


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert len(code) > 4
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        compile("".join(cell["source"]), "cell", "exec")


@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cell by cell in one namespace, fewer steps and items, over the first items of its task."""
    import matplotlib as mpl

    mpl.use("Agg")
    write_tasks(tmp_path / "tasks")
    monkeypatch.setattr("small_base.data.TASKS_DIR", tmp_path / "tasks")
    monkeypatch.chdir(ROOT / "examples")
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for i, cell in enumerate(cells()):
        if cell["cell_type"] == "code":
            execute("".join(cell["source"]), namespace, f"cell {i}")
    assert namespace["monitor"].report.pooled.n_items == 8
    assert namespace["difference"] < 1e-4
    assert all(len(values) == 5 for values in namespace["curves"].values())


# The list


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples/README.md").read_text()
    entries = [path.name for path in (ROOT / "examples").iterdir() if path.name not in ("README.md", "__pycache__")]
    assert [name for name in entries if f"examples/{name}" not in listed] == []
    for path in re.findall(r"examples/[\w./]+\w", listed):
        assert (ROOT / path).exists(), path
