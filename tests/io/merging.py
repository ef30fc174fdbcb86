# SPDX-License-Identifier: Apache-2.0
"""What tests of merges from folder to folder share: a base folder, an adapter over it, and the merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lora.config import LoRAConfig
from lightning_lora.io.adapter import save_adapter
from lightning_lora.io.merge_disk import merge_to_disk
from lightning_lora.model.apply import apply_lora
from tests.helpers import random_adapters, tiny_llama

IDS = torch.arange(32).view(2, 16) % 61


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return (out.logits if hasattr(out, "logits") else out).float()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def tied_llama(seed: int = 0) -> nn.Module:
    return tiny_llama(seed, tie_word_embeddings=True)


def trained(tmp_path: Path, make: Any = tiny_llama, dtype: torch.dtype = torch.float32, **config: Any) -> nn.Module:
    """A base folder in small shards, an adapted model over it, and its adapter folder."""
    make().to(dtype).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base" / "tokenizer.json").write_text('{"a": 1}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    apply_lora(model, LoRAConfig(**{"r": 4, "lora_alpha": 6, **config}))
    save_adapter(random_adapters(model, std=0.1), tmp_path / "adapter")
    return model


def merge(tmp_path: Path, out: str = "merged", **arguments: Any) -> Any:
    return merge_to_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / out, **arguments)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
