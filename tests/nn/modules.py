# SPDX-License-Identifier: Apache-2.0
"""One adapted module of each kind that is no linear layer, with inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.nn.attention import LoRAMultiheadAttention
from lightning_lora.nn.conv import LoRAConv
from lightning_lora.nn.embedding import LoRAEmbedding
from lightning_lora.nn.experts import LoRAExperts
from lightning_lora.nn.lowrank import LowRankModule
from lightning_lora.nn.parts import AdaptedParts
from lightning_lora.nn.tokens import TrainedTokens

IDS = torch.tensor([[0, 5, 9, 5], [2, 10, 9, 0]])


class Kind(NamedTuple):
    """How a kind is made and called.

    Args:
        base: Makes the user's module.
        build: (base, record, r, alpha) -> the adapter module.
        inputs: Its positional arguments.
        merges: Whether its update is one of the base's own parameters.
    """

    base: Callable[[], nn.Module]
    build: Callable[[nn.Module, AdapterRecord, int, float], AdaptedParts]
    inputs: Callable[[], tuple[Any, ...]]
    merges: bool = True


def experts() -> nn.Module:
    """A mixture's experts with random weights."""
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=3, num_experts_per_tok=2)
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def _routed() -> tuple[Any, ...]:
    return torch.randn(7, 16), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1], [1, 0], [2, 1], [0, 2]]), torch.rand(7, 2)


def _tokens(base: nn.Module, record: AdapterRecord, r: int, lora_alpha: float) -> TrainedTokens:
    return TrainedTokens(base, record, [9, 2])


def _experts(base: nn.Module, record: AdapterRecord, r: int, lora_alpha: float) -> LoRAExperts:
    return LoRAExperts(base, record, r, lora_alpha, ("gate_up_proj", "down_proj"))


KINDS: dict[str, Kind] = {
    "embedding": Kind(lambda: nn.Embedding(11, 6, padding_idx=2), LoRAEmbedding, lambda: (IDS,)),
    "scaled embedding": Kind(
        lambda: Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5), LoRAEmbedding, lambda: (IDS,)
    ),
    "conv1d": Kind(lambda: nn.Conv1d(6, 8, 3, 2, 1, dilation=2), LoRAConv, lambda: (torch.randn(2, 6, 9),)),
    "conv2d": Kind(
        lambda: nn.Conv2d(6, 8, (3, 2), padding="same", bias=False), LoRAConv, lambda: (torch.randn(2, 6, 5, 4),)
    ),
    "conv2d of 1x1": Kind(lambda: nn.Conv2d(6, 8, 1), LoRAConv, lambda: (torch.randn(6, 5, 4),)),
    "conv3d": Kind(lambda: nn.Conv3d(2, 4, 2), LoRAConv, lambda: (torch.randn(2, 2, 3, 4, 5),)),
    "conv of groups": Kind(lambda: nn.Conv1d(6, 8, 3, groups=2), LoRAConv, lambda: (torch.randn(2, 6, 9),), False),
    "attention": Kind(
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        LoRAMultiheadAttention,
        lambda: (torch.randn(2, 5, 8),) * 3,
    ),
    "experts": Kind(experts, _experts, _routed),
    "tokens": Kind(lambda: nn.Embedding(11, 6), _tokens, lambda: (IDS,)),
    "tokens of a head": Kind(lambda: nn.Linear(6, 11), _tokens, lambda: (torch.randn(2, 4, 6),)),
}
LOW_RANK = [name for name in KINDS if not name.startswith("tokens")]


def make(name: str, zero: bool = False, r: int = 4, **config: Any) -> AdaptedParts:
    """A module of a kind, with a random update unless ``zero``."""
    kind = KINDS[name]
    record = AdapterRecord(LoRAConfig(r=4, lora_alpha=6.0, **config))
    module = kind.build(kind.base().requires_grad_(False), record, r, 6.0)
    for parameter in () if zero else module.adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def output(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    """The first thing that it gives."""
    y = module(*inputs)
    return y[0] if isinstance(y, tuple) else y


def low_rank(name: str, **config: Any) -> LowRankModule:
    """`make` for a kind with factors."""
    module = make(name, **config)
    assert isinstance(module, LowRankModule)
    return module
