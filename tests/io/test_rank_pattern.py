# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's folders with some of the ranks: what is said of them, and patterns that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import AdaLoRAConfig, VeRAConfig, apply_adapters, load_adapter, save_adapter, validate_adapter
from lightning_lora.cli.main import main
from lightning_lora.errors import CheckpointError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.model.slots import adapter_modules
from tests.helpers import random_adapters, tiny_llama
from tests.io.merging import edit


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    model = tiny_llama()
    apply_adapters(model, AdaLoRAConfig(init_r=4, target_r=2, target_modules=["q_proj", "v_proj"]))
    random_adapters(model)
    for i, (_, module) in enumerate(adapter_modules(model)):
        nn.init.zeros_(module.adapter.lora_E[i:])
    save_adapter(model, tmp_path / "a")
    return tmp_path / "a"


def test_it_is_judged_and_described(pruned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_adapter(pruned, "peft").ok
    facts = adapter_facts(pruned)
    tensors = load_file(pruned / "adapter_model.safetensors")
    assert {t.shape[0] for key, t in tensors.items() if key.endswith("lora_E")} == {0, 1, 2, 3}
    assert (facts.parameters, facts.saved) == (sum(t.numel() for t in tensors.values()), [])
    assert main(["inspect", str(pruned), "--target", "peft"]) == 0
    assert f"adapter folder, AdaLoRA, {facts.parameters:,} parameters" in capsys.readouterr().out


def test_a_folder_of_vera_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    apply_adapters(model, VeRAConfig(r=4, modules_to_save=["lm_head"]))
    save_adapter(model, tmp_path / "a")
    assert adapter_facts(tmp_path / "a").saved == ["lm_head"]
    assert main(["inspect", str(tmp_path / "a"), "--target", "peft"]) == 0
    assert "adapter folder, VeRA, " in capsys.readouterr().out


def test_the_same_folder_gives_the_same_bits(pruned: Path) -> None:
    models = []
    for _ in range(2):
        models.append(tiny_llama())
        load_adapter(models[-1], pruned)
        torch.rand(7)
    for (_, a), (_, b) in zip(*map(adapter_modules, models), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.triplets, b.triplets, strict=True))


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (4, "`rank_pattern` must be a table of lists of true and false"),
        ({f"{Q}.lora_E": 4}, rf"got '{Q}.lora_E': 4. Save the adapter again"),
        ({f"{Q}.lora_E": [1, 0, 0, 0]}, "must be a table of lists of true and false"),
        ({Q: [True, True, False, False]}, "by names that end in '.lora_E'"),
        (
            {f"{Q}.lora_E": [True] * 4},
            "has the shape .* and `rank_pattern` leaves it 4 ranks: one of the two was changed",
        ),
    ],
)
def test_patterns_that_are_none(pruned: Path, pattern: Any, text: str) -> None:
    edit(pruned / "adapter_config.json", rank_pattern=pattern)
    with pytest.raises(CheckpointError, match=text):
        load_adapter(tiny_llama(), pruned)
