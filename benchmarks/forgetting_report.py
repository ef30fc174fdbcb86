# SPDX-License-Identifier: Apache-2.0
"""What came of `benchmarks/forgetting.py`: a table, a plot, and the checks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lora.forgetting.statistics import paired_difference
from lightning_lora.reporting import plot_learning

#: The plain LoRA that the others are compared with, and those that have to forget less.
PLAIN, REMEDIES = "lora", ("rollback", "scale")
Z95 = 1.645  # one-sided


def report(out: Path, labels: dict[str, str], seeds: Sequence[int], tolerance: float) -> int:
    """Print the table, draw the plot, and say whether the checks hold.

    Args:
        out: the folder of the runs.
        labels: what is shown for each method.
        seeds: of the runs.
        tolerance: the drop that is nobody's concern [share of items].

    Returns:
        0 where every check holds, else 1.
    """
    base = read(out, "base")
    runs = {key: {s: r for s in seeds if (r := read(out, f"{key}-{s}"))} for key in labels}
    print(table(base, labels, runs))
    points = {
        labels[key]: [(run["loss"], -100 * drop(base, run)[0]) for run in of.values()] for key, of in runs.items() if of
    }
    curve = next((run["curve"] for run in runs.get("sweep", {}).values()), None)
    curves = {"scales of one adapter (even half)": curve} if curve else {}
    figure, _ = plot_learning(points, curves, base=base["loss"], learned_label="loss on Shakespeare [nats/token]")
    figure.savefig(out / "learning_and_forgetting.png", dpi=120)
    held = [check for seed in seeds for check in checks(base, runs, seed, tolerance)]
    print("\n" + "\n".join(f"{'ok    ' if good else 'FAILED'}  {what}" for what, good in held))
    print(f"\nplot: {out / 'learning_and_forgetting.png'}")
    return 0 if all(good for _, good in held) else 1


def read(out: Path, name: str) -> Any:
    """A run's file; None where it was not made."""
    path = out / "runs" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def items(run: dict[str, Any], base: dict[str, Any]) -> list[float]:
    """Right or wrong, the tasks that both have in one order."""
    return [x for name in ("speech_continuation", "function_words") for x in run["held"][name] if name in base["held"]]


def drop(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """How much more of the held half the first answers right than the second, and its standard error."""
    delta, error = paired_difference(items(first, second), items(second, first))
    return delta, error


def table(base: dict[str, Any], labels: dict[str, str], runs: dict[str, dict[int, Any]]) -> str:
    """Means over seeds as Markdown; the spread is from the least to the most."""
    lines = ["| run | seeds | loss on Shakespeare | drop on the held half [points] |", "|---|---:|---:|---:|"]
    lines.append(f"| base | | {base['loss']:.2f} | 0 |")
    for key, of in runs.items():
        if not of:
            continue
        losses = [run["loss"] for run in of.values()]
        drops = [100 * drop(base, run)[0] for run in of.values()]
        lines.append(f"| {labels[key]} | {len(of)} | {spread(losses, 2)} | {spread(drops, 1)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the range where there is one."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def checks(
    base: dict[str, Any], runs: dict[str, dict[int, Any]], seed: int, tolerance: float
) -> list[tuple[str, bool]]:
    """What has to hold for one seed."""
    found = []
    plain = runs[PLAIN].get(seed)
    for key in REMEDIES:
        run = runs[key].get(seed)
        if run is None or plain is None:
            found.append((f"{key}, seed {seed}: the run is there", False))
            continue
        lost, error = drop(base, run)
        fired = any(look["alarms"] for look in run["looks"])
        z = (lost - tolerance) / error if error else math.copysign(math.inf, lost - tolerance)
        less, its_error = drop(run, plain)
        found += [
            (f"{key}, seed {seed}: the alarm fired, and {run['outcome']}", fired),
            (f"{key}, seed {seed}: drop {100 * lost:.1f} +- {100 * error:.1f} points, not significantly above "
             f"{100 * tolerance:g} (z {z:+.1f})", z < Z95),
            (f"{key}, seed {seed}: {100 * less:.1f} +- {100 * its_error:.1f} points less than plain LoRA",
             less > 2 * its_error),
            (f"{key}, seed {seed}: loss {run['loss']:.2f}, the base's {base['loss']:.2f}", run["loss"] < base["loss"]),
        ]  # fmt: skip
    return found
