# SPDX-License-Identifier: Apache-2.0
"""Configurations: one validated source for callbacks, the command line, YAML and adapter files; a file a method."""

from __future__ import annotations

from typing import Any

from lightning_lora.config.adalora import AdaLoRAConfig
from lightning_lora.config.base import AdapterConfig, DTypeName, MasterDTypeName, QuantizeMode, matches_pattern
from lightning_lora.config.bottleneck import BottleneckConfig, BottleneckMode, NonLinearity, Placement
from lightning_lora.config.full import FullTuningConfig
from lightning_lora.config.ia3 import IA3Config
from lightning_lora.config.lora import LoRAConfig, check_ratio, scaling
from lightning_lora.config.norms import NormTuningConfig
from lightning_lora.config.prefix import PrefixTuningConfig
from lightning_lora.config.prompt import PromptInit, PromptTuningConfig
from lightning_lora.config.record import AdapterRecord, Waiting
from lightning_lora.config.vera import VeRAConfig
from lightning_lora.errors import ConfigError

#: By `AdapterConfig.method`; who adds a method adds its class.
METHODS: dict[str, type[AdapterConfig]] = {
    config.method: config
    for config in (
        LoRAConfig,
        IA3Config,
        AdaLoRAConfig,
        VeRAConfig,
        PromptTuningConfig,
        PrefixTuningConfig,
        BottleneckConfig,
        NormTuningConfig,
        FullTuningConfig,
    )
}


def config_from_dict(values: dict[str, Any]) -> AdapterConfig:
    """A configuration of any method from `AdapterConfig.to_dict`'s primitives.

    Raises:
        ConfigError: The method or a key is unknown, as in a file of a newer version.
    """
    method = values.get("method", LoRAConfig.method)
    if method not in METHODS:
        raise ConfigError(f"`method` {method!r} is unknown; it is one of {sorted(METHODS)}")
    return METHODS[method].from_dict(values)


__all__ = [
    "METHODS",
    "AdaLoRAConfig",
    "AdapterConfig",
    "AdapterRecord",
    "BottleneckConfig",
    "BottleneckMode",
    "DTypeName",
    "FullTuningConfig",
    "IA3Config",
    "LoRAConfig",
    "MasterDTypeName",
    "NonLinearity",
    "NormTuningConfig",
    "Placement",
    "PrefixTuningConfig",
    "PromptInit",
    "PromptTuningConfig",
    "QuantizeMode",
    "VeRAConfig",
    "Waiting",
    "check_ratio",
    "config_from_dict",
    "matches_pattern",
    "scaling",
]
