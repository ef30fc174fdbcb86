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
from tests.forgetting import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes wrote."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.forgetting.two_ranks", str(task_folder), str(out)]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**shared, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(e[-3000:] for e in errors)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


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
def test_ranks_of_a_fit_stop_at_the_same_step_with_the_same_reports(ranks: list[dict[str, Any]]) -> None:
    first, second = (found["fit"] for found in ranks)
    assert first["step"] == second["step"] < 30
    assert first["weights"] == pytest.approx(second["weights"])
    for one, other in zip(first["reports"], second["reports"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [r["kind"] for r in first["reports"]][-1] == "verdict"
    assert first["reports"][-1]["pooled"]["acc_base"] == 1.0
