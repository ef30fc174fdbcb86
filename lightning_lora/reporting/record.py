# SPDX-License-Identifier: Apache-2.0
"""The record of a run: what its report shows, in primitives, as a callback saw it or as files tell it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError

FILE = "run.json"
_FORMAT = 1

#: What the name of a setting ends with whose value is nobody's business.
_SECRET = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?)$", re.IGNORECASE)


@dataclass(frozen=True)
class Watch:
    """What one monitor of forgetting found.

    Args:
        history: `Report.to_dict` of every look, in order.
        tolerance: a drop that is nobody's concern [share of items]; None where the files do not say.
        alpha: probability of a false alarm; None where the files do not say.
        outcome: what an alarm led to.
        metric: of the validation, by which learning was measured.
    """

    history: list[dict[str, Any]]
    tolerance: float | None = None
    alpha: float | None = None
    outcome: dict[str, Any] | None = None
    metric: str = "val_loss"


@dataclass(frozen=True)
class RunRecord:
    """A run, in primitives. A part that is empty was not measured, or is not known.

    Args:
        title: of the page.
        facts: how the run went, by what people call it: steps, time, devices.
        configuration: values by group and name.
        sizes: ``base_params``, ``base_bytes``, ``trainable_params``, ``adapter_params``, ``adapter_bytes``; ``rows``
            with module, type, parameters, trainable parameters and bytes.
        files: bytes of what the run wrote, by path.
        curves: (optimizer step, value) by name.
        watches: what was forgotten, by each monitor.
        sweep: `Sweep.to_dict`.
        diagnosis: what `AdapterDiagnostics` wrote.
        environment: versions and hardware.
    """

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    configuration: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)
    sweep: dict[str, Any] | None = None
    diagnosis: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The record as text; numbers that are not finite are null."""
        return json.dumps(_finite({"format": _FORMAT, **asdict(self)}), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> RunRecord:
        """The record that `to_json` wrote.

        Args:
            text: what it gave.
            where: the text stands, for an error.

        Raises:
            ConfigError: it is no record, or of another version of this package.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != _FORMAT:
                raise ConfigError(f"{where} was written by another version of this package: remove it, or update.")
            watches = [Watch(**watch) for watch in values["watches"]]
            curves = {
                name: [(int(step), float("nan") if value is None else float(value)) for step, value in points]
                for name, points in values["curves"].items()
            }
            return cls(**{**values, "watches": watches, "curves": curves})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"{where} is no record of a run ({error!r}): remove it, or name another folder."
            ) from error


def plain_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings as primitives and short text; what lies deeper by dotted names, and secrets hidden.

    Args:
        values: by name: hyperparameters, or what was read from YAML.
        prefix: before every name.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if _SECRET.search(str(key)) and value not in (None, ""):
            found[name] = "(hidden)"
        elif isinstance(value, Mapping) and value:
            found |= plain_settings(value, f"{name}.")
        else:
            found[name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return ", ".join(str(_plain(item)) for item in value)
    if isinstance(value, Mapping):
        return ""  # an empty one
    return f"{type(value).__module__}.{type(value).__qualname__}" if not isinstance(value, type) else value.__qualname__


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
