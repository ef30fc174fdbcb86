# SPDX-License-Identifier: Apache-2.0
"""Plain networks with the corners that models have, and a way to hear notices."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import Notice


def notices(run: Callable[[], Any]) -> list[str]:
    """The texts of the notices that ``run`` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, Notice)]


def tiny_bert(labels: int = 3, vocab: int = 99) -> nn.Module:
    """A random one-layer BERT with a classifier, in evaluation, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Shared(nn.Module):
    """One block used at two places, and one linear under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = Block()
        self.enter = nn.Linear(16, 16)
        self.leave = self.enter

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.second(self.first(self.enter(x))))


class Normed(nn.Module):
    """Normalisation layers with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)
        self.batch = nn.BatchNorm1d(8)
        self.instance = nn.InstanceNorm1d(8, track_running_stats=True)
        self.leave = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: (batch, 8)."""
        x = self.batch(self.enter(x))
        return self.leave(self.instance(x.t().unsqueeze(0).expand(2, 8, -1))[0].t())
