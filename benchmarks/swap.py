# SPDX-License-Identifier: Apache-2.0
"""How long a change of adapters takes, for the adapters of Llama-3-8B (r=16 on every linear), and what it recompiles.

The base is on the meta device; adapters and files are real, the files warm. All variants take turns; medians. The
yardsticks are `safetensors.load_file` and one copy of all tensors into memory that is there. Exits with 1 when a limit
is missed (not with `--tiny`, whose times say nothing).

    python benchmarks/swap.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from variants import SHAPES, arguments, environment

from lightning_lora import LoRAConfig, apply_lora, load_adapter, save_adapter, set_adapter, use_adapter
from lightning_lora.errors import Notice
from lightning_lora.model.slots import adapter_modules

LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
HOT_LIMIT, SWAP_LIMIT = 1.5, 0.25
WEIGHTS = "adapter_model.safetensors"


def on_meta(shape: dict, dtype: str) -> nn.Module:
    """A Llama without values, with adapters that have some."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
    apply_lora(model, LoRAConfig(r=16, adapter_dtype=dtype))  # type: ignore[arg-type]
    for _, module in adapter_modules(model):
        module.adapter.to_empty(device="cpu")  # type: ignore[operator, union-attr]
        module.adapter.reset_parameters()  # type: ignore[operator, union-attr]
    return model


def timed(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of each variant [ms], all of them once a round."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(rounds + 2):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant()
            if index >= 2:  # two rounds to warm up
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in taken.items()}


def swaps(shape: dict, dtype: str, rounds: int, scratch: Path) -> tuple[float, dict[str, float]]:
    """Size of the adapter [MB], and the medians of yardsticks and of ours."""
    model = on_meta(shape, dtype)
    folders = [scratch / f"{dtype}-{name}" for name in "xy"]
    for folder in folders:
        for _, module in adapter_modules(model):
            torch.nn.init.normal_(module.lora_B, std=0.02)  # type: ignore[arg-type]
        size = save_adapter(model, folder).nbytes / 1e6
    source = load_file(folders[0] / WEIGHTS)
    source = {name: tensor.clone() for name, tensor in source.items()}
    target = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    load_adapter(model, folders[0], name="other")
    turn = [0]

    def next_folder() -> Path:
        turn[0] += 1
        return folders[turn[0] % 2]

    def read() -> None:
        load_file(next_folder() / WEIGHTS)

    def read_and_copy() -> None:
        for name, tensor in load_file(next_folder() / WEIGHTS).items():
            target[name].copy_(tensor)

    def copy() -> None:
        for name, tensor in source.items():
            target[name].copy_(tensor)

    def first() -> None:
        folder = next_folder()
        os.utime(folder / WEIGHTS)  # as a file that was never read
        load_adapter(model, folder)

    def borrow() -> None:
        with use_adapter(model, "other"):
            pass

    names = ["other", "default"]

    def swap() -> None:
        names.reverse()
        set_adapter(model, names[1])

    taken = timed(
        {
            "`load_file`": read,
            "`load_file` and copy": read_and_copy,
            "copy": copy,
            "`load_adapter`, a file seen before": lambda: load_adapter(model, next_folder()),
            "`load_adapter`, a new file: digests checked": first,
            "`set_adapter`": swap,
            "`use_adapter`, in and out": borrow,
        },
        rounds,
    )
    return size, taken


def recompilations(count: int, folder: Path) -> tuple[int, int]:
    """How many times a model was changed under `torch.compile`, and how many graphs were compiled in all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPES["tiny"])).eval()

    for index, name in enumerate("abc"):
        model = fresh()
        apply_lora(model, LoRAConfig(r=8, lora_alpha=8 + index))
        for _, module in adapter_modules(model):
            torch.nn.init.normal_(module.lora_B, std=0.1)  # type: ignore[arg-type]
        save_adapter(model, folder / name)
    model = fresh()
    for name in "ab":
        load_adapter(model, folder / name, name=name)
    compiled = torch.compile(model, fullgraph=True)
    ids = torch.arange(32).view(2, 16)
    counters.clear()
    outputs, errors = [], []
    with torch.no_grad():
        for index in range(count):
            if index % 3 == 2:
                load_adapter(model, folder / "abc"[index % 2 + 1], name="b")
            set_adapter(model, "ab"[index % 2])
            outputs.append(compiled(ids, use_cache=False).logits)
            errors.append(float((outputs[-1] - model(ids, use_cache=False).logits).abs().max()))
    if max(errors) > 1e-4 or torch.allclose(outputs[0], outputs[1], atol=1e-3):
        raise SystemExit(f"compiled outputs are not those of the adapter in use: {errors}")
    return count, counters["stats"]["unique_graphs"]


def options(parser: argparse.ArgumentParser) -> None:
    """This script's arguments."""
    parser.add_argument("--rounds", type=int, default=25, help="how many times each is timed")


if __name__ == "__main__":
    args = arguments(__doc__ or "", options)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", Notice)  # a base without values has no fingerprint
    print(environment())
    shape = SHAPES["tiny"] if args.tiny else LLAMA_3_8B
    missed = []
    with tempfile.TemporaryDirectory(prefix="lora-swap-") as scratch:
        for dtype in ("bf16", "fp32"):
            size, taken = swaps(shape, dtype, args.rounds, Path(scratch))
            print(f"\n| {dtype}, {size:.1f} MB | median ms | against its yardstick | limit |\n|---|---|---|---|")
            for name, value in taken.items():
                limit, yardstick = None, 0.0
                if name.startswith("`load_adapter`"):
                    limit, yardstick = HOT_LIMIT, taken["`load_file` and copy"]
                elif "_adapter`" in name:
                    limit, yardstick = SWAP_LIMIT, taken["copy"]
                limit = None if "in and out" in name else limit
                ratio = f"{value / yardstick:.2f}" if yardstick else ""
                if limit is not None and value > limit * yardstick:
                    missed.append(f"{dtype}: {name} {ratio} > {limit}")
                print(f"| {name} | {value:.2f} | {ratio} | {limit or ''} |")
        changes, graphs = recompilations(12, Path(scratch) / "compiled")
    print(f"\ntorch.compile(fullgraph=True): {changes} changes of adapter, {graphs} graph compiled in all")
    if missed and not args.tiny:
        raise SystemExit("\n".join(["limits missed:", *missed]))
