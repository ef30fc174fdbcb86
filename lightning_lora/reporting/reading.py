# SPDX-License-Identifier: Apache-2.0
"""The record of a finished run, from what stands in its folder.

::

    run.json                   by RunReport: everything; what follows fills what it lacks
    forgetting.json            by ForgettingMonitor
    scale_sweep.json           by ScaleSweep
    adapter_diagnostics.json   by AdapterDiagnostics
    metrics.csv, hparams.yaml  by Lightning's CSVLogger; config.yaml by a LightningCLI
    adapter_config.json ...    folders of adapters, and checkpoints
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import SafetensorError, safe_open

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.sweep import Sweep
from lightning_lora.reporting.record import FILE, RunRecord, Watch, plain_settings

T = TypeVar("T")

#: How many folders below the one that is named files are looked for.
_DEPTH = 3
_ADAPTER = "adapter_config.json"
#: Columns of ``metrics.csv`` that stand elsewhere on the page, or say nothing.
_ELSEWHERE = ("forgetting/", "learning/", "adapter/", "scale_sweep/")


def read_run(folder: Path, title: str | None = None) -> RunRecord:
    """What is known of the run that wrote into a folder.

    Args:
        folder: the logger's folder of a run, or whatever the callbacks were given as ``dirpath``.
        title: of the page; None for what the run said, or the folder's name.

    Raises:
        ConfigError: there is no such folder, it holds nothing of a run or several runs, or a file of it is damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: name the one that a run wrote to, such as its logger's.")
    files = {path.name: path for path in _singles(folder)}
    adapters = sorted(_below(folder, _ADAPTER), key=lambda path: path.stat().st_mtime)
    if not files and not adapters:
        names = ", ".join(_READ)
        raise ConfigError(f"{folder} holds nothing of a run ({names}, adapters): name the folder that one wrote to.")
    record = RunRecord(f"Run in {folder.resolve().name}")
    if FILE in files:
        record = RunRecord.from_json(files[FILE].read_text(encoding="utf-8"), str(files[FILE]))
    parts = {name: read for name, (part, read) in _READ.items() if name in files and not getattr(record, part)}
    for name, read in parts.items():
        found = _reading(files[name], read)
        part = _READ[name][0]
        if part == "configuration":
            found = {**record.configuration, **found}
        record = replace(record, **{part: found})
    if adapters:
        record = replace(
            record,
            configuration=record.configuration or _adapter_settings(adapters[-1].parent),
            sizes=record.sizes or _adapter_sizes(adapters[-1].parent),
        )
    written = {str(path.relative_to(folder)): _nbytes(path) for path in _outputs(folder)}
    return replace(record, title=title or record.title, files=record.files or written)


def parts_of(record: RunRecord) -> dict[str, bool]:
    """Which parts of its page a record has something for.

    Args:
        record: of a run.
    """
    names = ("watches", "curves", "sweep", "diagnosis", "sizes", "configuration", "environment")
    called = {"watches": "forgetting", "diagnosis": "adapters"}
    return {called.get(name, name): bool(getattr(record, name)) for name in names}


def _singles(folder: Path) -> Iterator[Path]:
    """The one file of each name that stands highest; several side by side are several runs."""
    for name in (FILE, *_READ):
        found = list(_below(folder, name))
        least = min((len(path.parts) for path in found), default=0)
        highest = [path for path in found if len(path.parts) == least]
        if len(highest) > 1:
            folders = ", ".join(str(path.parent) for path in sorted(highest))
            raise ConfigError(f"{folder} holds several runs, each with its own {name}: name one of {folders}.")
        yield from highest


def _below(folder: Path, pattern: str) -> Iterator[Path]:
    for depth in range(_DEPTH + 1):
        yield from folder.glob("*/" * depth + pattern)


def _outputs(folder: Path) -> list[Path]:
    """Checkpoints and folders of adapters, by name; a link is not counted again."""
    found = [*_below(folder, "*.ckpt"), *(path.parent for path in _below(folder, _ADAPTER))]
    return sorted(path for path in found if not path.is_symlink())


def _nbytes(path: Path) -> int:
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in inside)


def _reading(path: Path, read: Callable[[str], T]) -> T:
    try:
        return read(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged, or of no run."
        ) from error


def _watches(text: str) -> list[Watch]:
    history = json.loads(text)
    for values in history:
        Report.from_dict(values)
    return [Watch(history)] if history else []


def _sweep(text: str) -> dict[str, Any]:
    return Sweep.from_dict(json.loads(text)).to_dict()


def _diagnosis(text: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(text)
    return {key: values[key] for key in ("step", "modules", "metrics", "advice")}


def _curves(text: str) -> dict[str, list[tuple[int, float]]]:
    """Columns of ``metrics.csv``. Lightning counts steps from 0 there: the first step's loss stands at 0."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(text.splitlines()):
        for name, value in row.items():
            number = _number(value)
            if name in (None, "step", "epoch") or name.startswith(_ELSEWHERE) or number is None or not row.get("step"):
                continue
            curves.setdefault(name, []).append((int(float(row["step"])) + 1, number))
    return curves


def _number(value: str | None) -> float | None:
    """The number of a cell; None for an empty one and for text."""
    try:
        number = float(value or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else math.nan


def _config(text: str) -> dict[str, dict[str, Any]]:
    """Settings of a LightningCLI by their group; hyperparameters that need Python to be read are left out."""
    values = yaml.safe_load(text)
    groups = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    rest = {key: value for key, value in values.items() if key not in groups}
    found = {key: plain_settings(value) for key, value in groups.items()}
    return {**({"run": plain_settings(rest)} if rest else {}), **found}


def _hparams(text: str) -> dict[str, dict[str, Any]]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.constructor.ConstructorError:  # objects of Python among them: not loaded from a file
        return {}
    return {"module and data": plain_settings(values)} if values else {}


#: For each file, the part of the record that it tells, and how it is read.
_READ: dict[str, tuple[str, Callable[[str], Any]]] = {
    "forgetting.json": ("watches", _watches),
    "scale_sweep.json": ("sweep", _sweep),
    "adapter_diagnostics.json": ("diagnosis", _diagnosis),
    "metrics.csv": ("curves", _curves),
    "config.yaml": ("configuration", _config),
    "hparams.yaml": ("configuration", _hparams),
}


def _adapter_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """Of this package's own record where there is one, else as PEFT has it."""
    own = folder / "lightning_lora.json"
    values = _reading(own, json.loads).get("config") if own.exists() else None
    return {"adapters": plain_settings(values or _reading(folder / _ADAPTER, json.loads))}


def _adapter_sizes(folder: Path) -> dict[str, Any]:
    """Counts from the header of the newest adapter's file; the base is not here."""
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        return {}
    try:
        with safe_open(str(path), "pt") as file:
            count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be read ({error}): it is damaged.") from error
    return {"adapter_params": count, "adapter_bytes": path.stat().st_size}
