# SPDX-License-Identifier: Apache-2.0
"""`VeRAConfig`: vectors are trained between random matrices that all layers share (Kopiczko et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_lora.config.base import AdapterConfig, check_alpha, check_dropout, check_rank
from lightning_lora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Which linears get vectors, and what they stand between. The words and their meanings are PEFT's.

    Args:
        r: Rank of the shared matrices. What is trained is small: take it far larger than LoRA's.
        d_initial: Where every ``vera_lambda_d`` begins; ``vera_lambda_b`` begins at zero.
        projection_prng_key: Seed of the shared matrices, those that PEFT makes of it.
        save_projection: Whether folders and checkpoints hold the shared matrices, ``4 r (in + out)`` bytes once, in and
            out being the largest that are adapted. If not, they are made again of the seed.
        vera_dropout: Share of the adapter's input that is dropped in training, in [0, 1).

    Raises:
        ConfigError: An argument is out of its range.
    """

    method: ClassVar[str] = "vera"
    title: ClassVar[str] = "VeRA"
    free_fields: ClassVar[tuple[str, ...]] = ("vera_dropout", "d_initial", "compute_dtype")

    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_rank("r", self.r)
        check_alpha("d_initial", self.d_initial)
        key = self.projection_prng_key
        if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < 2**63:
            raise ConfigError(f"`projection_prng_key` must be an integer of 0 or more, got {key!r}")
        if not isinstance(self.save_projection, bool):
            raise ConfigError(f"`save_projection` must be true or false, got {self.save_projection!r}")
        check_dropout("vera_dropout", self.vera_dropout)
        super().__post_init__()

    @property
    def dropout(self) -> float:
        """See `AdapterConfig.dropout`."""
        return self.vera_dropout

    def rank_for(self, *names: str) -> int:
        """See `AdapterConfig.rank_for`: that of the shared matrices."""
        return self.r
