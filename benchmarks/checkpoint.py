# SPDX-License-Identifier: Apache-2.0
"""Time to write and to read an adapter-only checkpoint, against `torch.save` with a sync and `torch.load`.

    python benchmarks/checkpoint.py [--layers 32] [--rounds 7] [--folder DIR]

The shape is that of Llama 3 8B (the base on the meta device), adapters of rank 16 on all linears in fp32, with Adam's
state: 168 MB and 503 MB. Ours goes through the code that the strategies use: digests, the atomic write, the checks
on reading and the copy into the model. Both sides take turns on the same disk; medians are compared.
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
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, apply_lora
from lightning_lora.errors import Notice
from lightning_lora.io.checkpoint import KEY, load_state, metadata
from lightning_lora.io.checkpoint_file import unmapped
from lightning_lora.strategies.checkpoint_io import AtomicCheckpointIO

#: (out, in) of the linears of one layer.
SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
WRITE_LIMIT, READ_LIMIT = 1.3, 0.5


def build(layers: int) -> nn.Module:
    """The linears of the model without values, with adapters that have some."""
    model = nn.Module()
    with torch.device("meta"):
        model.layers = nn.ModuleList(_layer() for _ in range(layers))
    apply_lora(model, LoRAConfig(r=16, target_modules="all-linear"))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.randn(parameter.shape) * 0.02))
    return model


def _layer() -> nn.Module:
    layer = nn.Module()
    for name, (rows, columns) in SHAPES.items():
        layer.register_module(name.partition(".")[2], nn.Linear(columns, rows, bias=False))
    return layer


def checkpoint_of(model: nn.Module) -> dict[str, Any]:
    """What the strategy hands to the writer, Adam's state included."""
    state = adapter_state_dict(model)
    adam = {
        i: {"step": torch.tensor(1000.0), "exp_avg": torch.randn_like(t), "exp_avg_sq": torch.rand_like(t)}
        for i, t in enumerate(state.values())
    }
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "params": list(adam)}
    return {
        "epoch": 0, "global_step": 1000, "pytorch-lightning_version": "2.6.0", "state_dict": state, "loops": {},
        "callbacks": {}, "lr_schedulers": [], "optimizer_states": [{"state": adam, "param_groups": [group]}],
        KEY: metadata(model),
    }  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def synced_save(checkpoint: dict[str, Any], path: Path) -> None:
    torch.save(checkpoint, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def copied(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, tensor in adapter_state_dict(model).items():
        tensor.copy_(state[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk is part of the result")
    args = parser.parse_args()
    warnings.simplefilter("ignore", Notice)  # a base on the meta device has no fingerprint
    model, io = build(args.layers), AtomicCheckpointIO()
    checkpoint = checkpoint_of(model)
    adapters = sum(t.nbytes for t in checkpoint["state_dict"].values())
    took: dict[str, list[float]] = {
        name: [] for name in ("save", "ours", "load", "read", "verified", "load+copy", "read+load", "all")
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        plain, own = Path(folder, "plain.ckpt"), Path(folder, "own.ckpt")

        def read_into_model() -> None:
            found, pending = io.open_checkpoint(own)
            pending.check("state_dict")
            load_state(model, found, file=own)

        def read_and_unmap() -> None:
            found, pending = io.open_checkpoint(own)
            pending.check("state_dict")
            load_state(model, found, file=own)
            pending.check("optimizer_states")
            unmapped(found, "optimizer_states", torch.device("cpu"))

        for round_ in range(args.rounds + 1):
            times = {
                "save": seconds(lambda: synced_save(checkpoint, plain)),
                "ours": seconds(lambda: io.save_checkpoint(checkpoint, own)),
                "load": seconds(lambda: torch.load(own, weights_only=True)),
                "read": seconds(lambda: io.open_checkpoint(own)),
                "verified": seconds(lambda: io.load_checkpoint(own)),
                "load+copy": seconds(lambda: copied(model, torch.load(own, weights_only=True)["state_dict"])),
                "read+load": seconds(read_into_model),
                "all": seconds(read_and_unmap),
            }
            if round_:  # the first warms up
                for name, value in times.items():
                    took[name].append(value)
        size = own.stat().st_size
    print(f"adapters {adapters / 1e6:.0f} MB, file {size / 1e6:.0f} MB, {torch.get_num_threads()} threads, "
          f"medians of {args.rounds} rounds, taking turns\n")  # fmt: skip
    print("| | plain [s] | ours [s] | ours / plain | limit |\n|---|---|---|---|---|")
    rows = (
        ("write: `torch.save` + fsync; digests, atomic write", "save", "ours", WRITE_LIMIT),
        ("read: `torch.load`; mapped, tensors verified when they are used", "load", "read", READ_LIMIT),
        ("the same, every tensor verified at once", "load", "verified", None),
        ("read, adapters verified and put into the model", "load+copy", "read+load", None),
        ("the same, Adam's state verified and copied out of the file (on a CPU only)", "load+copy", "all", None),
    )
    failed = False
    for text, base, mine, limit in rows:
        before, after = statistics.median(took[base]), statistics.median(took[mine])
        failed |= limit is not None and after / before > limit
        print(f"| {text} | {before:.3f} | {after:.3f} | {after / before:.2f} | {'' if limit is None else limit} |")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
