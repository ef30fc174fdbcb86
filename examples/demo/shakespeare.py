# SPDX-License-Identifier: Apache-2.0
"""What a user has already: an ordinary LightningModule and an ordinary DataModule.

Nothing here knows of adapters, quantization or forgetting, and nothing here has to.
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples are not a package
from small_base.data import MODEL_DIR, shakespeare_blocks


class Shakespeare(L.LightningModule):
    """A causal language model and how it learns.

    Args:
        base: Folder or name of the pretrained model.
        lr: Learning rate of AdamW.
    """

    def __init__(self, base: str = str(MODEL_DIR), lr: float = 2e-3) -> None:
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("val_loss", loss, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class ShakespeareData(L.LightningDataModule):
    """Shakespeare's text, cut into rows of tokens.

    Args:
        base: Folder or name of the tokenizer.
        block_size: Tokens a row.
        batch_size: Rows a batch.
        val_rows: Rows of held-out text that a validation looks at.
    """

    def __init__(
        self, base: str = str(MODEL_DIR), block_size: int = 128, batch_size: int = 8, val_rows: int = 64
    ) -> None:
        super().__init__()
        self.base, self.block_size, self.batch_size, self.val_rows = base, block_size, batch_size, val_rows

    def setup(self, stage: str) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.train_rows = shakespeare_blocks(tokenizer, self.block_size, "train")
        self.held_out = shakespeare_blocks(tokenizer, self.block_size, "validation")[: self.val_rows]

    def train_dataloader(self) -> StatefulDataLoader:
        """A loader that knows its place in the epoch, so that a run that was cut resumes exactly."""
        return StatefulDataLoader(self.train_rows, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> StatefulDataLoader:
        return StatefulDataLoader(self.held_out, batch_size=self.batch_size)
