# SPDX-License-Identifier: Apache-2.0
"""What the demo leaves on disk computes what it trained: in PEFT, in transformers, and rebuilt from its checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from demo.shakespeare import Shakespeare
from lightning_lora.io.checkpoint import load_from_checkpoint
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from small_base.data import load_model

ROOT = Path(__file__).parents[2]


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(1000, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.slow
def test_peft_and_transformers_compute_what_the_demo_trained(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "examples/demo/main.py"), "--out", str(out), "--steps", "10", "--items", "4"]
    # its exit code says whether anything was forgotten in so few steps, which is not asked here
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    last = max((out / "adapters").glob("*.ckpt"), key=lambda p: int(re.search(r"step=(\d+)", p.name)[1]), default=None)
    assert last is not None, done.stderr[-2000:]
    live = load_from_checkpoint(Shakespeare, last).model
    expected = logits(live)
    trained_over = load_model()
    assert error(logits(trained_over), expected) > 1e-2  # there is something to compare

    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    assert error(logits(merged), expected) < 1e-4

    with torch.no_grad():
        for name, module in adapter_modules(live):
            assert isinstance(module, LoRALinear)
            trained_over.get_submodule(name).weight.copy_(module.base_weight(torch.float32))
    adapted = peft.PeftModel.from_pretrained(trained_over, last.with_suffix(""))
    assert error(logits(adapted), expected) < 1e-4
