# SPDX-License-Identifier: Apache-2.0
"""Step time of LoRA and QLoRA against the frozen model, full tuning and PEFT, in one process.

The variants take turns step by step, so that whatever else the machine does hits all alike; the figures
are medians over the rounds, the ratios medians of each round's own ratio. A step is forward, loss, backward
and AdamW; for "frozen" it is forward, loss and the gradient to the embedded input, the floor of any method
that trains adapters in every layer.

    python benchmarks/engine.py --dtype bf16 --rounds 30
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from variants import SHAPES, Variant, arguments, build, environment, gradient_norm, saved_base

NAMES = (
    "frozen,full,ours,ours-drop,ours-nf4,ours-nf4-drop,peft,peft-drop,peft-same,peft-same-drop,peft-nf4,peft-nf4-same"
)


def step(variant: Variant, optimizer: torch.optim.Optimizer | None, ids: torch.Tensor) -> float:
    """One step; the loss."""
    if optimizer is None:
        embedded = variant.model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = variant.model(inputs_embeds=embedded, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss)
    loss = variant.model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return float(loss)


def run(names: list[str], dtype: torch.dtype, rounds: int, batch: int, length: int, shape: str, clock: str) -> None:
    """Build all, take turns, print the table."""
    folder = saved_base(SHAPES[shape])
    variants = {name: build(name, folder, dtype) for name in names}
    optimizers = {name: torch.optim.AdamW(v.trained, lr=1e-4) if v.trained else None for name, v in variants.items()}
    ids = torch.randint(SHAPES[shape]["vocab_size"], (batch, length))
    now = time.perf_counter if clock == "wall" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in names}
    norms: dict[str, float] = {}
    for turn in range(rounds + 2):
        for name, variant in variants.items():
            begin = now()
            step(variant, optimizers[name], ids)
            if turn >= 2:
                times[name].append(now() - begin)
            if variant.trained:
                norms[name] = gradient_norm(variant)
            variant.model.zero_grad(set_to_none=True)
    report(times, norms)


def report(times: dict[str, list[float]], norms: dict[str, float]) -> None:
    """Medians, and each variant's ratio to the others that it is judged by."""
    references = [name for name in ("frozen", "full", "peft", "peft-same", "peft-nf4", "ours") if name in times]
    print("| variant | median s | " + " | ".join(f"/ {name}" for name in references) + " | gradient norm |")
    print("|---" * (len(references) + 3) + "|")
    for name, values in times.items():
        ratios = [statistics.median(a / b for a, b in zip(values, times[other], strict=True)) for other in references]
        cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {name} | {statistics.median(values):.3f} | {cells} | {norms.get(name, 0.0):.3g} |")


def options(parser: argparse.ArgumentParser) -> None:
    """This script's arguments."""
    parser.add_argument("--variants", default=NAMES, help="comma-separated names")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="the base's dtype")
    parser.add_argument("--rounds", type=int, default=20, help="counted turns of each variant")
    parser.add_argument("--batch", type=int, default=4, help="sequences a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, for a busy machine"
    )


if __name__ == "__main__":
    args = arguments(__doc__ or "", options)
    torch.set_num_threads(args.threads)
    print(environment("peft", "bitsandbytes"))
    run(
        args.variants.split(","),
        torch.bfloat16 if args.dtype == "bf16" else torch.float32,
        2 if args.tiny else args.rounds,
        args.batch,
        args.length,
        "tiny" if args.tiny else "34m",
        args.clock,
    )
