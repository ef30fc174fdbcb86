# SPDX-License-Identifier: Apache-2.0
"""Packing: several examples in one row, none of which sees another.

::

    ids         a a a b b c c c c     three examples in a row of nine tokens
    positions   0 1 2 0 1 0 1 2 3     each counts from 0: by that a model of transformers keeps them apart
    labels      - a a - b - c c c     the first token of each is never learned: another one's stands before it

Whether a model does keep them apart is not a matter of its name: `check_packing` asks the model itself.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.rng import preserve_rng

_PROBE = 12  # tokens of each example that the model is asked about

# Of the logits' spread, fp32 and 16 bit. Another example before it: the shapes are the same, so rounding is too, but
# for experts that are given other groups of tokens.
_SEEN = {torch.float32: 1e-4, torch.float64: 1e-4}, 1e-2
# None before it: other shapes.
_MOVED = {torch.float32: 1e-3, torch.float64: 1e-3}, 5e-2


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which examples go into which row: the longest first, each into the fullest row that still takes it.

    Args:
        lengths: Tokens of each example.
        size: Tokens that a row may have.

    Returns:
        Rows of indices into `lengths`; every index once.

    Raises:
        ValueError: An example is longer than a row.
    """
    if lengths and max(lengths) > size:
        raise ValueError(f"an example of {max(lengths)} tokens does not fit a row of {size}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([index])
            bisect.insort(room, (size - lengths[index], len(rows) - 1))
        else:
            left, row = room.pop(place)
            rows[row].append(index)
            bisect.insort(room, (left - lengths[index], row))
    return rows


def positions_of(lengths: Sequence[int]) -> Tensor:
    """Position ids of a packed row: each example counts from 0, (tokens,), int64."""
    return torch.cat([torch.arange(length) for length in lengths])


def check_packing(model: nn.Module, rows: int = 1) -> None:
    """See that an example gives the same logits in a packed row whatever stands before it, and alone.

    Three forwards of short rows, without gradients; neither the model nor any random state is changed.

    Args:
        model: A causal model of transformers.
        rows: Of a batch: some attention kernels keep examples apart in a batch of one row only.

    Raises:
        UnsupportedError: It lets packed examples see one another, or counts their positions on.
    """
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    device = next(model.parameters()).device
    example, before, other = _probe(vocabulary, rows, device)
    positions = positions_of([_PROBE, _PROBE]).to(device).expand(rows, -1)
    was_training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), preserve_rng():
            model.eval()
            alone = _logits(model, example, positions[:, :_PROBE])
            packed, again = (
                _logits(model, torch.cat([first, example], dim=1), positions)[:, _PROBE:] for first in (before, other)
            )
    finally:
        for module, training in was_training.items():
            module.training = training
    for what, logits, (limits, coarse) in (("another one stands", again, _SEEN), ("one stands", alone, _MOVED)):
        spread = alone.float().std().clamp_min(1e-9)
        difference = float((packed.float() - logits.float()).abs().max() / spread)
        if not difference <= limits.get(alone.dtype, coarse):
            raise UnsupportedError(
                f"{type(model).__name__} does not keep packed examples apart: the logits of an example change by "
                f"{difference:.2g} of their spread when {what} before it, in a batch of {rows}. Use `packing=False`"
            )


def _probe(vocabulary: int, rows: int, device: torch.device) -> Sequence[Tensor]:
    """Three examples of tokens that are no special ones in most vocabularies, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    low = min(16, vocabulary // 2)
    return list(torch.randint(low, vocabulary, (3, rows, _PROBE), generator=generator).to(device))


def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    try:
        out: Any = model(input_ids=ids, position_ids=positions, use_cache=False)
    except TypeError as error:  # takes no positions
        raise UnsupportedError(f"{type(model).__name__} cannot be packed ({error}): use `packing=False`") from error
    logits: Tensor = out.logits
    return logits
