# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: Lightning's own, in torch's zip format, written whole and read without trust.

The entry `KEY` is given ``digests``: one for every tensor in the file, by its place in it, compared on reading.
The rest of the file, torch's description of it included, is compared with the zip's own checksums. Tensors are
mapped from the file, not copied: a large one is read when it is used.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_lora.errors import CheckpointError
from lightning_lora.io.atomic import atomic_write
from lightning_lora.io.integrity import check_digests, check_names, digests

KEY = "lightning_lora"

_DIGESTS = "digests"
_LATER = ("state_dict", "optimizer_states")  # large: compared when they are used
_TENSOR = re.compile(r"[^/]+/data/\d+")  # a zip record that holds the values of tensors
_SMALL = 65536  # bytes; what is smaller is copied out of the file
#: Where a `ModelCheckpoint` keeps the files that it may remove, and `AdapterCheckpoint` its own.
_REMOVED = ("best_model_path", "last_model_path", "kth_best_model_path", "best_k_models", "recent")
_EARLIER = "Take an earlier checkpoint, or the adapter folder beside it"


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | os.PathLike[str], over_folder: bool = False) -> None:
    """Write a checkpoint; a process killed at any moment leaves the old file or the new one.

    Args:
        checkpoint: What `torch.save` is given. Digests of its tensors are added to its entry `KEY`, if it has one.
        path: The file.
        over_folder: Whether a folder that stands there is replaced, such as one of shards.

    Raises:
        WriteError: No room, or no permission.
        CheckpointError: A folder stands at `path` that is not to be replaced.
    """
    if KEY in checkpoint:
        checkpoint = {**checkpoint, KEY: {**checkpoint[KEY], _DIGESTS: digests(_tensors(checkpoint))}}
    with atomic_write(path, over_folder) as part, part.open("wb") as file:
        torch.save(checkpoint, file)


