# SPDX-License-Identifier: Apache-2.0
"""Tensors that are spread over processes: whole from pieces, and back.

FSDP 2 and tensor parallelism make `torch.distributed.tensor.DTensor`; ZeRO 3 leaves an empty parameter and knows
where its pieces are.

::

    whole(p)          every process of the mesh takes part and gets the full tensor
    piece(full, p)    this process's share of ``full``, spread as ``p`` is; nothing is sent

A plain tensor is its own whole and its own piece.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a `DTensor`, or a parameter that ZeRO 3 has spread and not gathered."""
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: no such tensor can exist
    return _is_zero(tensor) or (module is not None and isinstance(tensor, module.DTensor))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a collective when ``tensor`` is sharded."""
    if not is_sharded(tensor):
        return tensor
    if not _is_zero(tensor):
        return tensor.full_tensor()  # type: ignore[attr-defined]
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of the full tensor."""
    return tensor.ds_shape if _is_zero(tensor) else tensor.shape  # type: ignore[attr-defined]


def piece(full: Tensor, like: Tensor) -> Tensor:
    """``full`` placed as ``like`` is; every process must hold the same ``full``."""
    if not is_sharded(like) or is_sharded(full):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _is_zero(tensor: Tensor) -> bool:
    status = getattr(tensor, "ds_status", None)  # deepspeed's own word for it
    return status is not None and status.name != "AVAILABLE"
