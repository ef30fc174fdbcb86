# SPDX-License-Identifier: Apache-2.0
"""The demo: its tables, the folder it writes to, and (slow) the whole of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo.main import prepare
from demo.summary import z
from demo.table import bytes_of, section, size
from lightning_lora.forgetting.report import TaskReport

ROOT = Path(__file__).parents[2]


def test_section_aligns_labels_left_and_values_right() -> None:
    text = section("Title", [("a", "1"), ("longer", "100")], ("", "n"))
    assert text.splitlines() == ["Title", "-----------", "          n", "a         1", "longer  100"]


def test_section_refuses_rows_of_unequal_length() -> None:
    with pytest.raises(IndexError):
        section("Title", [("a", "1"), ("b",)])


@pytest.mark.parametrize(("n_bytes", "text"), [(0, "0 kB"), (942_400, "942 kB"), (4_332_920, "4.3 MB")])
def test_size_is_for_people(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text


def test_bytes_of_a_folder_are_those_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b").write_bytes(b"4567")
    assert bytes_of(tmp_path) == 7
    assert bytes_of(tmp_path / "a") == 3


def test_z_is_the_difference_in_standard_errors() -> None:
    task = TaskReport(0.5, 0.6, -0.1, 0.02, 9, 4, 0.0, 0.0, 50, 0.2)
    assert z(task) == pytest.approx(-5.0)
    assert z(TaskReport(0.5, 0.5, 0.0, 0.0, 0, 0, 0.0, 0.0, 50, 1.0)) == 0.0


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="give another folder"):
        prepare(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_an_earlier_demo_is_made_anew(tmp_path: Path) -> None:
    prepare(tmp_path / "out")
    (tmp_path / "out/old.txt").write_text("old")
    prepare(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["made_by_the_demo"]


@pytest.mark.slow
def test_demo_holds(tmp_path: Path) -> None:
    """With fewer steps and items, by the same checks: the loss falls, forgetting is seen, the merge is right."""
    command = [sys.executable, str(ROOT / "examples/demo/main.py"), "--out", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    small = ["--steps", "60", "--items", "60"]
    done = subprocess.run([*command, *small], env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "FAILED" not in done.stdout
    assert {"forgetting.png", "table.txt", "forgetting.json", "adapters", "merged"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
