# SPDX-License-Identifier: Apache-2.0
"""Depth of adapters: from the first block to the last, in models with one list of blocks, several and none."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.depth import adapter_depths
from tests.helpers import LM, TinyNet, tiny_llama


def test_a_llama_counts_its_layers_wherever_it_sits() -> None:
    model = LM(tiny_llama(num_hidden_layers=5))
    apply_lora(model, LoRAConfig(target_modules="all-linear"))
    depths = adapter_depths(model)
    assert len(depths) == 5 * 7
    for name, depth in depths.items():
        assert depth == int(name.split(".layers.")[1].split(".")[0]) / 4


def test_an_adapted_head_is_deepest_and_an_input_layer_is_not() -> None:
    model = nn.ModuleDict(
        {
            "inlet": nn.Linear(4, 4),
            "blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)),
            "outlet": nn.Linear(4, 4),
        }
    )
    apply_lora(model, LoRAConfig(target_modules=["inlet", "0", "outlet"]))
    assert adapter_depths(model) == {
        "inlet": 0.0, "blocks.0.0": 0.0, "blocks.1.0": 0.5, "blocks.2.0": 1.0, "outlet": 1.0,
    }  # fmt: skip


def test_without_a_list_of_blocks_the_adapters_are_counted() -> None:
    model = TinyNet()
    apply_lora(model, LoRAConfig(target_modules=["first", "second"]))
    assert adapter_depths(model) == {"first": 0.0, "second": 1.0}
    one = nn.Sequential(nn.Linear(4, 4))
    apply_lora(one, LoRAConfig(target_modules=["0"]))
    assert adapter_depths(one) == {"0": 0.0}
    assert torch.equal(one(torch.ones(1, 4)), one[0].base_layer(torch.ones(1, 4)))
