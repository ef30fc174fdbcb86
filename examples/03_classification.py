# SPDX-License-Identifier: Apache-2.0
"""Who speaks, a president or Shakespeare? Adapters on an encoder, and a head that is trained in full.

    python examples/03_classification.py                             # a tiny random BERT: no network, seconds
    python examples/03_classification.py --base bert-base-uncased    # a real one, with its own tokenizer

The head is new, so it is named in `modules_to_save`: it is trained in full and lies in checkpoints and folders beside
the adapters. (Left out, it would be found, since it is not in the pretrained weights.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the examples are not a package
from lightning_lora import LoRA, disable_adapters, save_adapter, validate_adapter
from small_base.corpus import shakespeare, speeches
from small_base.data import MODEL_DIR

TOKENS = 32  # of a passage


class Classifier(L.LightningModule):
    """An encoder with a head of two classes, and how it learns. Nothing in it knows of adapters."""

    def __init__(self, model: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model.train(), lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        ids, mask, labels = batch
        return self.model(input_ids=ids, attention_mask=mask, labels=labels).loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        ids, mask, labels = batch
        right = self.model(input_ids=ids, attention_mask=mask).logits.argmax(-1) == labels
        self.log("accuracy", right.float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def passages(tokenizer: Any, per_class: int) -> TensorDataset:
    """As many passages of each class, from the texts that lie beside the small base."""
    addresses = " ".join(speeches().values())
    plays = shakespeare("train")
    texts, labels = [], []
    for label, text in enumerate((addresses, plays)):
        words = text.split()
        step = max(len(words) // per_class, 1)
        texts += [" ".join(words[i * step : i * step + TOKENS]) for i in range(per_class)]
        labels += [label] * per_class
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    return TensorDataset(rows["input_ids"], rows["attention_mask"], torch.tensor(labels))


def build(base: str | None) -> tuple[Any, Any]:
    """The model with a new head, and its tokenizer."""
    if base is not None:
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), AutoTokenizer.from_pretrained(
            base
        )
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=TOKENS, num_labels=2, **sizes)
    return BertForSequenceClassification(config), tokenizer


def main() -> None:
    args = arguments()
    L.seed_everything(0, verbose=False)
    model, tokenizer = build(args.base)
    rows = passages(tokenizer, args.examples // 2)
    train, held_out = torch.utils.data.random_split(rows, [0.8, 0.2])

    module = Classifier(model, args.lr)
    lora = LoRA(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    trainer = L.Trainer(
        max_epochs=args.epochs,
        callbacks=[lora],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=16, shuffle=True))

    check = DataLoader(held_out, batch_size=64)
    (on,) = trainer.validate(module, check, verbose=False)
    with disable_adapters(module):  # the head as it was before training, too
        (off,) = trainer.validate(module, check, verbose=False)
    print(f"{lora.report.trainable_params:,} of {lora.report.logical_params:,} parameters trained")
    print(f"accuracy on held-out passages: {off['accuracy']:.2f} before, {on['accuracy']:.2f} after")

    save_adapter(module, args.out)
    print(validate_adapter(args.out, target="peft"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="folder or name of an encoder; a tiny random BERT without")
    parser.add_argument("--out", type=Path, default=Path("outputs/classification"), help="folder for the adapter")
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3, help="2e-4 and more for a real encoder")
    return parser.parse_args()


if __name__ == "__main__":
    main()
