# SPDX-License-Identifier: Apache-2.0
"""The distributed form of a checkpoint: a folder in which every process wrote its own shards.

::

    x.ckpt/.metadata         which shard of which tensor lies where (`torch.distributed.checkpoint`)
    x.ckpt/__0_0.distcp      the shards of process 0 ...
    x.ckpt/meta.pt           a checkpoint of one file, of everything that is no adapter and no optimizer tensor,
                             and with digests of the other files

Tensors are called ``state_dict.<name>`` and ``optimizer_<i>.<parameter id>.<key>``; they may be read back by
any number of processes, sharded otherwise or not at all. ``.metadata`` is a pickle: it is read by an unpickler
that knows the dozen classes which belong there and nothing else.
"""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as load_shards
from torch.distributed.checkpoint import save as save_shards
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lightning_lora.errors import CheckpointError, WriteError
from lightning_lora.io.atomic import recover
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint, write_checkpoint
from lightning_lora.io.integrity import tensor_digest
from lightning_lora.nn.sharded import is_sharded

META = "meta.pt"
INDEX = ".metadata"

_FILES = "files"  # in the entry of this package: digests of the other files, by name
_EARLIER = "Take an earlier checkpoint"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath"),
}


def is_distributed(path: str | os.PathLike[str]) -> bool:
    """Whether a distributed checkpoint stands at ``path``; one that a killed process moved aside is put back."""
    recover(path)
    return Path(path, META).is_file() and Path(path, INDEX).is_file()


def write_distributed(
    checkpoint: Mapping[str, Any], folder: str | os.PathLike[str], target: str | os.PathLike[str] | None = None
) -> None:
    """Write this process's part into ``folder``, which exists; every process of the group calls it.

    Args:
        checkpoint: As Lightning makes it; tensors sharded, or the same on all processes.
        folder: Where to write.
        target: What the folder will be called, for the texts of errors.

    Raises:
        WriteError: The part of some process could not be written; raised on all of them.
    """
    tensors, rest = _split(checkpoint)
    try:
        save_shards(tensors, storage_writer=FileSystemWriter(folder, sync_files=True))
    except CheckpointException as error:
        told = "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())
        raise WriteError(
            f"{os.fspath(target or folder)} could not be written ({told}). What stood there before is as it was"
        ) from error
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        rest[KEY] = {**rest.get(KEY, {}), _FILES: dict(file_digests(Path(folder)))}
        write_checkpoint(rest, Path(folder, META))


def read_distributed(
    folder: str | os.PathLike[str],
    like: Callable[[str], Tensor | None] = lambda name: None,
    optimizers: bool = True,
) -> dict[str, Any]:
    """A checkpoint as Lightning knows it, from a distributed one. No process waits for another.

    Args:
        folder: Where `write_distributed` wrote.
        like: For a tensor's name, the sharded tensor that it will be copied into: only this process's part is
            read. None, or another shape: the whole tensor.
        optimizers: Whether the optimizers' tensors are read.

    Raises:
        CheckpointError: Something is missing or damaged, or is no tensor.
    """
    checkpoint = read_checkpoint(Path(folder, META))
    reader = _Reader(folder)
    try:
        check_files((checkpoint.get(KEY) or {}).get(_FILES), Path(folder))
        entries = reader.read_metadata().state_dict_metadata
        wanted = _checked({n: e for n, e in entries.items() if optimizers or n.startswith("state_dict.")}, Path(folder))
        tensors: dict[str, Any] = {name: _target(entry, like(name)) for name, entry in wanted.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant
            load_shards(tensors, storage_reader=reader, no_dist=True)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{os.fspath(folder)} is no whole distributed checkpoint ({type(error).__name__}: {error}). {_EARLIER}"
        ) from error
    return _join(checkpoint, tensors)


def read_either(path: str | os.PathLike[str], optimizers: bool = True) -> dict[str, Any]:
    """A checkpoint of one file or of shards, with whole tensors.

    Raises:
        FileNotFoundError, CheckpointError: As of `read_checkpoint` and `read_distributed`.
    """
    return read_distributed(path, optimizers=optimizers) if is_distributed(path) else read_checkpoint(path)


class _Reader(FileSystemReader):
    """Torch's reader, with an index that can name nothing but itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path, INDEX)
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path} holds a {type(metadata).__name__} and no index of shards")
        for info in metadata.storage_data.values():
            name = info.relative_path
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise CheckpointError(f"{path} points to {name!r}, outside its folder: it is not read")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows dtypes and `_CLASSES`."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and name not in _CLASSES.get(module, ()):
            raise CheckpointError(f"the index of a distributed checkpoint names {module}.{name}: it is not read")
        return super().find_class(module, name)


def _split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that are spread over processes, by name, and what remains."""
    rest = {**checkpoint, "state_dict": {}}
    tensors = {f"state_dict.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    states = []
    for index, state in enumerate(checkpoint.get("optimizer_states", [])):
        kept: dict[Any, dict[str, Any]] = {}
        for parameter, values in state["state"].items():
            kept[parameter] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            tensors.update(
                {f"optimizer_{index}.{parameter}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
            )
        states.append({**state, "state": kept})
    if "optimizer_states" in checkpoint:
        rest["optimizer_states"] = states
    return tensors, rest


def _join(rest: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state_dict: dict[str, Tensor] = {}
    by_optimizer: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        place, _, own = name.partition(".")
        if place == "state_dict":
            state_dict[own] = tensor
        else:
            parameter, _, key = own.partition(".")
            by_optimizer[place][parameter][key] = tensor
    for index, state in enumerate(rest.get("optimizer_states", [])):
        for parameter, values in state["state"].items():
            values.update(by_optimizer[f"optimizer_{index}"][str(parameter)])
    return {**rest, "state_dict": state_dict}


def file_digests(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of every file of a folder but the one that holds the digests."""
    for file in sorted(folder.iterdir()):
        size = file.stat().st_size
        if file.name != META and size:
            yield file.name, tensor_digest(torch.from_file(str(file), size=size, dtype=torch.uint8))


def check_files(expected: Mapping[str, str] | None, folder: Path) -> None:
    """Compare every file of a folder with its digest, before anything in it is used.

    Args:
        expected: What `file_digests` gave; None where Lightning itself wrote.
        folder: Where the files are.

    Raises:
        CheckpointError: A file has changed, is missing or was added.
    """
    if expected is None:
        return
    found = dict(file_digests(folder))
    odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if odd:
        how = "is missing" if odd[0] not in found else "was added" if odd[0] not in expected else "has changed"
        raise CheckpointError(f"{folder} is damaged: {odd[0]!r} {how} since it was written. {_EARLIER}")


def _checked(entries: Mapping[str, Any], folder: Path) -> dict[str, TensorStorageMetadata]:
    """Nothing is allocated for tensors that the files cannot hold."""
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    if len(tensors) < len(entries):
        name = next(name for name in entries if name not in tensors)
        raise CheckpointError(f"{str(folder)!r} holds {name!r}, which is no tensor: it is not read")
    stored = sum(file.stat().st_size for file in folder.iterdir())
    told = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in tensors.values())
    if told > stored:
        raise CheckpointError(
            f"the index of {folder} tells of {told:,} bytes of tensors, its files have {stored:,}. {_EARLIER}"
        )
    return tensors


def _target(entry: TensorStorageMetadata, like: Tensor | None) -> Tensor:
    if like is not None and is_sharded(like) and like.shape == entry.size:
        return torch.empty_like(like, dtype=entry.properties.dtype, requires_grad=False)
    return torch.empty(entry.size, dtype=entry.properties.dtype)
