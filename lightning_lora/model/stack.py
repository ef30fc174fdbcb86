# SPDX-License-Identifier: Apache-2.0
"""`read_stack`: earlier bottleneck adapters that stay frozen below the one that is trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, BottleneckConfig
from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError
from lightning_lora.nn.bottleneck import BottleneckSublayer

_START, _PART = "base_model.model.", ".bottleneck."


@dataclass(frozen=True)
class Earlier:
    """One adapter of a stack, as its folder has it.

    Args:
        path: The folder.
        config: Its configuration.
        parts: By the name of a sublayer inside the transformers model, the tensors there.
    """

    path: str
    config: BottleneckConfig
    parts: dict[str, dict[str, Tensor]]


def read_stack(config: BottleneckConfig, layers: list[nn.Module]) -> list[Earlier]:
    """The adapters of ``config.stack``, the lowest first.

    Raises:
        CheckpointError: A folder cannot be read, or is of another method.
        ConfigError: One was trained over others than those before it.
        UnsupportedError: One holds modules that were trained in full.
    """
    found: list[Earlier] = []
    for path in config.stack or []:
        earlier = _read(path)
        below = [*(e.path for e in found)]
        if earlier.config.stack and list(earlier.config.stack) != below:
            raise ConfigError(
                f"`stack`: {path} was trained over {earlier.config.stack}, here it would stand over {below}: list "
                "those folders before it"
            )
        found.append(earlier)
    return found


def stacked(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> BottleneckSublayer:
    """The module that stands in a sublayer's place, over what the earlier adapters have there."""
    name = names[-1]
    module = BottleneckSublayer(layer, record)
    for earlier in record.shared or []:
        if name in earlier.parts:
            module.stand_over(f"{name!r} of {earlier.path}", earlier.config, earlier.parts[name])
    return module


def check_stack(model: nn.Module) -> None:
    """See that every part of the earlier adapters has found its place.

    Raises:
        UnsupportedError: Some have none.
    """
    modules = [m for m in model.modules() if isinstance(m, BottleneckSublayer)]
    placed = {name for module in modules for name in module.below_names}
    for earlier in modules[0].record.shared or [] if modules else []:
        lost = [name for name in earlier.parts if f"{name!r} of {earlier.path}" not in placed]
        if lost:
            raise UnsupportedError(
                f"`stack`: {earlier.path} has an adapter on {lost[0]!r}, where this one has none, and would compute "
                "something else without it: choose the same `placement` or `target_modules`"
            )


def _read(path: str) -> Earlier:
    folder = Path(path).expanduser()
    try:
        values = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        own = json.loads((folder / "lightning_lora.json").read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"`stack`: {path} is no adapter folder of this package that can be read ({error}): name one that "
            "`save_adapter` wrote"
        ) from error
    if values.get("method") != BottleneckConfig.method:
        raise CheckpointError(
            f"`stack`: {path} is of {values.get('peft_type') or values.get('method')!r}: only bottleneck adapters "
            "stand on one another"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, part, rest = key.removeprefix(_START).partition(_PART)
        if not part:
            raise UnsupportedError(
                f"`stack`: {path} holds {key!r} of a module that was trained in full (`modules_to_save`), which cannot "
                "stand below another adapter"
            )
        parts.setdefault(name, {})[rest] = tensor
    return Earlier(path, BottleneckConfig.from_dict(own), parts)
