# SPDX-License-Identifier: Apache-2.0
"""``lightning-lora eval``: the numbers of a run's verdict without a run, and what its exit code says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora.cli.main import main
from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import load_tasks
from lightning_lora.io.adapter import load_adapter
from lightning_lora.io.merge_disk import merge_to_disk
from tests.cli.small import BASE, tasks, write_adapter
from tests.cli.test_commands import run

REPEATED = 12  # so many times the items of a task, for a drop that shows


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    capsys.readouterr()
    assert main(["eval", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_in_a_process_of_its_own_standard_output_is_json_alone(tmp_path: Path) -> None:
    adapter, found = write_adapter(tmp_path / "a"), tasks(tmp_path / "tasks")
    items = tmp_path / "items.jsonl"
    done = run(tmp_path, "eval", BASE, adapter, "--tasks", *found, "--items", str(items), "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["held"] is True
    assert said["verdict"].startswith("Held: no drop of more than 0.5 points")
    assert said["pooled"]["n_items"] == 16
    assert {row["task"] for row in map(json.loads, items.read_text().splitlines())} == set(said["tasks"])
    assert "Traceback" not in done.stderr
    assert "%|" not in done.stderr


def test_numbers_are_those_of_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, found = write_adapter(tmp_path / "a", std=0.1), tasks(tmp_path / "tasks")
    said = answer(capsys, BASE, adapter, "--tasks", *found)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    load_adapter(model, adapter)
    report = Monitor(load_tasks(found)).verdict(Scorer(model, AutoTokenizer.from_pretrained(BASE)), step=0)
    for name, task in report.to_dict()["tasks"].items():
        assert {k: v for k, v in said["tasks"][name].items() if k != "soft_delta_se"} == pytest.approx(
            {k: v for k, v in task.items() if k != "soft_delta_se"}
        )


def test_forgetting_is_said_and_fails_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "a", std=0.5)
    found = tasks(tmp_path / "tasks")
    for file in (tmp_path / "tasks").glob("*.jsonl"):
        file.write_text(file.read_text() * REPEATED)
    given = ["eval", BASE, adapter, "--tasks", *found, "--quiet"]
    assert main(given) == 0
    shown = capsys.readouterr().out
    assert "Forgetting: below the base by more than 0.5 points, at an error probability of 0.05: " in shown
    assert main([*given, "--fail_on_forgetting"]) == 1
    assert main([*given, "--fail_on_forgetting", "--tolerance=0.9"]) == 0
    assert "Held" in capsys.readouterr().out.splitlines()[-1]


def test_a_whole_model_is_what_its_adapter_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, found = write_adapter(tmp_path / "a", std=0.1), tasks(tmp_path / "tasks")
    merge_to_disk(BASE, adapter, tmp_path / "merged", dtype="fp32", check_base=False, progress=False)
    common = ["--tasks", *found, "--dtype=fp32"]
    of_adapter = answer(capsys, BASE, adapter, *common)
    of_model = answer(capsys, BASE, str(tmp_path / "merged"), *common)
    assert of_model["pooled"] == pytest.approx(of_adapter["pooled"], abs=1e-4)
    assert of_model["pooled"]["soft_delta"] != 0.0
    assert main(["eval", BASE, str(tmp_path / "merged"), *common, "--quantize=nf4"]) == 2


def test_the_dtype_of_the_training_is_found_by_the_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, found = write_adapter(tmp_path / "a", quantize="nf4"), tasks(tmp_path / "tasks")
    given = [BASE, adapter, "--tasks", *found, "--limit=4"]
    assert answer(capsys, *given)["pooled"]["n_items"] == 4  # the base is stored in bf16, the adapter was not
    assert main(["eval", *given, "--dtype=bf16"]) == 2
    assert "trained on another base" in capsys.readouterr().err
    answer(capsys, *given, "--quantize=none")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: "./nowhere"}, "there is no model at ./nowhere"),
        ({1: "./nowhere"}, "there is no adapter at ./nowhere"),
        ({3: "./nowhere.yaml"}, "nowhere.yaml"),
        ({4: "--device=tpu9"}, "`device` must be"),
        ({4: "--limit=0"}, "`limit` must be 1 or more"),
        ({4: "--tolerance=2"}, "`tolerance` is a drop"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_two(
    change: dict[int, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [BASE, write_adapter(tmp_path / "a"), "--tasks", tasks(tmp_path / "tasks")[0], "--seed=1"]
    assert main(["eval", *(change.get(i, word) for i, word in enumerate(words))]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    last = said.err.splitlines()[-1]
    assert last.startswith("lightning-lora eval: error: ")
    assert text in last
