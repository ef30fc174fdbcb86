# SPDX-License-Identifier: Apache-2.0
"""What packing loses of a trained base: plain, and with the starts of PiSSA, OLoRA and LoftQ beside the packed part.

Of each linear W the error is ``E = W - (q(W_res) + s B0 A0)``, with plain packing ``E = W - q(W)``. Printed is by how
much a start makes it smaller, ``1 - |E| / |E plain|`` in percent: in the nuclear norm (the sum of the singular values,
as PiSSA's table has it) and in Frobenius' (as LoftQ's), by the kind of layer, means over the layers of that kind.

    python benchmarks/starts.py [--quantize nf4] [--ranks 4 8 16 32] [--folder MODEL]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # the examples are not a package
from lightning_lora import LoRAConfig
from lightning_lora.model.targets import find_targets
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.nn.starts import start_of
from small_base.data import MODEL_DIR

STARTS = {"PiSSA": ("pissa", 1), "OLoRA": ("olora", 1), "LoftQ, 1 round": ("loftq", 1), "LoftQ, 5": ("loftq", 5)}


def errors(weight: Tensor, r: int, packed: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
    """By start, by how many percent the nuclear and the Frobenius norm of the error are below plain packing's."""
    plain = sizes(weight - packed(weight))
    found = {}
    for name, (init, iterations) in STARTS.items():
        start = start_of(init, weight, r, 1.0, packed=packed, iterations=iterations)
        own = sizes(weight - packed(start.residual) - start.B @ start.A)
        found[name] = (100 * (1 - own[0] / plain[0]), 100 * (1 - own[1] / plain[1]))
    return found


def sizes(error: Tensor) -> tuple[float, float]:
    """Nuclear and Frobenius norm."""
    values = torch.linalg.svdvals(error.double())
    return float(values.sum()), float(values.square().sum().sqrt())


def table(model: nn.Module, ranks: list[int], quantize: str) -> list[str]:
    """The table's lines."""

    def packed(matrix: Tensor) -> Tensor:
        return PackedWeight(matrix, quantize).dequantize(matrix.dtype)

    names = find_targets(model, LoRAConfig()).adapted
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    lines = [f"| layers | r | {' | '.join(STARTS)} |", f"|---|---|{'---|' * len(STARTS)}"]
    for r in ranks:
        for kind in kinds:
            weights = [model.get_submodule(n).weight.detach().float() for n in names if n.endswith(f".{kind}")]
            rows = [errors(weight, r, packed) for weight in weights if r < min(weight.shape)]
            if not rows:
                continue
            cells = []
            for name in STARTS:
                nuclear, frobenius = (sum(row[name][i] for row in rows) / len(rows) for i in (0, 1))
                cells.append(f"{nuclear:.1f} / {frobenius:.1f}")
            lines.append(f"| {kind} | {r} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantize", default="nf4", choices=["nf4", "nf4-dq", "fp4", "int8"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--folder", type=Path, default=MODEL_DIR, help="of a transformers model; the small base")
    args = parser.parse_args()
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    print(f"error of {args.quantize} made smaller by [%], nuclear / Frobenius norm")
    print("\n".join(table(model, args.ranks, args.quantize)))
