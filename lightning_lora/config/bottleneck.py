# SPDX-License-Identifier: Apache-2.0
"""`BottleneckConfig`: small networks after sublayers (Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lightning_lora.config.base import AdapterConfig, check_alpha, check_choice, check_names, check_rank
from lightning_lora.errors import ConfigError

Placement = Literal["houlsby", "pfeiffer"]
BottleneckMode = Literal["sequential", "parallel"]
NonLinearity = Literal["relu", "gelu", "silu", "tanh", "identity"]


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Which sublayers get a bottleneck adapter, and of what size.

    Args:
        placement: "houlsby": after attention and after feed-forward sublayers; "pfeiffer": after feed-forward alone.
        mode: Whether the adapter reads the sublayer's output ("sequential") or its input ("parallel").
        reduction_factor: Width of the hidden states over the size of the bottleneck.
        bottleneck_size: The size itself, instead of `reduction_factor`.
        non_linearity: Between down and up: "relu", "gelu", "silu", "tanh", "identity".
        scaling: Factor of what is added.
        stack: Folders of earlier bottleneck adapters that stay frozen below this one, the lowest first.
        target_modules: "blocks": the sublayers of transformer blocks that `placement` names, found by structure;
            else name suffixes, or a regular expression, of modules that give hidden states, whatever the placement.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all if null.
        layers_pattern: Name of the block list that ``layers_to_transform`` counts.
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in.
        adapter_dtype: Dtype of the master adapters.

    Raises:
        ConfigError: An argument is out of its range.
    """

    method: ClassVar[str] = "bottleneck"
    title: ClassVar[str] = "Bottleneck"
    mergeable: ClassVar[bool] = False
    use_fields: ClassVar[tuple[str, ...]] = ("mode", "non_linearity", "scaling")

    placement: Placement = "pfeiffer"
    mode: BottleneckMode = "sequential"
    reduction_factor: float = 16.0
    bottleneck_size: int | None = None
    non_linearity: NonLinearity = "relu"
    scaling: float = 1.0
    stack: list[str] | None = None
    target_modules: str | list[str] = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("placement", self.placement, Placement)
        check_choice("mode", self.mode, BottleneckMode)
        check_choice("non_linearity", self.non_linearity, NonLinearity)
        check_alpha("reduction_factor", self.reduction_factor)
        check_alpha("scaling", self.scaling)
        if self.bottleneck_size is not None:
            check_rank("bottleneck_size", self.bottleneck_size)
        check_names("stack", self.stack, list, None)
        if self.target_modules == "all-linear":
            raise ConfigError(
                '`target_modules="all-linear"` is for methods on linears: use "blocks", or name modules that give '
                "hidden states"
            )

    def size_for(self, width: int) -> int:
        """The size of the bottleneck over hidden states of a width: at least 1."""
        return self.bottleneck_size or max(1, int(width / self.reduction_factor))
