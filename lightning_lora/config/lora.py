# SPDX-License-Identifier: Apache-2.0
"""`LoRAConfig`: one validated source for the callback, the command line, YAML and adapter files.

The words and their meanings are PEFT's. The forward of an adapted linear layer is

    y = x W^T + b + s * dropout(x) A^T B^T,    s = lora_alpha / r   (use_rslora: lora_alpha / sqrt(r))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_lora.config.base import (
    AdapterConfig,
    by_pattern,
    check_alpha,
    check_choice,
    check_dropout,
    check_rank,
    check_regex,
    check_table,
    is_number,
)
from lightning_lora.errors import ConfigError

InitMode = Literal["kaiming", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """How a model is adapted and, with ``quantize``, how its base is packed.

    Args:
        r: Rank of every adapter, the inner size of ``B A``. At least 1.
        lora_alpha: Numerator of the scale; the update is multiplied by ``lora_alpha / r``.
        lora_dropout: Share of the adapter's input that is dropped in training, in [0, 1).
        rank_pattern: Ranks for some modules, by name suffix or regular expression: ``{"q_proj": 32}``.
        alpha_pattern: The same for ``lora_alpha``.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``lora_alpha / r``.
        use_dora: Train the magnitude of each output apart from its direction (DoRA, Liu et al. 2024).
        init_lora_weights: Start of A: "kaiming" (uniform, as PEFT's default) or "gaussian"
            (standard deviation 1/r). B is zero either way.
        loraplus_lr_ratio: LoRA+ (Hayou et al. 2024): the learning rate of B as a multiple of that of A, such
            as 16; null for the same rate. The `LoRA` callback sees to it in the optimizers of a run; without
            a Trainer `loraplus_param_groups` does.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: A method that is not built was asked for.
    """

    free_fields: ClassVar[tuple[str, ...]] = ("lora_dropout", "init_lora_weights", "compute_dtype", "loraplus_lr_ratio")

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: InitMode = "kaiming"
    loraplus_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_table("rank_pattern", self.rank_pattern)
        check_table("alpha_pattern", self.alpha_pattern)
        for key, rank in (self.rank_pattern or {}).items():
            check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            check_alpha(f"alpha_pattern[{key!r}]", alpha)
        check_ratio(self.loraplus_lr_ratio)
        check_dropout("lora_dropout", self.lora_dropout)
        super().__post_init__()
        for name, table in self.patterns().items():
            for key in table:
                check_regex(name, key)
        check_choice("init_lora_weights", self.init_lora_weights, InitMode)

    @property
    def dropout(self) -> float:
        """See `AdapterConfig.dropout`."""
        return self.lora_dropout

    def patterns(self) -> dict[str, dict[str, Any]]:
        """``rank_pattern`` and ``alpha_pattern``."""
        return {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}

    def rank_for(self, *names: str) -> int:
        """Rank of a module (``rank_pattern`` or ``r``), by any of its names: in full, inside the HF model."""
        return by_pattern(self.rank_pattern, names, self.r)

    def alpha_for(self, *names: str) -> float:
        """``lora_alpha`` of a module (``alpha_pattern`` or ``lora_alpha``), by any of its names."""
        return by_pattern(self.alpha_pattern, names, self.lora_alpha)


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """The factor of ``B A``: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rank stabilisation."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def check_ratio(value: Any) -> None:
    """See that ``loraplus_lr_ratio`` is null or a factor.

    Raises:
        ConfigError: It is neither.
    """
    if value is not None and not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"`loraplus_lr_ratio` must be a positive number, such as 16, or null, got {value!r}")
