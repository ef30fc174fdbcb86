# SPDX-License-Identifier: Apache-2.0
"""The engine's benchmarks run to their end, and what they print is a table of finite numbers."""

from __future__ import annotations

import math
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_llama

FOLDER = Path(__file__).parents[1] / "benchmarks"
VARIANTS = {"frozen", "ours", "ours-drop", "ours-nf4", "peft", "peft-drop", "peft-same", "peft-same-drop"}
ALL = VARIANTS | {"full", "ours-nf4-drop", "peft-nf4"}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(FOLDER)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, script: str, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", [script, "--tiny", "--threads", "1", *args])
    runpy.run_path(str(FOLDER / script), run_name="__main__")
    return capsys.readouterr().out


def rows_of(printed: str) -> dict[str, dict[str, str]]:
    """By variant, each cell under its column's name."""
    rows, head = {}, []
    for line in printed.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| variant"):
            head = cells
        elif line.startswith("| "):
            rows[cells[0]] = dict(zip(head, cells, strict=True))
    return rows


@pytest.mark.parametrize(
    ("script", "args", "variants"),
    [
        ("engine.py", [], ALL),
        ("memory.py", [], VARIANTS),
        ("gpu.py", [], ALL | {"peft-nf4-drop"}),
        ("gpu.py", ["--shape", "qwen2.5-7b", "--checkpointing", "--variants", "frozen,ours-nf4,peft"], {"frozen"}),
    ],
)
def test_it_runs(
    script: str,
    args: list[str],
    variants: set[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed = run(capsys, monkeypatch, script, *args)
    assert f"torch {torch.__version__}" in printed
    rows = rows_of(printed)
    assert variants <= rows.keys()
    for name, row in rows.items():
        numbers = [float(n) for cell in row.values() for n in re.findall(r"^[\d.,e+-]*\d$", cell.replace(",", ""))]
        assert numbers, row
        assert all(math.isfinite(number) for number in numbers), row
        trains = name != "frozen" and "gradient norm" in row
        assert not trains or float(row["gradient norm"]) > 0, row


@pytest.mark.slow
def test_scoring_is_timed_beside_hflm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run(capsys, monkeypatch, "scoring.py", "--rounds", "1")  # which compares the scores too
    rows = [line.split("|")[1:] for line in printed.splitlines() if line.startswith(("| hidden 512", "| tiny"))]
    assert {row[0].split(";")[0].strip() for row in rows} == {"hidden 512, 8 layers", "tiny", "tiny, short items"}
    for case in {row[0] for row in rows}:
        taken = {row[1].strip(): float(row[3]) for row in rows if row[0] == case}
        assert set(taken) == {"`HFLM(batch_size=8)`", "`HFLM(batch_size=32)`", "ours, each choice alone", "ours"}
        assert min(ratio for name, ratio in taken.items() if "HFLM" in name) == 1.0


def test_it_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        with pytest.raises(SystemExit, match="there is no CUDA device: `--tiny` shows on a CPU whether"):
            runpy.run_path(str(FOLDER / "gpu.py"), run_name="__main__")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--variants", "ours-same"])
    with pytest.raises(ValueError, match="unknown variant 'ours-same'"):
        runpy.run_path(str(FOLDER / "gpu.py"), run_name="__main__")


def test_starts_lower_the_error_of_packing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["starts.py", "--ranks", "8", "--folder", str(tmp_path)])
    runpy.run_path(str(FOLDER / "starts.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:]][:2] == ["| q_proj", "| k_proj"]
    for line in lines[1:]:
        pissa, _, once, often = ([float(n) for n in cell.split("/")] for cell in line.strip("| ").split(" | ")[2:])
        assert min(pissa + once) > 0
        assert all(more > less for more, less in zip(often, once, strict=True))
