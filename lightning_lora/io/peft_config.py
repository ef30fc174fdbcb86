# SPDX-License-Identifier: Apache-2.0
"""`peft_config`: the ``adapter_config.json`` of a live model, in PEFT's words."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from lightning_lora.errors import AdapterMismatchError, ConfigError
from lightning_lora.io.names import adapter_root, named_adapters, plain_modules, task_type
from lightning_lora.io.peft_rules import Scale, Spec, shortest_spec
from lightning_lora.io.peft_types import Chosen, type_for
from lightning_lora.model.slots import adapter_record
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.experts import LoRAExperts
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lowrank import LowRankModule
from lightning_lora.nn.saved import SavedModule
from lightning_lora.nn.tokens import TrainedTokens


def peft_config(model: nn.Module) -> dict[str, Any]:
    """The ``adapter_config.json`` of a converted model, checked by PEFT's own rules of matching.

    Args:
        model: A converted model.

    Raises:
        AdapterMismatchError: The model has no adapters.
        UnsupportedError: PEFT's format cannot express the choice of modules.
        ConfigError: The adapters are switched off or turned around by a strength of zero or below.
    """
    record = adapter_record(model)
    if record is None:
        raise AdapterMismatchError("the model has no adapters to write; call `apply_lora` or add the `LoRA` callback")
    prefix, root = adapter_root(model)
    adapted: dict[str, Scale] = {}
    parameters: dict[str, Scale] = {}
    tokens: dict[str, list[int]] = {}
    saved = []
    for name, module in named_adapters(model):
        if type(module) is SavedModule:
            saved.append(name)
        elif isinstance(module, TrainedTokens):
            tokens |= {name: module.tokens} if module.own_names() else {}
        elif isinstance(module, LoRALinear):
            adapted[name] = Scale(module.update_rank, _plain_number(module.update_alpha * _strength(module)))
        elif isinstance(module, LowRankModule):
            scale = Scale(module.r, _plain_number(module.lora_alpha * _strength(module)))
            if isinstance(module, LoRAExperts):
                parameters |= {f"{name}.{site.parameter}": scale for site in module.sites}
            else:
                adapted[name] = scale
        else:
            _strength(module)
            adapted[name] = Scale(record.config.rank_for(name), record.config.alpha_for(name))
    config = record.config
    row = type_for(config)
    words = dataclasses.asdict(config)
    if not row.layers:
        words |= {"layers_to_transform": None, "layers_pattern": None}
    if not row.exclude:
        words |= {"exclude_modules": None}
    spec = shortest_spec(list(plain_modules(root)), adapted, saved, Spec.from_json(words), parameters)
    wanted = getattr(config, "trainable_token_indices", None)
    ids = wanted if isinstance(wanted, list) else tokens
    transposed = any(getattr(m, "fan_in_fan_out", False) for _, m in named_adapters(model))
    layers = {"layers_to_transform": spec.layers_to_transform, "layers_pattern": spec.layers_pattern}
    choice: dict[str, Any] = {"target_modules": spec.target_modules}
    if row.exclude:
        choice["exclude_modules"] = spec.exclude_modules
    return {
        **({"peft_type": row.name} if row.name else {}),
        "task_type": task_type(root, saved),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": spec.modules_to_save,
        **(choice if row.by_names else {}),
        **(layers if row.layers else {}),
        **row.write(config, Chosen(spec, list(adapted), transposed, list(parameters), ids)),
    }


def _strength(module: AdapterModule) -> float:
    if module.strength <= 0:
        raise ConfigError(
            f"the adapters' strength is {module.strength}: an adapter file needs one above zero; "
            "call `set_adapter_scale(model, 1.0)` first"
        )
    return module.strength


def _plain_number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
