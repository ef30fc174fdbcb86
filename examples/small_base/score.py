# SPDX-License-Identifier: Apache-2.0
"""Score a causal language model on the general benchmark of the small base, with lm-eval.

python examples/small_base/score.py            # the small base itself
python examples/small_base/score.py FOLDER     # another folder, say a merged model
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_base import data


def task_configs(tasks_dir: Path = data.TASKS_DIR) -> list[dict[str, Any]]:
    """Read the tasks, the paths of their data made absolute.

    Args:
        tasks_dir: folder of `<task>.yaml` and `<task>.jsonl`.

    Returns:
        One lm-eval configuration a task.
    """
    configs = []
    for name in data.TASK_NAMES:
        config = yaml.safe_load((tasks_dir / f"{name}.yaml").read_text(encoding="utf-8"))
        files = config["dataset_kwargs"]["data_files"].items()
        config["dataset_kwargs"]["data_files"] = {split: str(tasks_dir / file) for split, file in files}
        configs.append(config)
    return configs


def evaluate(
    model: Any,
    tokenizer: Any,
    samples: dict[str, list[int]] | None = None,
    tasks_dir: Path = data.TASKS_DIR,
) -> dict[str, list[float]]:
    """Evaluate a model with lm-eval's own `simple_evaluate` and `HFLM`.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        samples: items to take, by task; all of them when left out.
        tasks_dir: folder of the tasks.

    Returns:
        Right (1.0) or wrong (0.0) for each item, by task.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    answer = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64),
        tasks=task_configs(tasks_dir),
        task_manager=TaskManager(include_defaults=False),
        samples=samples,
        bootstrap_iters=0,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )
    if answer is None:
        raise RuntimeError("lm-eval gave no result: it does so on every rank but the first")
    ordered = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in answer["samples"].items()}
    return {name: [float(row["acc"]) for row in rows] for name, rows in ordered.items()}


def main() -> None:
    """Print the accuracy on each task, with its standard error."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description="Score a model on the general benchmark of the small base.")
    parser.add_argument("folder", nargs="?", type=Path, default=data.MODEL_DIR)
    folder = parser.parse_args().folder
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, right in evaluate(model, AutoTokenizer.from_pretrained(folder)).items():
        accuracy = sum(right) / len(right)
        error = (accuracy * (1 - accuracy) / (len(right) - 1)) ** 0.5
        print(f"{name:20s} {len(right):5d} items  accuracy {accuracy:.3f} +- {error:.3f}  (chance 0.250)")


if __name__ == "__main__":
    main()
