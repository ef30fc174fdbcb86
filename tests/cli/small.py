# SPDX-License-Identifier: Apache-2.0
"""What commands are given in tests: an adapter over the built-in base, and its tasks cut short."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from lightning_lora.config import LoRAConfig
from lightning_lora.io.adapter import save_adapter
from lightning_lora.model.apply import apply_lora
from small_base.data import MODEL_DIR
from tests.helpers import random_adapters
from tests.test_readme import write_tasks

BASE = str(MODEL_DIR)


def write_adapter(path: Path, std: float = 0.02, dtype: str = "float32", **config: Any) -> str:
    """A folder of random adapters over the built-in base, far from it with a large ``std``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype)
        apply_lora(model, LoRAConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **config}))
        save_adapter(random_adapters(model, std=std), path)
    return str(path)


def tasks(folder: Path) -> list[str]:
    """Two tasks of eight items."""
    write_tasks(folder)
    return [str(folder / "word_order.yaml"), str(folder / "function_words.yaml")]
