# SPDX-License-Identifier: Apache-2.0
"""Presets: names that stand for several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TaskSpec = str | Path | Mapping[str, Any]

_SUITE = Path(__file__).parent / "suite"

#: Name -> tasks.
#:
#: - ``quick``: four of lm-eval's that a base model of any size does better than by chance, one prompt each.
#: - ``lora_learns_less``: the three by which "LoRA Learns Less and Forgets Less" (arXiv:2405.09673) measures it.
#: - ``smoke``: the project's own, 128 items in this package: does a run work at all, without a network?
PRESETS: dict[str, tuple[str, ...]] = {
    "quick": ("hellaswag", "arc_easy", "piqa", "winogrande"),
    "lora_learns_less": ("hellaswag", "arc_challenge", "winogrande"),
    "smoke": (str(_SUITE / "smoke_function_words.yaml"), str(_SUITE / "smoke_word_order.yaml")),
}


def expand(specs: Sequence[TaskSpec]) -> list[TaskSpec]:
    """Tasks, presets among them replaced by what they stand for, each task once.

    Args:
        specs: names of tasks and presets, paths and dicts.
    """
    found: list[TaskSpec] = []
    for spec in specs:
        preset = PRESETS.get(spec) if isinstance(spec, str) else None
        # Two presets may have a task in common; one that is named twice by hand is an error elsewhere.
        found += [spec] if preset is None else [task for task in preset if task not in found]
    return found
