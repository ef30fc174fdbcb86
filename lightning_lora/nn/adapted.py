# SPDX-License-Identifier: Apache-2.0
"""`AdaptedLayer`: a user's layer with one weight, and what an adapter makes of it; the seam of methods on layers.

::

    y = f(x, W', b')      W', b': what `merged_weight` and `merged_bias` give; W and b where the adapter is off

A method says in `forward` how it computes that without making W', and in `merged_weight` what W' is. What it trains
lies in a submodule ``adapter`` of its own, so that sharding, checkpoints and casts treat it apart from the base.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.functional import WeightOf
from lightning_lora.nn.layers import is_conv1d, is_transparent, linear_shape
from lightning_lora.nn.quantized import PackedLinear, compute_dtype, is_autocast, output_dtype


class LowRank(NamedTuple):
    """An update ``factor * B A``.

    Args:
        A: ``(r, in)``.
        B: ``(out, r)``.
        factor: What the product is multiplied by, strength and all.
    """

    A: Tensor
    B: Tensor
    factor: float


class AdaptedLayer(AdapterModule):
    """A frozen ``base_layer`` and an adapter of it. Subclasses set ``adapter`` and say what is computed.

    Args:
        base_layer: The user's layer, or a `PackedLinear`; frozen by the caller.
        record: Shared by all modules of one conversion.
    """

    adapter: Any
    fan_in_fan_out = False

    def __init__(self, base_layer: nn.Module, record: AdapterRecord) -> None:
        super().__init__(record)
        self.base_layer = base_layer

    @property
    def weight(self) -> Tensor:
        """The frozen weight, for code that looks at it (its dtype, say); without the update."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def replaced(self) -> nn.Module:
        """See `AdapterModule.replaced`: the base layer."""
        return self.base_layer

    @property
    def added(self) -> nn.Module:
        """See `AdapterModule.added`: what is trained."""
        return self.adapter

    @property
    def in_use(self) -> bool:
        """Whether `forward` gives something else than the base layer's output."""
        return self.enabled and not self.vacant and self.strength != 0.0

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """See `AdapterModule.successors`: all that is trained, in place of the weight."""
        return {"weight": list(self.adapter.parameters())}

    def watched(self) -> list[nn.Parameter]:
        """See `AdapterModule.watched`: all that is trained."""
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    def own_names(self) -> list[str]:
        """The parameters of ``adapter``."""
        return [f"adapter.{name}" for name, _ in self.adapter.named_parameters()]

    def low_rank(self) -> LowRank | None:
        """The update that is in use, of a method whose updates are of low rank; None of another."""
        return None

    def base_output(self, x: Tensor) -> Tensor:
        """What `forward` gives without an adapter."""
        return self.base_layer(x)

    def base_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense (dequantized) frozen weight in the base layer's own layout, without gradient."""
        if isinstance(self.base_layer, PackedLinear):
            packed = self.base_layer.packed
            return packed.dequantize(dtype or packed.source_dtype)
        weight = self.weight.detach()
        return weight if dtype is None else weight.to(dtype)

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``W' - W`` in the base layer's own layout, at the strength in use; computed in fp32 at least."""
        raise NotImplementedError

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """W': the dense weight that the module computes with, switched off or not, in the base layer's own layout."""
        if not self.in_use:
            return self.base_weight(dtype)
        return self.base_weight(dtype) + self.delta_weight(dtype)

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """b': the bias that the module computes with; the base's own object where no adapter changes it."""
        return self.bias


class AdaptedLinear(AdaptedLayer):
    """An `AdaptedLayer` over `torch.nn.Linear`, transformers' ``Conv1D`` or a `PackedLinear`.

    Args:
        base_layer: The layer.
        record: See `AdaptedLayer`.
    """

    def __init__(self, base_layer: nn.Module, record: AdapterRecord) -> None:
        super().__init__(base_layer, record)
        self.fan_in_fan_out = bool(is_conv1d(base_layer) or getattr(base_layer, "fan_in_fan_out", False))
        self.in_features, self.out_features = linear_shape(base_layer)

    def dense_matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight of a dense base as ``(out, in)``."""
        weight = self.weight.to(dtype)
        return weight.t() if self.fan_in_fan_out else weight

    def frozen_form(self, x: Tensor) -> tuple[torch.dtype, WeightOf] | None:
        """In which dtype, and from which ``(out, in)`` weight, the base may be computed here for an input.

        None where its own forward must run: it computes in its own way or carries hooks, or torch refuses the dtypes.
        """
        base = self.base_layer
        if isinstance(base, PackedLinear):
            return compute_dtype(x, base.compute_dtype), base.matrix
        if is_transparent(base) and (self.weight.dtype == x.dtype or is_autocast(x)):
            return output_dtype(x), self.dense_matrix
        return None
