# SPDX-License-Identifier: Apache-2.0
"""`Collate`: rows of examples as the tensors of a batch.

| key | shape | what |
|---|---|---|
| ``input_ids`` | (rows, tokens) | int64, padded at the end |
| ``labels`` | (rows, tokens) | the token where it is learned, -100 elsewhere |
| ``attention_mask`` | (rows, tokens) | 0 on padding; not in packed batches |
| ``position_ids`` | (rows, tokens) | in packed batches: each example, and the padding, counts from 0 |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lora.causal_lm.encoding import IGNORED, Encoded
from lightning_lora.causal_lm.packing import positions_of

Row = Sequence[Encoded]


@dataclass(frozen=True)
class Collate:
    """Makes a batch of rows, padded to the longest of them.

    Args:
        pad: The token that fills a row up; no loss and no other token sees it.
        packed: Whether rows hold several examples.
    """

    pad: int
    packed: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The batch."""
        ids = [torch.cat([part.ids for part in row]).long() for row in rows]
        labels = [torch.cat([part.labels for part in row]).long() for row in rows]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }
        width = batch["input_ids"].shape[1]
        if self.packed:
            lengths = [[len(part) for part in row] for row in rows]
            filled = [[*own, width - sum(own)] for own in lengths]
            batch["position_ids"] = torch.stack([positions_of(own) for own in filled])
        else:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor([len(row) for row in ids])[:, None]).long()
        return batch
