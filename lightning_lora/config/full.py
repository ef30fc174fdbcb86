# SPDX-License-Identifier: Apache-2.0
"""`FullTuningConfig`: everything is trained, beside a frozen copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lora.config.base import AdapterConfig, refuse_fields
from lightning_lora.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class FullTuningConfig(AdapterConfig):
    """Full fine-tuning as a method: it has no choices of its own.

    Raises:
        ConfigError: An argument of other methods was given.
        UnsupportedError: The base is to be packed.
    """

    method: ClassVar[str] = "full"
    title: ClassVar[str] = "full fine-tuning"

    target_modules: str | list[str] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != "none":
            raise UnsupportedError(
                f"full fine-tuning trains every weight, and packed ones (quantize={self.quantize!r}) cannot be: use "
                "LoRA over a packed base"
            )
        names = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
        refuse_fields(self, (*names, "compute_dtype", "adapter_dtype"), "everything is trained, in its own dtype")
