# SPDX-License-Identifier: Apache-2.0
"""`CausalLMModule` and packed data on two processes, whole and sharded, with either loss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from small_base.data import load_tokenizer
from tests.helpers import tiny_llama

SCRIPT = Path(__file__).with_name("two_ranks.py")


def played(folder: Path, strategy: str, loss: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(SCRIPT), str(folder), strategy, loss]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
def test_two_ranks_train_alike_whole_and_sharded_with_either_loss(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    tiny_llama(vocab=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    reference, _ = played(tmp_path, "ddp", "plain")
    assert reference["logged"]["tokens_per_second"] > 0
    for strategy, loss in (("ddp", "chunked"), ("fsdp2", "plain"), ("fsdp2", "chunked")):
        first, second = played(tmp_path, strategy, loss)
        for name in ("val_loss", "tokens_per_second"):
            assert first["logged"][name] == second["logged"][name]
        assert first["logged"]["val_loss"] == pytest.approx(reference["logged"]["val_loss"], rel=1e-4)
        assert len(first["trained"]) == len(reference["trained"])
        for mine, other, whole in zip(*(run["trained"].values() for run in (first, second, reference)), strict=True):
            assert torch.equal(mine, other)
            torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-4)
