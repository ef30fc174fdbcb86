# SPDX-License-Identifier: Apache-2.0
"""Digests of tensors: what a file's values are compared with when they are read.

Neither torch's files nor safetensors' are checked for changed values when they are loaded, so a digest of every
tensor is written with it::

    s_k    = sum of the int64 words of block k, mod 2^64        blocks of 4 KiB
    digest = BLAKE2b( dtype, shape, s_0, s_1, ..., the bytes that fill no block )

One changed bit changes its block's sum; random damage goes unseen with probability 2^-64, words of one block that
change places always. It reads as fast as memory does, several times faster than a CRC. It is no protection against
somebody who wants to deceive.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lora.errors import CheckpointError

_BLOCK = 4096  # bytes


@torch.no_grad()
def tensor_digest(tensor: Tensor) -> str:
    """The digest of a tensor's dtype, shape and values, wherever it lies."""
    shape: Any = tuple(tensor.shape)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # expanded: never made larger
        shape = (*shape, tensor.stride())
        tensor = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // _BLOCK * _BLOCK
    return _hashed(tensor.dtype, shape, _sums(flat[:whole]).numpy().data, flat[whole:].numpy().data)


def _sums(blocks: Tensor) -> Tensor:
    """The sum of each block of some whole ones."""
    words = blocks.view(torch.int64)
    return words.view(len(words) // (_BLOCK // 8), _BLOCK // 8).sum(1)


def _hashed(dtype: torch.dtype, shape: Any, *parts: memoryview) -> str:
    digest = hashlib.blake2b(f"{dtype} {shape}".encode(), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


class Piece(NamedTuple):
    """A tensor among the bytes of many."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # its first byte

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@torch.no_grad()
def digests_in(data: Tensor, pieces: Iterable[Piece]) -> dict[str, str]:
    """`digests` of tensors that lie one behind the other: those of whole blocks are summed up in one call.

    Args:
        data: Bytes, on the CPU.
        pieces: The tensors in them.
    """
    found: dict[str, str] = {}
    runs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.begin):
        if piece.nbytes % _BLOCK or (data.storage_offset() + piece.begin) % 8:
            part = data[piece.begin : piece.begin + piece.nbytes].clone()  # aligned to whatever its dtype needs
            found[piece.name] = tensor_digest(part.view(piece.dtype).view(piece.shape))
        elif runs and piece.begin == runs[-1][-1].begin + runs[-1][-1].nbytes:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    for run in runs:
        found |= _run_digests(data, run)
    return found


def _run_digests(data: Tensor, run: list[Piece]) -> dict[str, str]:
    """Of tensors of whole blocks without a gap between them."""
    start = run[0].begin
    sums = _sums(data[start : run[-1].begin + run[-1].nbytes]).numpy()
    found, first = {}, 0
    for piece in run:
        last = first + piece.nbytes // _BLOCK
        found[piece.name] = _hashed(piece.dtype, piece.shape, sums[first:last].data)
        first = last
    return found


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The digest of each tensor by its name."""
    return {name: tensor_digest(tensor) for name, tensor in tensors}


def check_names(expected: Mapping[str, str], found: Mapping[str, Any], file: object, remedy: str) -> None:
    """See that the tensors of these names, and no others, were read.

    Args:
        expected: Digests by name.
        found: What was read, by name.
        file: Where from.
        remedy: What the text says to do.

    Raises:
        CheckpointError: One is missing, or one is too many.
    """
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())
        raise CheckpointError(
            f"{file} does not hold the tensors it was written with: {odd[0]!r} "
            f"{'is missing' if odd[0] in expected else 'was added'}, {len(odd)} differ in all. {remedy}"
        )


def check_digests(expected: Mapping[str, str], found: Mapping[str, str], file: object, remedy: str) -> None:
    """See that tensors are those that were written.

    Args:
        expected: Digests by name, as `digests` gave them.
        found: Those of what was read.
        file: Where from.
        remedy: What the text says to do.

    Raises:
        CheckpointError: One is missing, one is too many, or values differ.
    """
    check_names(expected, found, file, remedy)
    broken = [name for name, digest in found.items() if digest != expected[name]]
    if broken:
        raise CheckpointError(
            f"{file} is damaged: {len(broken)} of {len(found)} tensors, {broken[0]!r} first, do not hold the values "
            f"they were written with. {remedy}"
        )


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or inf."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            continue
        fast = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))  # finite sum: finite values
        if not (fast.isfinite() or tensor.isfinite().all()):
            return name
    return None


def check_finite(tensors: Mapping[str, Tensor], file: object) -> None:
    """See that no tensor holds NaN or inf.

    Raises:
        CheckpointError: One does.
    """
    name = first_not_finite(tensors)
    if name is not None:
        raise CheckpointError(
            f"{file}: {name!r} holds NaN or inf: the run had diverged when it was written. Take an earlier one, "
            "and train with a smaller learning rate or with gradient clipping"
        )
