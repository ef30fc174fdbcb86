# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA's rank patterns: a folder holds the ranks that stayed and says which they are, a model has all.

::

    adapter_config.json    "rank_pattern": {"<name>.lora_E": [true, false, ...]}     one entry a rank, PEFT's form
    in the file            lora_A (kept, in)    lora_E (kept, 1)    lora_B (out, kept)
    in the model           lora_A (r, in)       lora_E (r, 1)       lora_B (out, r)

A rank was taken away where its value is exactly zero: its vectors do nothing. When a folder is read they begin anew, as
in a fresh model but drawn from the module's name: a folder always gives the same bits, and a run that starts from it
may take the rank up again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError
from lightning_lora.nn.adalora import START

_FACTORS = {"lora_A": 0, "lora_E": 0, "lora_B": 1}  # by the end of a key, the dimension of the ranks

#: By the key of a module up to its factors, which of its ranks stayed ``(r,)``.
Masks = dict[str, Tensor]


def pattern_masks(config: Mapping[str, Any], prefix: str, where: str) -> Masks:
    """What a parsed ``adapter_config.json`` says.

    Args:
        config: The file.
        prefix: Before every key of a folder.
        where: What to call the file in the message.

    Raises:
        CheckpointError: The pattern is none.
    """
    pattern = config.get("rank_pattern") or {}
    masks: Masks = {}
    for name, mask in pattern.items() if isinstance(pattern, Mapping) else [("", None)]:
        right = isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask)
        if not right or not name.endswith(".lora_E"):
            raise CheckpointError(
                f"{where}: `rank_pattern` must be a table of lists of true and false by names that end in "
                f"'.lora_E', got {name!r}: {mask!r}. Save the adapter again"
            )
        masks[prefix + name.removesuffix(".lora_E")] = torch.tensor(mask, dtype=torch.bool)
    return masks


def kept_ranks(tensors: Mapping[str, Tensor]) -> Masks:
    """What the values of a whole model say; empty where no rank was taken away, or none has learned anything yet."""
    masks = {key.removesuffix(".lora_E"): t.view(-1) != 0 for key, t in tensors.items() if key.endswith(".lora_E")}
    learned = any(bool(mask.any()) for mask in masks.values())
    return {} if not learned or all(bool(mask.all()) for mask in masks.values()) else masks


def pattern_of(masks: Masks, prefix: str) -> dict[str, list[bool]] | None:
    """`pattern_masks` the other way."""
    return {f"{key.removeprefix(prefix)}.lora_E": mask.tolist() for key, mask in masks.items()} or None


def shrunk(key: str, tensor: Tensor, masks: Masks) -> Tensor:
    """A tensor of a folder from that of a model, without the ranks that masks leave out."""
    mask, dim = _mask_of(key, masks)
    return tensor if mask is None else tensor[(slice(None),) * dim + (mask,)].contiguous()


def grown(key: str, tensor: Tensor, masks: Masks) -> Tensor:
    """A tensor of a model from that of a folder, its start where a rank was taken away."""
    mask, dim = _mask_of(key, masks)
    if mask is None or mask.all():
        return tensor
    whole = torch.zeros(grown_shape(key, tuple(tensor.shape), masks))
    if not key.endswith(".lora_E"):
        whole.normal_(std=START, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    whole = whole.to(tensor.dtype)
    whole[(slice(None),) * dim + (mask,)] = tensor
    return whole


def grown_shape(key: str, shape: tuple[int, ...], masks: Masks) -> tuple[int, ...]:
    """The shape of `grown`.

    Raises:
        CheckpointError: The tensor has not as many ranks as the pattern leaves.
    """
    mask, dim = _mask_of(key, masks)
    if mask is None:
        return shape
    if len(shape) != 2 or shape[dim] != int(mask.sum()):
        raise CheckpointError(
            f"{key!r} has the shape {shape}, and `rank_pattern` leaves it {int(mask.sum())} ranks: one of the two was "
            "changed. Save the adapter again"
        )
    return (*shape[:dim], len(mask), *shape[dim + 1 :])


def _mask_of(key: str, masks: Masks) -> tuple[Tensor | None, int]:
    module, _, factor = key.rpartition(".")
    return (masks.get(module), _FACTORS[factor]) if factor in _FACTORS else (None, 0)
