# SPDX-License-Identifier: Apache-2.0
"""Embeddings, convolutions, attention, experts and token rows on two processes, and what is refused there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("targets_ranks.py")
TITLES = {
    "tied embedding": "LoRA on embeddings",
    "convolutions": "LoRA on convolutions",
    "attention": "LoRA on nn.MultiheadAttention",
    "experts": "LoRA on fused experts (`target_parameters`)",
    "tied tokens": "training of token rows (`trainable_token_indices`)",
}


@pytest.mark.slow
def test_two_ranks_train_alike_resume_exactly_and_refuse_by_name(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for case, title in TITLES.items():
        whole = first[case]["whole"]
        for other in (first[case]["resumed"], second[case]["whole"], second[case]["resumed"]):
            assert whole.keys() == other.keys()
            assert all(torch.equal(tensor, other[key]) for key, tensor in whole.items()), case
        for where, what in (("fsdp1", "FSDP 1"), ("fsdp2", "FSDP 2"), ("tensor_parallel", "tensor parallelism")):
            assert f"{title} is not built for {what}" in first[case][where]
