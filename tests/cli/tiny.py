# SPDX-License-Identifier: Apache-2.0
"""A LightningModule and a DataModule small enough to run a real LightningCLI in a second."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class TinyBase(L.LightningModule):
    """Two linears that learn a linear map; no optimizer of its own (the CLI gives one).

    Args:
        width: Features in and out.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


class Tiny(TinyBase):
    """The same with an optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TinyData(L.LightningDataModule):
    """Random rows and what a fixed linear map makes of them."""

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 8, generator=generator)
        self.rows = TensorDataset(x, x @ torch.randn(8, 8, generator=generator))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=8)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=32)
