# SPDX-License-Identifier: Apache-2.0
"""`NormTuningConfig`: the norms alone are trained (Zhao et al. 2024); PEFT's LN_TUNING."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lora.config.base import AdapterConfig
from lightning_lora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class NormTuningConfig(AdapterConfig):
    """Which norms are trained.

    Args:
        target_modules: "all-norms" (every LayerNorm, RMSNorm and GroupNorm with a weight), a list of name suffixes
            such as ``["input_layernorm"]``, or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of norms to leave alone.
        layers_to_transform: Indices of the blocks whose norms are trained; all if null.
        layers_pattern: Name of the block list that ``layers_to_transform`` counts.
        modules_to_save: Name suffixes of other modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in.

    Raises:
        ConfigError: An argument is out of its range, or of no use to the method.
    """

    method: ClassVar[str] = "norm_tuning"
    title: ClassVar[str] = "layer-norm tuning"

    target_modules: str | list[str] = "all-norms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules == "all-linear":
            raise ConfigError('`target_modules="all-linear"` is for methods on linears: use "all-norms", or name norms')
        if self.adapter_dtype != "fp32":
            raise ConfigError("layer-norm tuning has no `adapter_dtype`: a copy has the dtype of its norm")
