# SPDX-License-Identifier: Apache-2.0
"""Which way do the stripes run? Adapters on a vision transformer, its base in 8 bit, a merged model.

python examples/06_vision.py                                          # a tiny random ViT: no network, seconds
python examples/06_vision.py --base google/vit-base-patch16-224-in21k   # a real one
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from lightning_lora import LoRA, MergeOnFitEnd

CLASSES = 3  # upright, level, chequered


class Classifier(L.LightningModule):
    """A vision transformer with a new head, and how it learns. Nothing in it knows of adapters."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model.train(), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        pixels, labels = batch
        return self.model(pixel_values=pixels, labels=labels).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pixels, labels = batch
        self.log("accuracy", (self.model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def stripes(count: int, size: int, seed: int) -> TensorDataset:
    """Noisy patterns of random period and place. Shapes: (count, 3, size, size), (count,)."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    period = torch.randint(4, 9, (count, 1, 1), generator=draw) * size / 32
    shift = torch.rand(count, 1, 1, generator=draw) * 7
    along = ((torch.arange(size)[None, None, :] + shift) / period * 6.283).sin().sign().expand(-1, size, -1)
    across = along.transpose(1, 2)
    kinds = torch.stack([along, across, along * across])
    images = kinds[labels, torch.arange(count)]
    noise = torch.randn(count, 3, size, size, generator=draw)
    return TensorDataset(images[:, None].expand(-1, 3, -1, -1) + 0.5 * noise, labels)


def build(base: str | None) -> Any:
    if base is not None:
        return AutoModelForImageClassification.from_pretrained(base, num_labels=CLASSES)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=CLASSES, **sizes))


def main() -> None:
    args = arguments()
    L.seed_everything(0, verbose=False)
    model = build(args.base)
    size = model.config.image_size
    check = DataLoader(stripes(90, size, seed=1), batch_size=30)

    module = Classifier(model, args.lr)
    lora = LoRA(r=8, lora_alpha=16, quantize="int8")  # the head is new: found, trained in full, and named in a notice
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[lora, MergeOnFitEnd(args.out)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    (before,) = trainer.validate(module, check, verbose=False)
    trainer.fit(module, DataLoader(stripes(args.images, size, seed=0), batch_size=16, shuffle=True), check)

    report = lora.report
    print(f"base {report.base_bytes / 1e6:.2f} MB -> {report.packed_bytes / 1e6:.2f} MB")
    print(f"accuracy: {before['accuracy']:.2f} before, {float(trainer.callback_metrics['accuracy']):.2f} after")
    merged = AutoModelForImageClassification.from_pretrained(args.out)  # nothing of this package needed
    pixels, labels = next(iter(check))
    with torch.no_grad():
        right = merged(pixel_values=pixels).logits.argmax(-1) == labels
    print(f"merged model, loaded from {args.out}: {float(right.float().mean()):.2f} of a batch")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or name of a vision transformer; a tiny random one without")
    parser.add_argument("--out", type=Path, default=Path("outputs/vision"), help="folder for the merged model")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=4e-3, help="2e-4 and more for a real base")
    return parser.parse_args()


if __name__ == "__main__":
    main()
