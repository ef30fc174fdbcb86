# SPDX-License-Identifier: Apache-2.0
"""PiSSA, LoftQ, LoRA-FA and EVA on two processes, and what is refused there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("starts_ranks.py")


@pytest.mark.slow
def test_two_ranks_train_alike_resume_exactly_and_refuse_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("pissa", "loftq", "frozen A", "eva"):
        whole = first[name]["whole"]
        for other in (first[name]["resumed"], second[name]["whole"], second[name]["resumed"]):
            assert whole.keys() == other.keys()
            assert all(torch.equal(tensor, other[key]) for key, tensor in whole.items()), name
        assert all(torch.equal(a, b) for a, b in zip(first[name]["first"], second[name]["first"], strict=True))
    for A in first["eva"]["first"]:
        torch.testing.assert_close(A @ A.t(), torch.eye(4), rtol=1e-4, atol=1e-5)
    assert any(key.endswith("start_A") for key in first["pissa"]["whole"])
    for where, title in (("fsdp1", "FSDP 1"), ("fsdp2", "FSDP 2"), ("tensor_parallel", "tensor parallelism")):
        start = f"a start that is taken out of the base (PiSSA, OLoRA, LoftQ) is not built for {title}"
        for name in ("pissa", "loftq"):
            assert start in first[where][name]
        assert f"LoRA-FA (`freeze_lora_A`) is not built for {title}" in first[where]["frozen A"]
    assert "EVA is not built for adapters that are sharded" in first["fsdp1"]["eva"]
