# SPDX-License-Identifier: Apache-2.0
"""Adapters that differ in everything that may differ, and what each computes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, save_adapter
from tests.helpers import random_adapters

IDS = torch.arange(48).view(3, 16) % 64

#: Adapters that differ in everything that may differ: rank, scale, modules, patterns.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "twin": {"r": 4, "lora_alpha": 8},
    "scaled": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "wide": {"r": 9, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]},
    "head": {"r": 2, "target_modules": ["lm_head", "v_proj"]},
    "patterns": {"r": 3, "rank_pattern": {"up_proj": 5}, "alpha_pattern": {"0.*k_proj": 7}},
}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    out = model(ids)
    return getattr(out, "logits", out)


def adapter_folder(path: Path, build: Callable[[], nn.Module], seed: int, **config: Any) -> Tensor:
    """A folder of one adapter on its own, and what the model computes with it."""
    model = build().eval()
    apply_lora(model, LoRAConfig(**config))
    save_adapter(random_adapters(model, seed=seed), path)
    return logits(model)
