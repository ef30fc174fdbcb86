# SPDX-License-Identifier: Apache-2.0
"""The table of `docs/concepts/memory.md`: what `plan` says for models of four sizes, beside what guides say.

python docs/tools/memory_table.py
"""

from __future__ import annotations

import argparse

from transformers import LlamaConfig

from lightning_lora import plan
from lightning_lora.planning.estimate import METHODS

#: hidden, intermediate, layers, heads, key-value heads, of the Llama 2 and Code Llama family; 32,000 tokens.
SHAPES = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "34B": (8192, 22016, 48, 64, 8),
    "70B": (8192, 28672, 80, 64, 8),
}
#: What practitioners' guides give for full tuning, LoRA and QLoRA at rank 16 [GB].
GUIDES = {
    "7B": ("98", "15 to 18", "8 to 10"),
    "13B": ("180", "32", "16"),
    "34B": ("470", "80", "40"),
    "70B": ("960 to 1,400", "160", "40 to 80"),
}
HEAD = "| model | [GB] | full | LoRA | QLoRA |\n|---|---|---:|---:|---:|"


def rows(size: str) -> str:
    """The three rows of a size: guides, plan, plan without gradient checkpointing."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=32_000,
    )
    lines = [_row(f"**{size}**", "guides", GUIDES[size])]
    for kept, label in ((True, "`plan`"), (False, "without checkpointing")):
        methods = plan(config, batch_size=1, sequence_length=2048, gradient_checkpointing=kept).methods
        lines.append(_row("", label, [f"{methods[name].memory.total / 1e9:,.1f}" for name in METHODS]))
    return "\n".join(lines)


def _row(model: str, label: str, cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join([model, label, *cells]) + " |"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    print("\n".join([HEAD, *map(rows, SHAPES)]))
