# SPDX-License-Identifier: Apache-2.0
"""A plain LightningModule, no transformers: what a callback adds, what is saved, what is loaded again.

    python examples/01_minimal.py

A small network has learned a wave. Its adapters learn another one; switched off, they leave the first as it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRA, disable_adapters, load_adapter, save_adapter


class Wave(L.LightningModule):
    """A network from numbers to numbers. Nothing in it knows of adapters."""

    def __init__(self, weights: Path | None = None, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )
        if weights is not None:
            self.load_state_dict(torch.load(weights, weights_only=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def wave(frequency: float) -> tuple[Tensor, Tensor]:
    """Points on a sine. Shapes: (512, 1) each."""
    x = torch.linspace(-1, 1, 512)[:, None]
    return x, torch.sin(frequency * x)


def trainer(steps: int, *callbacks: L.Callback) -> L.Trainer:
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(frequency: float) -> DataLoader:
    return DataLoader(TensorDataset(*wave(frequency)), batch_size=64, shuffle=True)


@torch.no_grad()
def error(module: Wave, frequency: float) -> float:
    """Root of the mean squared error on a wave."""
    x, y = wave(frequency)
    return float((module(x) - y).square().mean().sqrt())


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    L.seed_everything(0, verbose=False)

    # What you have: a trained model, and its weights in a file.
    base = Wave()
    trainer(2 * args.steps).fit(base, loader(3.0))
    torch.save(base.state_dict(), args.out / "base.pt")

    # What is new: one callback.
    module = Wave(args.out / "base.pt", lr=1e-2)
    lora = LoRA(r=4, lora_alpha=8)
    trainer(args.steps, lora).fit(module, loader(5.0))
    save_adapter(module, args.out / "adapter")

    print(f"{lora.report.trainable_params:,} of {lora.report.logical_params:,} parameters trained")
    print("error on            first wave  second wave")
    print(f"adapters on         {error(module, 3.0):10.3f}  {error(module, 5.0):11.3f}")
    with disable_adapters(module):
        print(f"adapters off        {error(module, 3.0):10.3f}  {error(module, 5.0):11.3f}")

    again = Wave(args.out / "base.pt")
    load_adapter(again, args.out / "adapter")
    print(f"loaded from folder  {error(again, 3.0):10.3f}  {error(again, 5.0):11.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/minimal"), help="folder for weights and adapter")
    parser.add_argument("--steps", type=int, default=400, help="optimizer steps of the adapters")
    return parser.parse_args()


if __name__ == "__main__":
    main()
