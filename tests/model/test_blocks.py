# SPDX-License-Identifier: Apache-2.0
"""Sublayers of transformer blocks are found by their structure, in models of every build."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_lora.model.blocks import Sublayer, find_sublayers
from tests.helpers import TinyNet, tiny_gpt2, tiny_llama
from tests.model.nets import tiny_bert

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name: str) -> nn.Module:
    import transformers

    if name == "T5":
        config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
        return transformers.T5ForConditionalGeneration(config)
    extra: dict[str, Any] = {
        "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 3, "intermediate_size": 40},
        "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 32},
        "Qwen3": {"num_key_value_heads": 2, "intermediate_size": 40, "head_dim": 8},
        "Falcon": {},
    }[name]
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL, **extra))


def names(model: nn.Module) -> list[tuple[str, str, bool]]:
    return [(s.name, s.kind, s.whole) for s in find_sublayers(model)]


@pytest.mark.parametrize(
    ("model", "first", "second", "whole"),
    [
        (tiny_llama, "model.layers.0.self_attn", "model.layers.0.mlp", True),
        (tiny_gpt2, "transformer.h.0.attn", "transformer.h.0.mlp", True),
        (lambda: build("Mixtral"), "model.layers.0.self_attn", "model.layers.0.mlp", True),
        (lambda: build("Qwen3"), "model.layers.0.self_attn", "model.layers.0.mlp", True),
        (lambda: build("Falcon"), "transformer.h.0.self_attention", "transformer.h.0.mlp", True),
        (lambda: build("OPT"), "model.decoder.layers.0.self_attn", "model.decoder.layers.0.fc2", False),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2), "layers.0.self_attn",
         "layers.0.linear2", False),
    ],
)  # fmt: skip
def test_each_block_has_attention_and_feed_forward(model: Any, first: str, second: str, whole: bool) -> None:
    found = names(model())
    assert found[:2] == [(first, "attention", True), (second, "feed_forward", whole)]
    assert len(found) == 4


def test_norms_after_the_residual_and_three_sublayers_in_a_decoder() -> None:
    assert find_sublayers(tiny_bert()) == [
        Sublayer("bert.encoder.layer.0.attention.output.dense", "attention", 32, False),
        Sublayer("bert.encoder.layer.0.output.dense", "feed_forward", 32, False),
    ]
    assert names(build("T5")) == [
        ("encoder.block.0.layer.0.SelfAttention", "attention", True),
        ("encoder.block.0.layer.1.DenseReluDense", "feed_forward", True),
        ("decoder.block.0.layer.0.SelfAttention", "attention", True),
        ("decoder.block.0.layer.1.EncDecAttention", "attention", True),
        ("decoder.block.0.layer.2.DenseReluDense", "feed_forward", True),
    ]


def test_what_is_no_block_is_left_alone() -> None:
    assert find_sublayers(TinyNet()) == []
    assert find_sublayers(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))) == []
    import transformers

    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4))
    assert find_sublayers(bloom) == []  # its sublayers add the residual themselves
