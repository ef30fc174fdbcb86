# SPDX-License-Identifier: Apache-2.0
"""Where the small base lies, and how to load it: model, tokenizer, tasks, target text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from small_base import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent
MODEL_DIR = ROOT / "model"
TASKS_DIR = ROOT / "tasks"
TASK_NAMES = ("speech_continuation", "word_order", "function_words")
TASKS = [TASKS_DIR / f"{name}.yaml" for name in TASK_NAMES]


def load_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the small base from its folder, without a network.

    Args:
        dtype: dtype of the weights; they are stored in bfloat16.

    Returns:
        A `LlamaForCausalLM`.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=dtype, local_files_only=True)
    return model


def load_tokenizer() -> PreTrainedTokenizerBase:
    """Load the byte-level BPE tokenizer of the small base, without a network.

    Returns:
        The tokenizer; it adds no special token by itself.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    return tokenizer


def blocks(ids: list[int], block_size: int) -> torch.Tensor:
    """Cut a stream of token ids into rows; the rest is left out.

    Args:
        ids: token ids.
        block_size: tokens a row.

    Returns:
        Token ids, (rows, block_size), int64.
    """
    rows = len(ids) // block_size
    return torch.tensor(ids[: rows * block_size], dtype=torch.long).view(rows, block_size)


def shakespeare_blocks(tokenizer: Any, block_size: int, split: str) -> torch.Tensor:
    """Cut the target text into rows of token ids.

    Args:
        tokenizer: the tokenizer of the small base.
        block_size: tokens a row.
        split: `train` or `validation`.

    Returns:
        Token ids, (rows, block_size), int64.
    """
    return blocks(tokenizer(corpus.shakespeare(split), verbose=False)["input_ids"], block_size)
