# SPDX-License-Identifier: Apache-2.0
"""`PrefixTuningConfig`: keys and values before those of the input (Li & Liang 2021); words as in PEFT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from lightning_lora.config.base import AdapterConfig, check_rank, refuse_fields
from lightning_lora.config.prompt import CHOOSING
from lightning_lora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(AdapterConfig):
    """How many virtual keys and values each attention of a causal model sees, and how they are trained.

    Args:
        num_virtual_tokens: How many, in every layer.
        prefix_projection: Make them by an MLP of smaller embeddings, which the paper found to train more stably;
            folders hold what it gives.
        encoder_hidden_size: Inner width of the MLP; the width of a layer's keys if null.
        init_weights: "zero" to begin with zeros; normal if null.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in.
        adapter_dtype: Dtype of the master parameters.

    Raises:
        ConfigError: An argument is out of its range, or of no use to the method.
    """

    method: ClassVar[str] = "prefix_tuning"
    title: ClassVar[str] = "prefix tuning"
    mergeable: ClassVar[bool] = False
    free_fields: ClassVar[tuple[str, ...]] = ("compute_dtype", "init_weights")

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_fields(self, CHOOSING, "it stands at the decoder as a whole")
        check_rank("num_virtual_tokens", self.num_virtual_tokens)
        if not isinstance(self.prefix_projection, bool):
            raise ConfigError(f"`prefix_projection` must be true or false, got {self.prefix_projection!r}")
        if self.encoder_hidden_size is not None:
            check_rank("encoder_hidden_size", self.encoder_hidden_size)
            if not self.prefix_projection:
                raise ConfigError("`encoder_hidden_size` is of use with `prefix_projection=True` alone: leave it out")
        if self.init_weights not in (None, "zero"):
            raise ConfigError(f'`init_weights` must be "zero" or null, got {self.init_weights!r}')

    def stored(self) -> Self:
        """See `AdapterConfig.stored`: a folder holds what the MLP gives."""
        return dataclasses.replace(self, prefix_projection=False, encoder_hidden_size=None, init_weights=None)
