# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, mapped: its header read once, its tensors views of the mapping, its digests in one pass.

::

    uint64 n | n bytes of JSON: {name: {dtype, shape, data_offsets: [begin, end]}, ...} | data

safetensors judges whether the file is whole. Its `load_file` makes a storage of every tensor, which for the hundreds of
small ones of an adapter takes as long as to copy them; here one storage is cut up, and values are read when they are
used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.errors import CheckpointError
from lightning_lora.io.integrity import Piece, digests_in
from lightning_lora.io.tensor_files import DTYPES


class _Entry(NamedTuple):
    kind: str  # as the header calls the dtype
    shape: tuple[int, ...]
    begin: int  # in the data [bytes]


class MappedFile:
    """The tensors of a safetensors file.

    Args:
        path: The file.

    Raises:
        CheckpointError: It is no whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            safe_open(path, framework="pt")
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is no whole safetensors file, or may not be read: {error}. Take an earlier adapter"
            ) from error
        header.pop("__metadata__", None)
        self.entries = {
            name: _Entry(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0])
            for name, entry in header.items()
        }
        size = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        try:
            self._data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        except RuntimeError as error:  # it became shorter since
            raise CheckpointError(f"{path} changes while it is read: {error}".splitlines()[0]) from error
        self._typed: dict[str, Tensor] = {}  # the data once more, by dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor called `name`."""
        return self.entries[name].shape

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, a view of the mapping: copy it before the file may change.

        Raises:
            CheckpointError: Its dtype is unknown.
        """
        kind, shape, begin = self.entries[name]
        size = self._dtype(name).itemsize
        if begin % size or self._data.storage_offset() % size:  # written by another program, without alignment
            nbytes = size * math.prod(shape)
            return self._data[begin : begin + nbytes].clone().view(self._dtype(name)).view(shape)
        if kind not in self._typed:
            self._typed[kind] = self._data[: len(self._data) // size * size].view(self._dtype(name))
        typed = self._typed[kind]
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        return typed.as_strided(shape, strides, typed.storage_offset() + begin // size)

    def digests(self) -> dict[str, str]:
        """The digest of every tensor, see `integrity`."""
        pieces = (Piece(name, self._dtype(name), entry.shape, entry.begin) for name, entry in self.entries.items())
        return digests_in(self._data, pieces)

    def _dtype(self, name: str) -> torch.dtype:
        kind = self.entries[name].kind
        if kind not in DTYPES:
            raise CheckpointError(f"{self.path}: {name!r} has the unknown dtype {kind}. Save the adapter again")
        return DTYPES[kind]