class Pending:
    """Tensors of an opened file that are compared with their digests when they are used.

    Args:
        file: Where they are mapped from.
        tensors: The mapped tensors, by place.
        expected: Their digests, by place.
    """

    def __init__(self, file: object, tensors: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
        self.file = file
        self._tensors, self._expected = dict(tensors), dict(expected)

    def check(self, *keys: str) -> None:
        """Compare what lies under these entries of the checkpoint, or all that is left; each once.

        Raises:
            CheckpointError: A tensor is not what was written.
        """
        due = [place for place in self._tensors if not keys or place.startswith(tuple(f"[{key!r}]" for key in keys))]
        tensors = {place: self._tensors.pop(place) for place in due}
        check_digests({place: self._expected[place] for place in due}, digests(tensors.items()), self.file, _EARLIER)


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """`open_checkpoint`, and every tensor compared at once."""
    checkpoint, pending = open_checkpoint(path, map_location)
    pending.check()
    return checkpoint


def open_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> tuple[dict[str, Any], Pending]:
    """Open a checkpoint without its pickles; its tensors are read when they are used.

    Args:
        path: The file.
        map_location: As `torch.load` takes it.

    Returns:
        The checkpoint; and what is to be checked of ``state_dict`` and ``optimizer_states`` before they are used. All
        else has been compared.

    Raises:
        FileNotFoundError: There is none.
        CheckpointError: It is no whole checkpoint, is damaged, or holds objects that only a pickle can make.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"there is no checkpoint file at {file}: name one that is there")
    if file.is_dir():
        raise CheckpointError(f"{file} is a folder, a checkpoint file is needed: name the .ckpt file")
    try:
        _check_records(file)
        checkpoint = torch.load(file, map_location=map_location, weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(file, str(error))) from error
    except PermissionError as error:
        raise CheckpointError(
            f"{file} may not be read by this user: {error.strerror}. Give it read permission"
        ) from error
    except Exception as error:  # torch and zipfile raise a dozen kinds for a broken file
        raise CheckpointError(f"{file} is no whole checkpoint file ({_first_line(error)}). {_EARLIER}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{file} holds no `state_dict`: it is no checkpoint of Lightning's. Take another file")
    pending = verify(checkpoint, file)
    others = {key: value for key, value in checkpoint.items() if key not in _LATER}
    return {**checkpoint, **tree_map(_copied_if_small, others)}, pending


def verify(checkpoint: Mapping[str, Any], file: object) -> Pending:
    """Compare tensors with their digests, where there are any, and refuse paths that lead out of their folder.

    Returns:
        What is left to compare: the large entries.

    Raises:
        CheckpointError: A tensor is not what was written, is missing or too many, or a `ModelCheckpoint`'s state
            names a file outside its folder.
    """
    entry = checkpoint.get(KEY)
    pending = Pending(file, {}, {})
    if isinstance(entry, Mapping) and _DIGESTS in entry:
        tensors = dict(_tensors(checkpoint))
        check_names(entry[_DIGESTS], tensors, file, _EARLIER)
        pending = Pending(file, tensors, entry[_DIGESTS])
        pending.check(*(key for key in checkpoint if key not in _LATER))
    for name, state in (checkpoint.get("callbacks") or {}).items():
        for path in _outside(state):
            raise CheckpointError(
                f"{file}: the state of {name!r} names {path!r}, which leads out of its folder: no run writes that. "
                "Take a checkpoint that you trust"
            )
    return pending


def unmapped(checkpoint: Mapping[str, Any], key: str, device: torch.device) -> Mapping[str, Any]:
    """A checkpoint whose entry `key` is in memory where a model on `device` would go on to use it from the file."""
    if device.type != "cpu" or key not in checkpoint:
        return checkpoint
    return {**checkpoint, key: tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, checkpoint[key])}


def _tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its place, as ``['state_dict']['net.first.adapter.lora_A']``."""
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{place}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{place}[{index}]")


def _outside(state: Any) -> Iterator[str]:
    """The paths of a `ModelCheckpoint`'s state, which it removes in time, that lead out of its folder by ``..``."""
    if not isinstance(state, Mapping) or not {"best_model_path", "best_k_models"} & state.keys():
        return
    folder = os.path.abspath(state["dirpath"]) if isinstance(state.get("dirpath"), str) else None
    for path in _texts([state.get(key) for key in _REMOVED]):
        if ".." not in PurePosixPath(path).parts:
            continue  # Lightning itself leaves alone what lies elsewhere
        if folder is None or os.path.commonpath([folder, os.path.abspath(path)]) != folder:
            yield path


def _texts(state: Any) -> Iterator[str]:
    """The texts in a callback's state, keys of tables included."""
    if isinstance(state, str):
        yield state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from _texts(key)
            yield from _texts(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _texts(value)


def _check_records(file: Path) -> None:
    """See that the file is a whole zip as torch writes it; every record but the tensors' is read and compared.

    Raises:
        CheckpointError, OSError, zipfile.BadZipFile: It is not.
    """
    size = file.stat().st_size
    if size == 0:
        raise CheckpointError(f"{file} is empty: the disk was full, or another program wrote it. {_EARLIER}")
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if ".." in PurePosixPath(record.filename).parts or record.filename.startswith("/"):
                raise CheckpointError(f"{file} names {record.filename!r}, which leads out of it: it is not opened")
            if record.compress_type != zipfile.ZIP_STORED or record.header_offset + record.file_size > size:
                raise CheckpointError(f"{file}: {record.filename!r} is compressed or larger than the file. {_EARLIER}")
            if not _TENSOR.fullmatch(record.filename):
                archive.read(record)  # raises where the checksum differs


def _refusal(file: Path, text: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found is None:
        return f"{file} is no whole checkpoint file ({text.splitlines()[0]}). {_EARLIER}"
    return (
        f"{file} holds an object of {found[1]!r}, which only a pickle can make, and pickles run what they are told to: "
        "it is not loaded. If it is yours and you trust it, name the class in `torch.serialization.add_safe_globals`"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def _copied_if_small(leaf: Any) -> Any:
    """What lives as long as the run must not hang on the file."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.nbytes <= _SMALL else leaf
