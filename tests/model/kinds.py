# SPDX-License-Identifier: Apache-2.0
"""One small model for every kind of target that is no linear layer, with a configuration that adapts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_lora.config import LoRAConfig
from lightning_lora.model.apply import apply_lora
from tests.helpers import random_adapters, tiny_llama

IDS = torch.tensor([[1, 5, 60, 61, 7, 33], [62, 60, 2, 0, 9, 60]])


class Convolved(nn.Module):
    """Embedding, one- and two-dimensional convolutions, a linear head: (batch, length) ids -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.along = nn.Conv1d(16, 16, 3, padding=1)
        self.across = nn.Conv2d(1, 4, (3, 2), padding="same", bias=False)
        self.narrow = nn.Conv2d(4, 1, 1)
        self.out = nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.along(x.mT).mT.tanh()
        x = x + self.narrow(self.across(x.unsqueeze(1)).tanh()).squeeze(1)
        return self.out(x)


class Attending(nn.Module):
    """torch's encoder: (batch, length) ids -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(16, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(ids)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The same values each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make()


def tiny_mixtral() -> nn.Module:
    """A mixture of three experts, two of them chosen."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return seeded(lambda: MixtralForCausalLM(config))


class Case(NamedTuple):
    """A model and what is adapted in it."""

    make: Callable[[], nn.Module]
    config: dict[str, Any]


def _llama(tied: bool = False) -> Callable[[], nn.Module]:
    return lambda: tiny_llama(num_hidden_layers=1, tie_word_embeddings=tied)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, Case] = {
    "embedding": Case(_llama(), {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": Case(_llama(True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "convolutions": Case(
        lambda: seeded(Convolved),
        {"target_modules": ["along", "across", "narrow", "out"], "rank_pattern": {"narrow": 2}},
    ),
    "attention": Case(lambda: seeded(Attending), {"target_modules": ["self_attn", "linear1"]}),
    "experts": Case(tiny_mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts alone": Case(tiny_mixtral, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "tokens": Case(_llama(), {"target_modules": ["q_proj"], "trainable_token_indices": [60, 62]}),
    "tied tokens": Case(_llama(True), {"target_modules": ["q_proj"], "trainable_token_indices": [60, 62]}),
    "tokens of both ends": Case(
        _llama(), {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [60, 62], "lm_head": [60]}}
    ),
}


#: Each case; those that another one covers nearly are left to the slow suite.
PARAMS = [
    pytest.param(case, marks=[pytest.mark.slow] if case in ("embedding", "experts alone", "tokens") else [])
    for case in CASES
]


def adapted(case: str, zero: bool = False, **config: Any) -> nn.Module:
    """A converted model of a case in evaluation, with random updates unless ``zero``."""
    model = CASES[case].make().eval()
    apply_lora(model, LoRAConfig(**{"r": 4, "lora_alpha": 6, **CASES[case].config, **config}))
    return model if zero else random_adapters(model, std=0.2)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """What a model gives, whatever it calls its input."""
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits
