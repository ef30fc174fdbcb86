# SPDX-License-Identifier: Apache-2.0
"""Tensors that are spread over processes (`torch.distributed.tensor.DTensor`): whole from pieces, and back.

::

    whole(p)          every process of the mesh takes part and gets the full tensor
    piece(full, p)    this process's share of ``full``, spread as ``p`` is; nothing is sent

A plain tensor is its own whole and its own piece.
"""

from __future__ import annotations

import sys

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: no such tensor can exist
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a collective when ``tensor`` is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def piece(full: Tensor, like: Tensor) -> Tensor:
    """``full`` placed as ``like`` is; every process must hold the same ``full``."""
    if not is_sharded(like) or is_sharded(full):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]
