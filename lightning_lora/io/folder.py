# SPDX-License-Identifier: Apache-2.0
"""`AdapterFolder`: an adapter folder on disk, PEFT's or ours, read without trusting it.

Only the three files below are opened, by these names; no path that stands inside one is followed, and no
pickle is read.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_lora.config import scaling
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, CheckpointError, Notice
from lightning_lora.io.atomic import recover
from lightning_lora.io.integrity import check_digests, check_finite
from lightning_lora.io.mapped_file import MappedFile
from lightning_lora.io.peft_rules import Spec, check_types
from lightning_lora.io.peft_types import PEFT_TYPES, PeftType, type_of
from lightning_lora.io.rank_pattern import grown, grown_shape, pattern_masks, shrunk
from lightning_lora.model.fingerprint import fingerprint, same_base
from lightning_lora.model.inner import inner_model
from lightning_lora.model.slots import adapter_record

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "lightning_lora.json"
#: Of `RECORD`; a folder without it is of the first or of PEFT's.
FORMAT = 1
PREFIX = "base_model.model."  # before every key but these, of what VeRA's layers share
SHARED = ("base_model.vera_A", "base_model.vera_B")
_ATTEMPTS = 3  # at reading a folder that is replaced meanwhile
#: What an adapter folder may consist of, and nothing else when it is replaced or removed.
KNOWN_FILES = (CONFIG, WEIGHTS, RECORD, "adapter_model.bin", "README.md")  # PEFT writes a model card


class AdapterFolder:
    """An adapter folder that was read and found to be one this version can load.

    Args:
        path: The folder.
        config: Its ``adapter_config.json``.
        record: Its ``lightning_lora.json``; empty for a folder of PEFT's.
        identity: Which files these are, see `identity_of`.
    """

    def __init__(self, path: Path, config: dict[str, Any], record: dict[str, Any], identity: tuple[int, ...]) -> None:
        self.path, self.config, self.record, self._identity = path, config, record, identity
        masked = _says_ranks(config)
        self.spec = Spec.from_json({**config, "rank_pattern": None} if masked else config)
        self._masks = pattern_masks(config, PREFIX, str(path / CONFIG)) if masked else {}
        self._file = MappedFile(path / WEIGHTS)
        self._copies = _base_copies(self._file.entries)
        self._keys = [key for key in self._file.entries if key not in self._copies]

    @property
    def kind(self) -> PeftType:
        """How its configuration is read."""
        return type_of(self.config, str(self.path / CONFIG))

    @classmethod
    def open(cls, dir: str | os.PathLike[str]) -> AdapterFolder:
        """Read the two JSON files of a folder and map the third: all three of one moment, or none.

        Raises:
            CheckpointError: The folder, or what must be in it, is missing or unreadable, or changes while it is read.
            UnsupportedError: The folder uses a method that is not built.
        """
        path = Path(dir).expanduser()
        recover(path)
        for _ in range(_ATTEMPTS):
            before = identity_of(path)
            try:
                folder = cls._open(path, before)
            except Exception:
                if identity_of(path) == before:
                    raise  # else a program replaced a part of it meanwhile, and what was read fits nothing
                continue
            if identity_of(path) == before:
                return folder
        raise CheckpointError(f"{path} changes while it is read: load it again when the program that writes it is done")

    @classmethod
    def _open(cls, path: Path, identity: tuple[int, ...]) -> AdapterFolder:
        if not path.is_dir():
            raise CheckpointError(f"there is no adapter folder at {path}: name the folder that holds {CONFIG}")
        _check_there(path / CONFIG)
        config = read_json(path / CONFIG)
        type_of(config, str(path / CONFIG))
        check_words(config, str(path / CONFIG))
        if not (path / WEIGHTS).is_file():
            pickled = (path / "adapter_model.bin").exists()
            hint = "its .bin is a pickle, which is not opened: save it" if pickled else "save the adapter"
            raise CheckpointError(f"{path} has no {WEIGHTS}; {hint} again as safetensors")
        record = read_json(path / RECORD) if (path / RECORD).exists() else {}
        version = record.get("format", FORMAT)
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(
                f"{path / RECORD}: format {version!r} is none that was written: save the folder again"
            )
        if version > FORMAT:
            raise CheckpointError(f"{path / RECORD} is of format {version}, this package knows {FORMAT}: update it")
        folder = cls(path, config, record, identity)
        folder._check_header()
        return folder

    def checked_tensors(self, verified: set[tuple[int, ...]] | None = None) -> dict[str, Tensor]:
        """`tensors`, seen to be finite.

        Args:
            verified: What folders were found whole before, by `identity_of`; this one is not checked again when it
                is among them, and added when it is not.

        Raises:
            CheckpointError: See `tensors`; or values are NaN or inf.
        """
        if verified is not None and self._identity in verified:
            return self._read()
        tensors = self.tensors()
        if not (self.record.get("finite") is True and isinstance(self.record.get("digests"), Mapping)):
            check_finite(tensors, self.path)  # else values with these digests were seen to be finite when written
        if verified is not None:
            verified.add(self._identity)
        return tensors

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the folder, on the CPU; those of a folder of ours are compared with their digests.

        They are views of the file: copy them before it may change.

        Raises:
            CheckpointError: The file holds other values than were written.
        """
        expected = self.record.get("digests")
        if isinstance(expected, Mapping):
            found = self._file.digests()
            check_digests(
                expected,
                {key: found[key] for key in self._keys},
                self.path / WEIGHTS,
                f"Take an earlier adapter; if another program wrote the file on purpose, remove {self.path / RECORD}",
            )
        return self._read()

    def _read(self) -> dict[str, Tensor]:
        return {key: grown(key, self._file.tensor(key), self._masks) for key in self._keys}

    def base_copies(self) -> dict[str, Tensor]:
        """Weights of the base that PEFT writes beside the factors of a head, by their names in the model."""
        return {name: self._file.tensor(key) for key, name in self._copies.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading them."""
        return {key: grown_shape(key, self._file.shape(key), self._masks) for key in self._keys}

    def without_dropped(self, key: str, tensor: Tensor) -> Tensor:
        """A live model's tensor as it would come back from this folder, which may hold some of its ranks alone."""
        return grown(key, shrunk(key, tensor.cpu(), self._masks), self._masks) if self._masks else tensor

    @property
    def parameters(self) -> int:
        """How many the file holds."""
        return sum(math.prod(self._file.shape(key)) for key in self._keys)

    def root(self, model: nn.Module) -> tuple[str, nn.Module]:
        """Where in a plain `model` the folder's names begin."""
        return ("", model) if self.record.get("names") == "module" else inner_model(model)

    def sized(self, name: str) -> str:
        """By which name PEFT looks up the rank and the scale of a module: of fused experts a parameter's."""
        found = (key for key in self.config.get("target_parameters") or () if name.endswith(key.rpartition(".")[0]))
        return next((f"{name}.{key.rpartition('.')[2]}" for key in found), name)

    def scale(self, name: str) -> float:
        """The factor of ``B A`` that PEFT gives the module called `name`."""
        return scaling(self.spec.rank(name), self.spec.alpha(name), bool(self.config.get("use_rslora")))

    def check_base(self, model: nn.Module) -> None:
        """Compare the fingerprint of `model`'s base with that in the folder's record; PEFT's folders have none.

        Raises:
            BaseMismatchError: They differ.
        """
        if not self.record:
            return
        expected = self.record.get("fingerprint")
        record = adapter_record(model)
        prefix, _ = inner_model(model)
        left_out = [f"{prefix}.{name}" if prefix else name for name in (expected or {}).get("without", [])]
        actual = record.fingerprint if record else fingerprint(model, left_out)
        name = self.config.get("base_model_name_or_path")
        compare_fingerprints(expected, actual, f"the adapters in {self.path}" + (f" (base {name!r})" if name else ""))

    def _check_header(self) -> None:
        """See that the configuration speaks of the tensors there are, before a model is made by it."""
        for key, (kind, shape, _) in self._file.entries.items():
            name, factor, rest = key.removeprefix(PREFIX).partition(".lora_")
            if not factor:
                continue
            if kind[0] not in "FB" or kind == "BOOL":  # F32, F8_E4M3, BF16 ...
                raise CheckpointError(
                    f"{self.path / WEIGHTS}: {key!r} is of {kind}, adapters are floats. Save the adapter again"
                )
            own = name.partition(".base_layer")[0]
            if self.sized(own) != own:  # of fused experts, whose ranks lie one after the other
                continue
            if rest == "A.weight" and len(shape) == 2 and self.spec.rank(own) != shape[0]:
                raise CheckpointError(
                    f"{self.path}: {name!r} has rank {self.spec.rank(own)} in {CONFIG} and {shape[0]} in "
                    f"{WEIGHTS}: one of the two was changed. Save the adapter again"
                )


def check_words(config: Mapping[str, Any], where: str) -> None:
    """`check_types`, and of a ``rank_pattern`` by ranks that it is one.

    Args:
        config: The parsed file.
        where: What to call it in the message.

    Raises:
        CheckpointError: A value has another type than PEFT gives it.
    """
    if _says_ranks(config):
        pattern_masks(config, PREFIX, where)
        config = {**config, "rank_pattern": None}
    check_types(config, where)


def _says_ranks(config: Mapping[str, Any]) -> bool:
    """Whether the file's ``rank_pattern``, if it has one, is of single ranks."""
    kind = PEFT_TYPES.get(str(config.get("peft_type")))
    return kind is not None and kind.ranks


def identity_of(path: Path) -> tuple[int, ...]:
    """Which folder and files stand at a path: places, inodes, sizes and times of change."""
    found: list[int] = []
    for file in (path, path / CONFIG, path / RECORD, path / WEIGHTS):
        try:
            stat = file.stat()
        except OSError:
            found += (-1,)
            continue
        found += (stat.st_dev, stat.st_ino)
        if file is not path:  # a folder's time changes with every file beside these
            found += (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return tuple(found)


def compare_fingerprints(
    expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None, what: str = "the adapters"
) -> None:
    """See that two fingerprints are of the same base; one that cannot be compared is a notice.

    Args:
        expected: Of the base that the adapters were trained on.
        found: Of this base.
        what: How the text calls the adapters.

    Raises:
        BaseMismatchError: They differ.
    """
    same = same_base(expected, found)
    if same is None:
        warnings.warn(
            f"the base model could not be compared with the one that {what} were trained on: its fingerprint is "
            "unknown (built on the meta device), of another version or of other modules, or one of the two was "
            "loaded already packed",
            Notice,
            stacklevel=3,
        )
    elif expected and found and not same:
        raise BaseMismatchError(
            f"{what} were trained on another base: expected {expected.get('base')} with fingerprint "
            f"{expected['digest'][:16]} over {expected['tensors']} tensors, this base is {found.get('base')} with "
            f"{found['digest'][:16]} over {found['tensors']}. Load the same pretrained weights, in the same dtype, "
            "before the adapters"
        )


def check_target(dir: str | os.PathLike[str]) -> None:
    """See that an adapter folder may be written to `dir`: nothing is there, or an adapter folder and no more.

    Args:
        dir: The folder.

    Raises:
        CheckpointError: A file stands there, or the folder holds something else.
    """
    path = Path(dir).expanduser()
    try:  # one look: another run may be putting its own folder in place
        names = sorted(os.listdir(path))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise CheckpointError(
            f"an adapter folder is to be written to {path}, but a file stands there: move it"
        ) from None
    foreign = [name for name in names if name not in KNOWN_FILES or (path / name).is_dir()]
    if foreign or (names and CONFIG not in names):
        raise CheckpointError(
            f"{path} is not empty and no adapter folder alone, it holds {(foreign or names)[0]!r}: it is not "
            "replaced. Choose another folder, or empty this one"
        )


def compare_shapes(expected: Mapping[str, tuple[int, ...]], actual: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuse a folder whose keys or shapes are not the expected ones, with the nearest names."""
    missing = [key for key in expected if key not in actual]
    unknown = [key for key in actual if key not in expected]
    text = ""
    if missing:
        near = difflib.get_close_matches(missing[0], unknown or list(actual), n=1)
        text += f" {len(missing)} of {len(expected)} tensors are missing, first {missing[0]!r}" + _near(near, "there")
    if unknown:
        near = difflib.get_close_matches(unknown[0], missing or list(expected), n=1)
        text += f" {len(unknown)} are unknown to the model, first {unknown[0]!r}" + _near(near, "in the model")
    if text:
        raise AdapterMismatchError(f"{path} does not fit the model:{text}. Is it the base it was trained on?")
    for key, shape in expected.items():
        if actual[key] != shape:
            rank = {".lora_A.weight": 0, ".lora_B.weight": 1}.get(key[key.rfind(".lora_") :])
            others = [[n for i, n in enumerate(s) if i != rank] for s in (actual[key], shape)]
            if rank is not None and len(actual[key]) == 2 and others[0] == others[1]:
                name = key.removeprefix(PREFIX).rpartition(".lora_")[0]
                raise AdapterMismatchError(
                    f"{path}: {name!r} has rank {actual[key][rank]} there and {shape[rank]} in the model: convert it "
                    "with the same `r` and `rank_pattern`"
                )
            raise AdapterMismatchError(
                f"{path}: {key!r} has shape {actual[key]}, the model needs {shape}: another rank or base. "
                "Convert the model as the folder says"
            )


def _base_copies(keys: Iterable[str]) -> dict[str, str]:
    """By key of a tensor that lies under ``base_layer`` of an adapted module, its name in the plain model."""
    found, names = {}, set(keys)
    for key in names:
        module, part, own = key.rpartition(".base_layer.")
        factor = ".lora_" in f".{own}"  # of an attention module's output projection, or of nested experts
        if part and not factor and {f"{module}.lora_A.weight", f"{module}.lora_embedding_A"} & names:
            found[key] = f"{module.removeprefix(PREFIX)}.{own}"
    return found


def near(name: str, names: Iterable[str]) -> str:
    """`` (nearest there: 'name');`` with the name that is most like another, or a semicolon alone."""
    return _near(difflib.get_close_matches(name, list(names), n=1), "there")


def _near(names: list[str], where: str) -> str:
    return f" (nearest {where}: {names[0]!r});" if names else ";"


def _check_there(path: Path) -> None:
    if not path.is_file():
        below = sorted(p.parent.name for p in path.parent.glob(f"*/{path.name}"))
        hint = f"; there are adapters in its folders {below}: give one of them" if below else ""
        raise CheckpointError(f"{path.parent} is no adapter folder: it has no {path.name}{hint}")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: It cannot be read, or is none.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        remedy = ". Give this user read permission" if isinstance(error, PermissionError) else ""
        raise CheckpointError(f"{path} cannot be read: {error.strerror}{remedy}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}. Take an earlier adapter") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def package_version() -> str:
    """The installed version of this package, for the metadata of files."""
    try:
        return importlib.metadata.version("lightning-lora")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
