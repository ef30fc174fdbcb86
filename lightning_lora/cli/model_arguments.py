# SPDX-License-Identifier: Apache-2.0
"""The arguments by which commands are told which models to load and how."""

from __future__ import annotations

from typing import Any

ADAPTER = "adapter folder (of this package, PEFT or LitGPT), or a run's checkpoint"


def add_model_arguments(parser: Any, adapter: str = ADAPTER) -> None:
    """Which models, and how they are loaded.

    Args:
        parser: The command's.
        adapter: What the adapter may be.
    """
    parser.add_argument("base", help="folder or name of the base model")
    parser.add_argument("adapter", help=adapter)
    parser.add_argument("--dtype", default="auto", help="of the base: auto (as stored), fp32, bf16 or fp16")
    parser.add_argument("--quantize", default=None, help="none, nf4, nf4-dq, fp4 or int8; as in the training if null")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
