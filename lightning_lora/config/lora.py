# SPDX-License-Identifier: Apache-2.0
"""`LoRAConfig`: one validated source for the callback, the command line, YAML and adapter files.

The words and their meanings are PEFT's. The forward of an adapted linear layer is

    y = x W^T + b + s * dropout(x) A^T B^T,    s = lora_alpha / r   (use_rslora: lora_alpha / sqrt(r))
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from lightning_lora.config.base import (
    AdapterConfig,
    by_pattern,
    check_alpha,
    check_dropout,
    check_names,
    check_rank,
    check_regex,
    check_table,
    is_number,
)
from lightning_lora.errors import ConfigError, UnsupportedError

_INITS = ("kaiming", "gaussian", "eva", "pissa", "olora", "loftq")


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
        init_lora_weights: Start of the factors. B is zero and A is "kaiming" (uniform, as PEFT's default), "gaussian"
            (standard deviation 1/r) or "eva" (the directions in which the layer's inputs vary most, over the first
            batches: `eva_start`). Or both are taken out of the base: "pissa" (its largest singular values; quicker,
            in N rounds: "pissa_niter_N"), "olora" (QR), "loftq" (so that the packed base and they are nearest to it).
        loftq_iter: Rounds of "loftq".
        eva_batches: Batches that the `LoRA` callback shows the layers for "eva".
        freeze_lora_A: Train B alone (LoRA-FA, Zhang et al. 2023): the layers' inputs are not kept for backward.
        target_parameters: Fused experts to adapt beside ``target_modules``: names of parameters of three dimensions,
            or their ends, such as ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``.
        trainable_token_indices: Ids of tokens whose rows of the input embedding are trained, ``[32000, 32001]``, or
            a table of them by name of an embedding or a head, ``{"embed_tokens": [32000], "lm_head": [32000]}``. A
            head that is tied to the embedding follows.
        loraplus_lr_ratio: LoRA+ (Hayou et al. 2024): the learning rate of B as a multiple of that of A, such
            as 16; null for the same rate. The `LoRA` callback sees to it in the optimizers of a run; without
            a Trainer `loraplus_param_groups` does.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: A method that is not built was asked for.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "kaiming"
    loftq_iter: int = 1
    eva_batches: int = 8
    freeze_lora_A: bool = False
    target_parameters: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
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
        check_names("target_parameters", self.target_parameters, list, None)
        _check_tokens(self.trainable_token_indices)
        super().__post_init__()
        for name, table in self.patterns().items():
            for key in table:
                check_regex(name, key)
        self._check_start()

    def _check_start(self) -> None:
        init = self.init_lora_weights
        if not isinstance(init, str) or (init not in _INITS and not re.fullmatch(r"pissa_niter_[0-9]+", init)):
            raise ConfigError(f"`init_lora_weights` must be one of {[*_INITS, 'pissa_niter_N']}, got {init!r}")
        for name in ("loftq_iter", "eva_batches"):
            check_rank(name, getattr(self, name))
        if not isinstance(self.freeze_lora_A, bool):
            raise ConfigError(f"`freeze_lora_A` must be true or false, got {self.freeze_lora_A!r}")
        if init == "loftq" and self.quantize == "none":
            raise ConfigError(
                '`init_lora_weights="loftq"` begins with what packing leaves out: give `quantize`, such as "nf4"; '
                'for a base that stays as it is use "pissa"'
            )
        if self.takes_from_base and self.use_dora:
            raise UnsupportedError(
                f"`use_dora=True` with `init_lora_weights={init!r}` is not built: its magnitudes are norms of the "
                "whole base; use one of the two"
            )
        if self.freeze_lora_A and self.use_dora:
            raise UnsupportedError(
                "`freeze_lora_A=True` with `use_dora=True` is not built: what it saves the gradients of the magnitudes "
                "would keep; use one of the two"
            )
        if self.freeze_lora_A and self.loraplus_lr_ratio is not None:
            raise ConfigError(
                "`loraplus_lr_ratio` parts the learning rates of A and B, and with `freeze_lora_A=True` A has none: "
                "leave the ratio out, and raise the learning rate"
            )

    @property
    def takes_from_base(self) -> bool:
        """Whether ``init_lora_weights`` leaves a residual of the base: PiSSA, OLoRA, LoftQ."""
        return self.init_lora_weights.startswith("pissa") or self.init_lora_weights in ("olora", "loftq")

    @property
    def free_fields(self) -> tuple[str, ...]:
        """See `AdapterConfig.free_fields`; a start that is taken from the base is what the base is without it."""
        free = ("lora_dropout", "compute_dtype", "loraplus_lr_ratio", "eva_batches")
        if self.init_lora_weights == "loftq":
            return free
        return (*free, "loftq_iter") if self.takes_from_base else (*free, "loftq_iter", "init_lora_weights")

    def converted(self) -> LoRAConfig:
        """What `save_adapter` makes of it: plain LoRA over the base as it is, the start's rank beside the adapter's.

        Itself where no start is taken from the base.
        """
        if not self.takes_from_base:
            return self
        more = math.sqrt(2.0) if self.use_rslora else 2.0
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=more * self.lora_alpha,
            rank_pattern=self.rank_pattern and {name: 2 * r for name, r in self.rank_pattern.items()},
            alpha_pattern=self.alpha_pattern and {name: more * alpha for name, alpha in self.alpha_pattern.items()},
            init_lora_weights="kaiming",
            loftq_iter=1,
            quantize="none",
        )

    @property
    def names_more(self) -> bool:
        """See `AdapterConfig.names_more`."""
        return bool(self.target_parameters or self.trainable_token_indices)

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


def _check_tokens(value: Any) -> None:
    tables = value if isinstance(value, dict) else {"": value}
    for name, ids in tables.items() if value is not None else ():
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids)
        if not isinstance(name, str) or not whole or not ids or len(set(ids)) < len(ids):
            raise ConfigError(
                "`trainable_token_indices` must be a list of different token ids of 0 or more, or a table of such "
                f'lists by name, {{"embed_tokens": [100, 101]}}, got {value!r}'
            )


def check_ratio(value: Any) -> None:
    """See that ``loraplus_lr_ratio`` is null or a factor.

    Raises:
        ConfigError: It is neither.
    """
    if value is not None and not (is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"`loraplus_lr_ratio` must be a positive number, such as 16, or null, got {value!r}")
