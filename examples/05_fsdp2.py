# SPDX-License-Identifier: Apache-2.0
"""FSDP 2 in two processes on a CPU: a 4-bit base that no process holds whole, adapters, a resume, a merge.

    python examples/05_fsdp2.py                  # two processes over gloo; Lightning starts the second
    torchrun --nproc-per-node 8 examples/05_fsdp2.py --accelerator cuda --base FOLDER

Nothing is written in `configure_model`: the strategy shares the model out by the names of its blocks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the examples are not a package
from demo.shakespeare import Shakespeare, ShakespeareData
from lightning_lora import AdapterCheckpoint, AdapterModelParallelStrategy, LoRA, MergeOnFitEnd
from small_base.data import MODEL_DIR


class Rows(ShakespeareData):
    """Over a plain loader, whose place in the data is kept for each process: the resume is exact."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_rows, batch_size=self.batch_size, shuffle=True)


class Held(L.Callback):
    """Says what each process holds of the model."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        mine, whole = 0, 0
        for tensor in [*pl_module.parameters(), *pl_module.buffers()]:
            local: Any = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            mine += local.numel() * local.element_size()
            whole += tensor.numel() * tensor.element_size()
        sizes: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(sizes, mine)
        if trainer.is_global_zero:
            shares = ", ".join(f"{size / 1e6:.2f} MB" for size in sizes)
            print(f"{trainer.world_size} processes hold {shares} of {whole / 1e6:.2f} MB", flush=True)


def trainer(args: argparse.Namespace, steps: int, *more: L.Callback) -> L.Trainer:
    backend = "gloo" if args.accelerator == "cpu" else "nccl"
    return L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=AdapterModelParallelStrategy(fsdp_plan="auto", process_group_backend=backend),
        max_steps=steps,
        callbacks=[
            LoRA(r=16, lora_alpha=32, quantize="nf4"),
            AdapterCheckpoint(dirpath=args.out / "adapters", every_n_train_steps=args.steps, save_top_k=-1),
            *more,
        ],
        limit_val_batches=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    args = arguments()
    L.seed_everything(0, verbose=False)
    data = Rows(args.base, block_size=args.block_size, batch_size=4, val_rows=8)

    first = trainer(args, args.steps, Held())
    first.fit(Shakespeare(args.base), data)
    checkpoint = first.checkpoint_callback.best_model_path
    if first.is_global_zero:
        held = torch.load(checkpoint, weights_only=True)["state_dict"]
        size = Path(checkpoint).stat().st_size
        print(f"{checkpoint}: {size / 1e6:.2f} MB, {len(held)} tensors, all of adapters", flush=True)

    second = trainer(args, 2 * args.steps, MergeOnFitEnd(args.out / "merged"))
    second.fit(Shakespeare(args.base), data, ckpt_path=checkpoint)  # in one process or ten, under any strategy
    if second.is_global_zero:
        print(
            f"gone on from step {args.steps} to {second.global_step}; {args.out / 'merged'} is a plain model",
            flush=True,
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default=str(MODEL_DIR), help="folder of a causal model; the built-in small base")
    parser.add_argument("--out", type=Path, default=Path("outputs/fsdp2"), help="folder for adapters and merged model")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps before the cut, and after it")
    parser.add_argument("--block_size", type=int, default=64, help="tokens a row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
