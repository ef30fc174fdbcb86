# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes find what one finds, stop together and fail together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.forgetting.monitor import Monitor
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import LoadedTask
from lightning_lora.io.adapter import save_adapter
from tests.forgetting import tiny, two_ranks

ROOT = Path(__file__).parents[2]


def launch(jobs: list[str], task_folder: Path, out: Path, **environment: str) -> list[tuple[int, str]]:
    """Two processes; each one's exit code and what it wrote to stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.forgetting.two_ranks", str(task_folder), str(out), *jobs]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment,
    }  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=out, env={**shared, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def both(jobs: list[str], task_folder: Path, out: Path, **environment: str) -> list[dict[str, Any]]:
    """What each of two processes wrote, which both ended well."""
    ended = launch(jobs, task_folder, out, **environment)
    assert [code for code, _ in ended] == [0, 0], "\n".join(error[-3000:] for _, error in ended)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters that already do something, for the tiny Llama inside a `Student`."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(tiny.adapted(0.3), folder)
    return folder


@pytest.fixture(scope="module")
def ranks(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes wrote."""
    out = tmp_path_factory.mktemp("ranks")
    return both(["look", "failing_look", "scores", "refuses_to_write"], task_folder, out)


@pytest.fixture(scope="module")
def runs(task_folder: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes under Lightning wrote."""
    out = tmp_path_factory.mktemp("runs")
    return both(["fit", "watched_ddp", "watched_fsdp2"], task_folder, out, ADAPTER=str(adapter))


@pytest.mark.slow
def test_log_likelihoods_of_two_ranks_are_those_of_one(
    ranks: list[dict[str, Any]], loaded: dict[str, LoadedTask], tokenizer: Any
) -> None:
    """Whole on each rank and in halves (FSDP 2); fewer items than ranks, and batches of unequal lengths, among them."""
    first, second = (found["scores"] for found in ranks)
    assert first == second
    alone = [two_ranks.ask(Scorer(tiny.adapted(0.3), tokenizer), loaded, picked) for picked in two_ranks.PICKS]
    assert set(first) == {f"{how}, {share}" for how in ("copies", "fsdp2") for share in (True, False)}
    for found in first.values():
        for theirs, own in zip(found, alone, strict=True):
            for scores, expected in zip(theirs, own, strict=True):
                for (doc, values, correct), (own_doc, own_values, own_correct) in zip(scores, expected, strict=True):
                    assert (doc, correct) == (own_doc, own_correct)
                    assert values == pytest.approx(own_values, abs=1e-4)


@pytest.mark.slow
def test_a_rank_that_fails_inside_a_sharded_forward_ends_both_with_its_error(task_folder: Path, tmp_path: Path) -> None:
    ended = launch(["dies"], task_folder, tmp_path)
    assert [code for code, _ in ended] == [1, 1]
    assert (tmp_path / "1.txt").read_text() == "MemoryError: rank 1 is out of memory"
    said = (tmp_path / "0.txt").read_text()
    assert said.startswith("TaskError: rank 1 failed to compute log-likelihoods, and so all stop: MemoryError: rank 1")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_reports_of_a_run_on_two_ranks_are_those_of_one(
    how: str, runs: list[dict[str, Any]], task_folder: Path, adapter: Path
) -> None:
    first, second = (found[f"watched_{how}"] for found in runs)
    assert first == second
    alone = two_ranks.watched(task_folder, str(adapter), devices=1)
    assert [report["kind"] for report in alone] == ["look"] * 3 + ["verdict"]
    assert alone[-1]["pooled"]["flips_lost"] + alone[-1]["pooled"]["flips_gained"] > 0
    for theirs, own in zip(first, alone, strict=True):
        for name, task in own["tasks"].items():
            assert theirs["tasks"][name] == pytest.approx(task, abs=1e-4)
        assert theirs["pooled"] == pytest.approx(own["pooled"], abs=1e-4)
        assert theirs["alarms"] == own["alarms"]


@pytest.mark.slow
def test_text_is_shared_out_over_whole_models_and_refused_of_sharded_ones(
    ranks: list[dict[str, Any]], tokenizer: Any
) -> None:
    scorer = Scorer(tiny.adapted(0.3), tokenizer)
    prompts = ["the cat", "a river of stone", "old", "new house and blue moon"]
    with scorer.quietly():
        alone = scorer.generate(prompts, max_new_tokens=6)
    for found in ranks:
        whole, halves = found["refuses_to_write"]
        assert whole == alone
        assert halves.startswith("UnsupportedError: Text cannot be generated by a model that is spread over processes")


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one_with_half_the_forwards(
    ranks: list[dict[str, Any]], loaded: dict[str, LoadedTask], tokenizer: Any
) -> None:
    calls = []

    def forward(module: Any, ids: Any) -> Any:
        calls.append(len(ids))
        return module(ids).logits

    scorer = Scorer(tiny.adapted(0.3), tokenizer, forward=forward, batch_tokens=64)
    alone = {**Monitor(loaded, items_per_look=31).look(scorer, step=1).to_dict(), "seconds": 0}
    first, second = (found["look"] for found in ranks)
    assert first == second
    forwards = first.pop("forwards")
    assert forwards <= len(calls) / 2 + 2
    for name in ("alpha", "beta"):
        assert first["tasks"][name] == pytest.approx(alone["tasks"][name], abs=1e-6)
    assert first["pooled"] == pytest.approx(alone["pooled"], abs=1e-6)


@pytest.mark.slow
def test_a_failure_on_one_rank_stops_both(ranks: list[dict[str, Any]]) -> None:
    middle, early = zip(*(found["failing_look"] for found in ranks), strict=True)
    assert middle[0].startswith("TaskError: rank 1 failed to compute log-likelihoods")
    assert "rank 1 is out of memory" in middle[0]
    assert middle[1] == "RuntimeError: rank 1 is out of memory"
    assert early[0].startswith("TaskError: rank 1 failed to")
    assert early[1].startswith("AttributeError")


@pytest.mark.slow
def test_ranks_of_a_fit_stop_at_the_same_step_with_the_same_reports(runs: list[dict[str, Any]]) -> None:
    first, second = (found["fit"] for found in runs)
    assert first["step"] == second["step"] < 30
    assert first["weights"] == pytest.approx(second["weights"])
    for one, other in zip(first["reports"], second["reports"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [r["kind"] for r in first["reports"]][-1] == "verdict"
    assert first["reports"][-1]["pooled"]["acc_base"] == 1.0
