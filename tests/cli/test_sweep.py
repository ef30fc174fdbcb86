# SPDX-License-Identifier: Apache-2.0
"""``lightning-lora sweep``: the curve of a run's sweep without a run, and the adapter at the scale that is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora.cli.main import main
from lightning_lora.io.adapter import load_adapter
from lightning_lora.model.apply import set_adapter_scale
from lightning_lora.model.slots import adapter_modules
from tests.cli.small import BASE, tasks, write_adapter

IDS = torch.arange(24).reshape(2, 12) + 40


@pytest.fixture
def data(tmp_path: Path) -> str:
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{2 * n}"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(tmp_path / "data.jsonl")


def logits(adapter: str, scale: float = 1.0) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    load_adapter(model, adapter)
    if scale != 1.0:
        set_adapter_scale(model, scale)
    with torch.no_grad():
        return model(IDS).logits


def test_the_kept_scale_is_the_best_that_holds_and_is_written(
    tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, found = write_adapter(tmp_path / "a", std=0.1), tasks(tmp_path / "tasks")
    out, plot = tmp_path / "out", tmp_path / "curve.png"
    args = [BASE, adapter, "--tasks", *found, "--data", data, "--scales", "0", "0.5", "--tolerance=0.9"]
    assert main(["sweep", *args, "--write", str(out), "--plot", str(plot), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    curve = {point["scale"]: point for point in said["points"]}
    assert set(curve) == {0.0, 0.5, 1.0}
    assert curve[0.0]["pooled"]["delta"] == curve[0.0]["pooled"]["soft_delta"] == 0.0
    assert len({point["target"] for point in said["points"]}) == 3
    assert said["scale"] == min((0.5, 1.0), key=lambda scale: curve[scale]["target"])
    assert said["written"] == str(out)
    assert torch.allclose(logits(str(out)), logits(adapter, said["scale"]), atol=1e-5)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_target_tasks_and_a_linear_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, (first, second) = write_adapter(tmp_path / "a", std=0.1), tasks(tmp_path / "tasks")
    given = ["--tasks", first, "--target_tasks", second, "--scales", "0.5", "--tolerance=0.9", "--shape=linear"]
    assert main(["sweep", BASE, adapter, *given, "--write", str(tmp_path / "out"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["monitor"] == "target_acc"
    best = max(said["points"], key=lambda point: (point["target"], point["scale"]))
    assert said["scale"] == best["scale"]
    assert said["learning"]["1"] == {"function_words": said["points"][-1]["target"]}
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    load_adapter(model, tmp_path / "out")
    scalings = [module.scaling * module.strength for _, module in adapter_modules(model)]  # type: ignore[attr-defined]
    assert len(set(scalings)) == (1 if said["scale"] == 1.0 else 4)  # one for each of the base's blocks


def test_nothing_is_written_where_nothing_holds(tmp_path: Path, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, found = write_adapter(tmp_path / "a", std=1.0), tasks(tmp_path / "tasks")
    args = ["sweep", BASE, adapter, "--tasks", *found, "--data", data, "--scales", "1", "--tolerance=0"]
    assert main([*args, "--write", str(tmp_path / "out"), "--quiet"]) == 1
    assert "At no scale above 0 does the model hold" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ([], "give `--data`, a file of examples, or `--target_tasks`"),
        (["--data=d.jsonl", "--scales", "2"], "`scales` are shares of the adapter"),
        (["--data=d.jsonl", "--shape=cubic"], "`shape` must be one of"),
        (["--data=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    more: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "a")
    assert main(["sweep", BASE, adapter, "--tasks", tasks(tmp_path / "tasks")[0], "--limit=2", *more]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lightning-lora sweep: error: ")
    assert text in last
