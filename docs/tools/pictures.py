# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of the concept pages.

python docs/tools/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Polygon, Rectangle

from lightning_lora.config import scaling
from lightning_lora.nn.quantized import BLOCK, NF4, PackedWeight

HERE = Path(__file__).resolve().parents[1] / "concepts"
FROZEN, TRAINED, LINE = "#c9cfe8", "#7e57c2", "#333333"


def main() -> None:
    """Write them all."""
    for name, draw in (("lora", lora), ("nf4", nf4), ("scaling", scales)):
        draw().savefig(HERE / f"{name}.png", dpi=130, facecolor="white")
        plt.close("all")


def lora() -> plt.Figure:
    """The adapted linear: W beside the narrow way over A and B."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    axes.set(xlim=(0, 10), ylim=(0, 6))
    axes.axis("off")
    axes.add_patch(Rectangle((1.2, 1.6), 2.6, 2.8, facecolor=FROZEN, edgecolor=LINE))
    axes.text(2.5, 3.0, "W\nout x in\nfrozen", ha="center", va="center")
    axes.add_patch(Polygon([(5.2, 1.6), (8.2, 1.6), (7.1, 2.9), (6.3, 2.9)], facecolor=TRAINED, edgecolor=LINE))
    axes.add_patch(Polygon([(6.3, 3.1), (7.1, 3.1), (8.2, 4.4), (5.2, 4.4)], facecolor=TRAINED, edgecolor=LINE))
    axes.text(6.7, 2.1, "A   r x in", ha="center", va="center", color="white")
    axes.text(6.7, 3.9, "B   out x r", ha="center", va="center", color="white")
    axes.text(8.45, 3.75, "zero at the start", va="center", fontsize=9)
    axes.text(7.3, 3.0, "r numbers a token", va="center", fontsize=9)
    axes.text(6.85, 4.72, "times s", va="center", fontsize=9)
    for start, end in (
        ((4.6, 0.6), (2.5, 1.6)),
        ((4.6, 0.6), (6.7, 1.6)),
        ((2.5, 4.4), (4.6, 5.4)),
        ((6.7, 4.4), (4.6, 5.4)),
    ):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=LINE))
    axes.text(4.6, 0.3, "x", ha="center", va="center", fontsize=13)
    axes.text(4.6, 5.65, "y = W x + s B A x", ha="center", va="center", fontsize=12)
    return figure


def nf4() -> plt.Figure:
    """Where the 16 levels lie, and what a weight becomes."""
    figure, (levels, error) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    blocks = w.view(-1, BLOCK)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten().numpy()
    levels.hist(scaled, bins=120, density=True, color=FROZEN)
    for level in NF4:
        levels.axvline(level, color=TRAINED, linewidth=1)
    levels.set(title="normal weights, by their block's largest", xlabel="w / absmax: bars are nf4's levels", yticks=[])
    kinds = ("int8", "nf4", "nf4-dq", "fp4")
    packed = {kind: PackedWeight(w, kind) for kind in kinds}
    errors = [float((p.dequantize(torch.float32) - w).norm() / w.norm()) for p in packed.values()]
    bars = error.bar(kinds, [100 * e for e in errors], color=[FROZEN, TRAINED, TRAINED, FROZEN])
    error.bar_label(
        bars,
        [f"{100 * e:.1f} %\n{8 * p.nbytes / w.numel():.2f} bit" for e, p in zip(errors, packed.values(), strict=True)],
    )
    error.set(title="what packing takes away", ylabel="relative error [%]", ylim=(0, 140 * max(errors)))
    return figure


def scales() -> plt.Figure:
    """The two rules over the rank, at a fixed alpha."""
    figure, axes = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
    ranks = [2**i for i in range(9)]
    _curve(axes, ranks, [scaling(r, 32.0, False) for r in ranks], "lora_alpha / r", TRAINED)
    _curve(axes, ranks, [scaling(r, 32.0, True) for r in ranks], "use_rslora: lora_alpha / sqrt(r)", LINE)
    axes.axhline(2.0, color="grey", linestyle=":", linewidth=1)
    axes.text(1, 2.15, "lora_alpha = 2 r", fontsize=9, color="grey")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_yticks([1 / 8, 1 / 2, 2, 8, 32], ["1/8", "1/2", "2", "8", "32"])
    axes.set(title="the scale s at lora_alpha = 32", xlabel="r", ylabel="s", xticks=ranks, xticklabels=ranks)
    axes.legend(frameon=False)
    return figure


def _curve(axes: Axes, x: list[int], y: list[float], label: str, color: str) -> None:
    axes.plot(x, y, "o-", label=label, color=color, markersize=4)


if __name__ == "__main__":
    main()
