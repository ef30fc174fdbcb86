# SPDX-License-Identifier: Apache-2.0
"""Model folders of safetensors files, read tensor by tensor and written so.

A file is ``uint64 length | JSON header | data``; names, dtypes and shapes are known before any value is, so the
header is written first and each tensor after it: no more than one tensor is ever in memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.errors import CheckpointError, ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

#: What a header calls a dtype.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Entry:
    """One tensor of a folder, by its header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFolder:
    """The tensors of a model folder, in one file or in shards with an index.

    Args:
        path: The folder.

    Raises:
        CheckpointError: There are no safetensors in it, or files that the index names are missing or broken.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        self._files: dict[str, Any] = {}
        self.files: dict[str, str] = {}  # key -> name of its file
        self.entries: dict[str, Entry] = {}  # key -> what its header says
        wanted = _files_by_key(self.path)
        for file in dict.fromkeys(wanted) if isinstance(wanted, list) else dict.fromkeys(wanted.values()):
            self._read_header(file)
        if isinstance(wanted, dict):
            missing = [key for key, file in wanted.items() if self.files.get(key) != file]
            if missing:
                raise CheckpointError(f"{self.path / INDEX} names tensors that are not in their file: {missing[:3]}")

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def tensor(self, key: str) -> Tensor:
        """The tensor called `key`, on the CPU, mapped from its file."""
        return self._files[self.files[key]].get_tensor(key)

    def _read_header(self, name: str) -> None:
        try:
            file = self._stack.enter_context(safe_open(self.path / name, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path / name} is no whole safetensors file: {error}. Save or fetch the model again"
            ) from error
        self._files[name] = file
        for key in file.keys():  # noqa: SIM118 (no mapping)
            part = file.get_slice(key)
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(f"{self.path / name}: {key!r} has the unknown dtype {part.get_dtype()}")
            self.files[key] = name
            self.entries[key] = Entry(DTYPES[part.get_dtype()], tuple(part.get_shape()))


def _files_by_key(path: Path) -> dict[str, str] | list[str]:
    """The index's table, or the one file there is. Names with a path in them are not followed."""
    if not path.is_dir():
        raise CheckpointError(f"there is no model folder at {path}: name the one that `save_pretrained` wrote")
    if (path / INDEX).is_file():
        try:
            table = json.loads((path / INDEX).read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / INDEX} is no index of safetensors: {error!r}") from error
        odd = [file for file in table.values() if not isinstance(file, str) or Path(file).name != file]
        if odd:
            raise CheckpointError(
                f"{path / INDEX} names {odd[0]!r}, which is no file of this folder: save the model again"
            )
        return table
    single = [SINGLE] if (path / SINGLE).is_file() else sorted(p.name for p in path.glob("*.safetensors"))
    if len(single) != 1:
        found = f"{len(single)} safetensors files and no {INDEX}" if single else "no safetensors files"
        raise CheckpointError(f"{path} has {found}: save the model with `save_pretrained` first")
    return single


def parse_size(size: int | str) -> int:
    """Bytes of ``"300MB"``, ``"5GB"``, ``"2GiB"`` or a number.

    Raises:
        ConfigError: Something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", str(size), re.IGNORECASE)
    count = int(float(match[1]) * _UNITS[(match[2] or "").upper()]) if match else 0
    if isinstance(size, bool) or count < 1:
        raise ConfigError(f'`max_shard_size` must be bytes or a text such as "5GB", got {size!r}')
    return count


def write_shards(
    folder: Path,
    entries: Mapping[str, Entry],
    tensor: Callable[[str], Tensor],
    max_shard_size: int,
    done: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Write tensors, each made when its turn has come, as one file or as shards with an index.

    Args:
        folder: Where to.
        entries: What each tensor will be, in order.
        tensor: Makes the tensor of a name.
        max_shard_size: Bytes of a file at most; a tensor that is larger has a file of its own.
        done: Called after each file with its name, its number and their count.

    Returns:
        The files' names.
    """
    shards = _shards(entries, max_shard_size)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for number, (name, keys) in enumerate(zip(names, shards, strict=True), 1):
        write_file(folder / name, {key: entries[key] for key in keys}, tensor)
        if done is not None:
            done(name, number, len(shards))
    if len(shards) > 1:
        table = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        size = sum(entry.nbytes for entry in entries.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(table.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def write_file(path: Path, entries: Mapping[str, Entry], tensor: Callable[[str], Tensor]) -> None:
    """Write one safetensors file, its wide dtypes first so that every tensor is aligned.

    Raises:
        CheckpointError: A tensor is not what its entry says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    keys = sorted(entries, key=lambda key: -entries[key].dtype.itemsize)
    end = 0
    for key in keys:
        start, end = end, end + entries[key].nbytes
        header[key] = {
            "dtype": _NAMES[entries[key].dtype],
            "shape": list(entries[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in keys:
            value = tensor(key)
            if Entry(value.dtype, tuple(value.shape)) != entries[key]:
                raise CheckpointError(f"{key!r} is {value.dtype} {tuple(value.shape)}, {entries[key]} was announced")
            if value.numel():
                file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _shards(entries: Mapping[str, Entry], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key, entry in entries.items():
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += entry.nbytes
    return shards
