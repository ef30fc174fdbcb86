# SPDX-License-Identifier: Apache-2.0
"""What came of `benchmarks/methods.py`: tables of learning, forgetting and costs, and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgetting_report import drop, spread

from lightning_lora.reporting import plot_learning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL = "loss on Shakespeare [nats/token]"


def report(out: Path, methods: dict[str, Any], seeds: Sequence[int]) -> int:
    """Print the tables and draw the plot of the methods that have runs.

    Args:
        out: The folder of the runs.
        methods: Of `methods.yaml`.
        seeds: Of the runs; the first one chose the rates.

    Returns:
        0 where every method has all its runs, else 1.
    """
    runs = out / "runs"
    base = _read(runs / "base.json")
    found = {name: of for name in methods if (of := _best(runs, name, seeds))}
    for title, part in (("equal data", None), ("equal arithmetic", "equal_flops")):
        print(f"\n{title}\n\n" + _table(base, runs, found, part))
    print("\ncosts of a step, LoRA = 1\n\n" + _costs(runs, list(found)))
    points = {
        f"{name}, {best_rate(runs, name, seeds[0]):g}": [(r["loss"], -100 * drop(base, r)[0]) for r in of.values()]
        for name, of in found.items()
    }
    figure, _ = plot_learning(points, base=base["loss"], learned_label=LABEL)
    figure.savefig(out / "methods.png", dpi=120)
    tried = {
        name: [(rate, r["loss"], -100 * drop(base, r)[0]) for rate, r in _tried(runs, name, seeds[0])] for name in found
    }
    _draw_rates(tried).savefig(out / "methods_rates.png", dpi=120)
    print(f"\nplots: {out / 'methods.png'}, {out / 'methods_rates.png'}")
    missing = [name for name in methods if len(found.get(name, {})) < len(seeds)]
    if missing:
        print(f"\nruns are missing: {', '.join(missing)}")
    return 1 if missing else 0


def _draw_rates(tried: dict[str, list[tuple[float, float, float]]]) -> Figure:
    """A panel a method: (rate, loss, points) from the lowest rate to the highest, before those of all others."""
    from matplotlib.figure import Figure

    columns = min(4, len(tried))
    rows = -(-len(tried) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    every = [point for points in tried.values() for point in points]
    for panel, (name, points) in zip(panels.flat, tried.items(), strict=False):
        panel.plot([loss for _, loss, _ in every], [y for _, _, y in every], "o", color="0.85", markersize=3)
        panel.plot([loss for _, loss, _ in points], [y for _, _, y in points], "o-", color="tab:blue", markersize=4)
        for (rate, loss, y), below in ((points[0], False), (points[-1], True)):  # those between follow in order
            place = {"xytext": (4, -10 if below else 4), "textcoords": "offset points"}
            panel.annotate(f"{rate:g}", (loss, y), fontsize=7, **place)
        panel.margins(0.15)
        panel.set_title(name, fontsize=9)
    for panel in panels.flat[len(tried) :]:
        panel.set_axis_off()
    panels.flat[0].invert_xaxis()  # shared by all
    figure.supxlabel(f"{LABEL}, falling to the right", fontsize=9)
    figure.supylabel("accuracy on general tasks vs base [points]", fontsize=9)
    return figure


def best_rate(runs: Path, name: str, seed: int) -> float:
    """The learning rate with the lowest loss on held-out text."""
    return min(_tried(runs, name, seed), key=lambda pair: pair[1]["loss"])[0]


def _tried(runs: Path, name: str, seed: int) -> list[tuple[float, dict[str, Any]]]:
    """Learning rates and their runs of one seed."""
    found = []
    for path in runs.glob(f"{name}_lr*_seed{seed}.json"):
        rate = path.stem.removeprefix(f"{name}_lr").removesuffix(f"_seed{seed}")
        found.append((float(rate), _read(path)))
    return sorted(found, key=lambda pair: pair[0])


def _best(runs: Path, name: str, seeds: Sequence[int]) -> dict[int, dict[str, Any]]:
    if not _tried(runs, name, seeds[0]):
        return {}
    rate = best_rate(runs, name, seeds[0])
    paths = {seed: runs / f"{name}_lr{rate:g}_seed{seed}.json" for seed in seeds}
    return {seed: _read(path) for seed, path in paths.items() if path.exists()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _table(base: dict[str, Any], runs: Path, found: dict[str, dict[int, Any]], part: str | None) -> str:
    lines = [
        "| method | learning rate | steps | loss on Shakespeare | forgotten [points] |",
        "|---|---:|---:|---:|---:|",
        f"| base | | 0 | {base['loss']:.2f} | 0 |",
    ]
    for name, of in found.items():
        looks = [run if part is None else run[part] for run in of.values()]
        steps = next(iter(of.values()))["steps" if part is None else "early"]
        losses, drops = [x["loss"] for x in looks], [100 * drop(base, x)[0] for x in looks]
        rate = best_rate(runs, name, min(of))
        lines.append(f"| {name} | {rate:g} | {steps} | {spread(losses, 2)} | {spread(drops, 1)} |")
    return "\n".join(lines)


def _costs(runs: Path, names: list[str]) -> str:
    lines = [
        "| method | trainable | operations | time | saved for backward | gradients and moments |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        costs = _read(runs / f"costs-{name}.json")
        own, lora = costs[name], costs["lora"]
        ratios = [own[key] / lora[key] for key in ("flops", "seconds", "saved_bytes", "state_bytes")]
        lines.append(f"| {name} | {own['trainable']:,.0f} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)
