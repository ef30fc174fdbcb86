# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes roll back, scale and size their looks alike, with adapters whole or sharded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forgetting import tiny

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes wrote."""
    folder, out = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("ranks")
    tiny.write_task(folder, "known", tiny.known_items(tiny.llama(), 60, seed=3))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.callbacks.remedy_ranks", str(folder), str(out)]
    processes = [
        subprocess.Popen(command, cwd=out, env={**shared, "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(e[-3000:] for e in errors)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "scale", "budget"])
def test_both_ranks_do_the_same_and_the_checkpoint_holds_it(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (found[name] for found in ranks)
    assert first == second
    assert first["said"] == first["outcome"]
    assert first["left"] == pytest.approx(first["saved"])
    assert first["reports"][-1]["kind"] == "verdict" or name == "budget"  # whose time may not hold one


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_adapters_go_back_to_what_held(ranks: list[dict[str, Any]], name: str) -> None:
    found = ranks[0][name]
    assert 4 < found["step"] < 12
    assert found["outcome"] == {
        "by": "rollback", "step": found["step"], "rolled_back_to": 4, "holds": True, "items": 60
    }  # fmt: skip
    assert found["reports"][-1]["alarms"] == []


def test_scale_is_one_on_both(ranks: list[dict[str, Any]]) -> None:
    found = ranks[0]["scale"]
    assert found["outcome"]["by"] == "scale"
    assert found["strengths"] == [found["outcome"]["scale"]]
    assert 0 < found["strengths"][0] < 1


def test_rank_zeros_clock_sizes_the_looks(ranks: list[dict[str, Any]]) -> None:
    first, second = (
        [(r["kind"], r["step"], r["pooled"]["n_items"]) for r in found["budget"]["reports"]] for found in ranks
    )
    assert first == second
    assert first[0] == ("look", 0, 1)
