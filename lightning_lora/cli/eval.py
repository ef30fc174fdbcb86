# SPDX-License-Identifier: Apache-2.0
"""Compare an adapter with its base on lm-eval tasks, item by item, without training.

The same statistics as at the end of a run of `ForgettingMonitor`: differences are paired, and forgetting is said
only of what lies below the base by more than the tolerance at the error probability alpha, over all tasks together.
"""

from __future__ import annotations

import json as json_lib
from pathlib import Path
from typing import Any

from lightning_lora.cli import asking, output
from lightning_lora.cli.model_arguments import add_model_arguments

#: What the page of help begins with.
USAGE = "BASE ADAPTER --tasks TASK ... [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    add_model_arguments(
        parser, "adapter folder (of this package, PEFT or LitGPT), a run's checkpoint, or a whole model"
    )
    asking.add_task_arguments(parser)
    parser.add_argument("--target_tasks", nargs="+", default=[], help="tasks of what was learned: shown, never alarmed")
    parser.add_argument("--alpha", type=float, default=0.05, help="error probability of an alarm")
    parser.add_argument("--items", default=None, help="file for every item's answers (JSON lines)")
    parser.add_argument("--fail_on_forgetting", action="store_true", help="exit with 1 when something is forgotten")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(
    base: str,
    adapter: str,
    tasks: list[str],
    target_tasks: list[str],
    limit: int | None,
    items: str | None,
    fail_on_forgetting: bool,
    quiet: bool,
    json: bool,
    **arguments: Any,
) -> bool:
    """Print the comparison; whether it is to be failed for what is forgotten."""
    with output.work(json or quiet):
        report = compare(base, adapter, tasks, target_tasks, limit, items, quiet or json, **arguments)
    tolerance, alpha = arguments["tolerance"], arguments["alpha"]
    said = verdict(report, tolerance, alpha)
    values = {
        "base": base,
        "adapter": adapter,
        "held": not report.alarms,
        "verdict": said,
        "tolerance": tolerance,
        "alpha": alpha,
        **report.to_dict(),
    }
    output.show(f"{asking.report_table(report)}\n\n{said}", values, json)
    return fail_on_forgetting and bool(report.alarms)


def compare(
    base: str,
    adapter: str,
    tasks: list[str],
    target_tasks: list[str],
    limit: int | None,
    items: str | None,
    quiet: bool,
    **arguments: Any,
) -> Any:
    """The `Report` of a comparison.

    Raises:
        ConfigError: A value out of range.
        TaskError: A task cannot be loaded.
        CheckpointError, AdapterMismatchError, BaseMismatchError: Base and adapter cannot be read, or do not fit.
    """
    from lightning_lora.bars import no_bar, terminal_bar
    from lightning_lora.cli.models import read_models
    from lightning_lora.forgetting.arguments import check_counts
    from lightning_lora.forgetting.monitor import Monitor
    from lightning_lora.io.atomic import atomic_write
    from lightning_lora.reporting.items import item_rows

    check_counts(none_too=True, limit=limit)
    check_counts(none_too=True, least=0, num_fewshot=arguments["num_fewshot"])
    bar = no_bar if quiet else terminal_bar
    rows: list[dict[str, Any]] = []
    loaded = asking.load(tasks, arguments)
    monitor = Monitor(
        loaded,
        seed=arguments.pop("seed"),
        tolerance=arguments.pop("tolerance"),
        alpha=arguments.pop("alpha"),
        targets=asking.load(target_tasks, arguments),
        recorders=[lambda report, model, before: rows.extend(item_rows(report, model, before))],
    )
    options = asking.scoring_options(arguments)
    models = read_models(base, adapter, **{k: arguments[k] for k in ("dtype", "quantize", "device")}, bar=bar)
    report = monitor.verdict(models.scorer(bar=bar, **options), step=0, items=limit)
    if items is not None:
        kept = ({k: v for k, v in row.items() if k not in ("step", "kind")} for row in rows)
        with atomic_write(Path(items).expanduser()) as part:
            part.write_text("".join(f"{json_lib.dumps(output.finite(row))}\n" for row in kept))
    return report


def verdict(report: Any, tolerance: float, alpha: float) -> str:
    """What a comparison says, in words.

    Args:
        report: Of the whole comparison.
        tolerance: A drop that is nobody's concern [share of items].
        alpha: Error probability.
    """
    from lightning_lora.forgetting.power import detectable_drop

    pooled = report.pooled
    if report.alarms:
        found = {**report.tasks, "pooled": pooled}
        names = ", ".join(
            f"{'all tasks together' if n == 'pooled' else n} {asking.interval(found[n].delta, found[n].delta_se)}"
            for n in report.alarms
        )
        return (
            f"Forgetting: below the base by more than {100 * tolerance:g} points, at an error probability of "
            f"{alpha:g}: {names}."
        )
    spread = max(pooled.delta_se, 1.0 / pooled.n_items) * pooled.n_items**0.5
    seen = detectable_drop(spread, pooled.n_items, alpha=alpha, tolerance=tolerance)
    return (
        f"Held: no drop of more than {100 * tolerance:g} points is found at an error probability of {alpha:g}. Over "
        f"all {pooled.n_items:,} items a drop of {100 * seen:.1f} points would have been found in four cases of five."
    )
