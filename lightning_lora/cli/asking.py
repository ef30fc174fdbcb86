# SPDX-License-Identifier: Apache-2.0
"""How commands ask lm-eval's tasks: their options, the loaded tasks, and words for what was found."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from lightning_lora.cli.output import table

_SCORING = ("batch_tokens", "apply_chat_template", "system_instruction", "base_cache")


def add_task_arguments(parser: Any, required: bool = True) -> None:
    """Which tasks, how they are asked, and what counts as forgetting."""
    parser.add_argument("--tasks", nargs="+", required=required, help="lm-eval tasks, groups, presets or YAML files")
    parser.add_argument("--include_path", nargs="+", default=None, help="folders of task YAML files")
    parser.add_argument(
        "--num_fewshot", type=int, default=None, help="examples in each prompt; as each task says if null"
    )
    parser.add_argument("--limit", type=int, default=None, help="items to ask over all tasks; every item if null")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens in a batch, padding included")
    parser.add_argument("--apply_chat_template", action="store_true", help="ask through the tokenizer's chat template")
    parser.add_argument("--system_instruction", default=None, help="text before each prompt")
    parser.add_argument("--allow_code", nargs="+", default=[], help="names of tasks that may execute code")
    parser.add_argument("--base_cache", default=None, help="folder that keeps the base's answers for later")
    parser.add_argument("--seed", type=int, default=0, help="chooses the items of --limit")
    parser.add_argument("--tolerance", type=float, default=0.005, help="a drop of accuracy that is nobody's concern")


def scoring_options(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options of `Scorer` among a command's arguments, taken out of them."""
    return {name: arguments.pop(name) for name in _SCORING}


def load(tasks: list[str], arguments: dict[str, Any]) -> Any:
    """Tasks as a command's arguments say; None for none.

    Raises:
        TaskError: One cannot be loaded.
    """
    from lightning_lora.forgetting.tasks import load_tasks

    if not tasks:
        return {}
    return load_tasks(tasks, arguments["num_fewshot"], arguments["include_path"], arguments["allow_code"])


def report_table(report: Any, name: str = "adapter") -> str:
    """Every task against the base, differences in points with their 95 % interval.

    Args:
        report: Of `Monitor`.
        name: What stands beside the base.
    """
    from lightning_lora.forgetting.tasks import POOLED

    found = {**report.tasks, **({POOLED: report.pooled} if len(report.tasks) > 1 else {})}
    found |= {f"{task} (target)": values for task, values in report.learning.items()}
    header = ("task", "items", "base [%]", f"{name} [%]", "difference [points], 95 %", "lost", "gained", "p")
    rows = [
        (
            task, f"{t.n_items:,}", f"{100 * t.acc_base:.1f}", f"{100 * t.acc:.1f}", interval(t.delta, t.delta_se),
            str(t.flips_lost), str(t.flips_gained), f"{report.p_holm.get(task, t.p_value):.2g}",
        )
        for task, t in found.items()
    ]  # fmt: skip
    return table(header, rows)


def interval(delta: float, error: float) -> str:
    """A difference and its 95 % interval in points, as ``-1.2 [-2.3, -0.1]``."""
    half = NormalDist().inv_cdf(0.975) * error
    return f"{100 * delta:+.1f} [{100 * (delta - half):+.1f}, {100 * (delta + half):+.1f}]"
