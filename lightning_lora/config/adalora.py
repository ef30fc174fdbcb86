# SPDX-License-Identifier: Apache-2.0
"""`AdaLoRAConfig`: low-rank updates whose ranks a run shares out among the layers (Zhang et al. 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_lora.config.base import AdapterConfig, check_alpha, check_dropout, check_rank, is_number
from lightning_lora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdaLoRAConfig(AdapterConfig):
    """Which linears get an update, and how its ranks fall. The words and their meanings are PEFT's.

    Args:
        init_r: Rank of every update at the start.
        target_r: Average rank at the end, at most ``init_r``.
        lora_alpha: Numerator of the scale; updates are multiplied by ``lora_alpha / init_r`` throughout.
        lora_dropout: Share of the adapter's input that is dropped in training, in [0, 1).
        tinit: Optimizer steps before the first rank is taken away.
        tfinal: Optimizer steps at the end with the final ranks.
        deltaT: Optimizer steps from one choice of ranks to the next.
        beta1: Share of the old in the smoothed sensitivity, in (0, 1).
        beta2: Share of the old in its uncertainty, in (0, 1).
        orth_reg_weight: Factor of the term that keeps the factors' vectors orthonormal; 0 for none.
        total_step: Optimizer steps of the run; what the Trainer expects if null.

    Raises:
        ConfigError: An argument is out of its range.
    """

    method: ClassVar[str] = "adalora"
    title: ClassVar[str] = "AdaLoRA"
    use_fields: ClassVar[tuple[str, ...]] = ("lora_alpha",)
    free_fields: ClassVar[tuple[str, ...]] = ("lora_dropout", "orth_reg_weight", "total_step", "compute_dtype")

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        for name in ("init_r", "target_r", "deltaT"):
            check_rank(name, getattr(self, name))
        if self.target_r > self.init_r:
            raise ConfigError(
                f"`target_r={self.target_r}` is above `init_r={self.init_r}`: ranks are taken away, never added"
            )
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        for name in ("tinit", "tfinal"):
            _check_steps(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < 1:
                raise ConfigError(f"`{name}` must be a number between 0 and 1, got {value!r}")
        weight = self.orth_reg_weight
        if not is_number(weight) or not 0 <= weight < math.inf:
            raise ConfigError(f"`orth_reg_weight` must be a number of 0 or more, got {weight!r}")
        if self.total_step is not None:
            check_rank("total_step", self.total_step)
        super().__post_init__()

    @property
    def dropout(self) -> float:
        """See `AdapterConfig.dropout`."""
        return self.lora_dropout

    def rank_for(self, *names: str) -> int:
        """See `AdapterConfig.rank_for`: that of the start, which the shapes keep."""
        return self.init_r

    def alpha_for(self, *names: str) -> float:
        """See `AdapterConfig.alpha_for`."""
        return self.lora_alpha


def _check_steps(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"`{name}` must be a number of optimizer steps, 0 or more, got {value!r}")
