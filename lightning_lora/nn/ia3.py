# SPDX-License-Identifier: Apache-2.0
"""`IA3Linear`: a frozen linear layer whose outputs or inputs are rescaled one by one (Liu et al. 2022, IA3).

::

    keys, values     y = l * (x W^T + b)      l (out, 1)     merged: W' = l * W,  b' = l * b
    feed-forwards    y = (l * x) W^T + b      l (1, in)      merged: W' = W * l

``l`` begins as ones. A strength of lambda uses ``1 + lambda (l - 1)``; 0 is the base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.nn.adapted import AdaptedLinear
from lightning_lora.nn.adapter import KeepsDType, torch_dtype
from lightning_lora.nn.layers import device_of

NAME = "adapter.ia3_l"


class IA3Adapter(KeepsDType):
    """The one vector; master weights, fp32 (or ``adapter_dtype``) whatever the model is cast to."""

    def __init__(self, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Ones: nothing is rescaled."""
        nn.init.ones_(self.ia3_l)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"l={tuple(self.ia3_l.shape)}, {self.ia3_l.dtype}"


class IA3Linear(AdaptedLinear):
    """A frozen ``base_layer`` and the vector that its outputs, or its inputs, are multiplied by.

    Args:
        base_layer: See `AdaptedLinear`.
        record: See `AdaptedLinear`; its config gives the dtype.
        feedforward: Whether inputs are rescaled.
    """

    title = "IA3"

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, feedforward: bool) -> None:
        super().__init__(base_layer, record)
        self.feedforward = feedforward
        shape = (1, self.in_features) if feedforward else (self.out_features, 1)
        self.adapter = IA3Adapter(shape, device_of(base_layer), torch_dtype(record.config.adapter_dtype))

    @property
    def ia3_l(self) -> nn.Parameter:
        """``(out, 1)``; ``(1, in)`` of a feed-forward."""
        return self.adapter.ia3_l

    def untrained(self) -> bool:
        """Whether every factor is exactly one."""
        return bool((self.ia3_l.detach() == 1).all())

    def factors(self, dtype: torch.dtype) -> Tensor:
        """``1 + strength (l - 1)``, in the shape of ``l``, with gradient."""
        factors = self.ia3_l if self.strength == 1.0 else 1 + self.strength * (self.ia3_l - 1)
        return factors.to(dtype)

    @torch.no_grad()
    def merged_weight(self, dtype: torch.dtype) -> Tensor:
        """See `AdaptedLayer.merged_weight`."""
        weight = self.base_weight(dtype)
        if not self.in_use:
            return weight
        factors = self.factors(dtype)
        return weight * (factors.t() if self.fan_in_fan_out else factors)

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `AdaptedLayer.delta_weight`."""
        wide = torch.promote_types(dtype, torch.float32)
        return self.merged_weight(wide).sub_(self.base_weight(wide)).to(dtype)

    @torch.no_grad()
    def merged_bias(self) -> Tensor | None:
        """See `AdaptedLayer.merged_bias`: rescaled with the outputs."""
        bias = self.bias
        if bias is None or self.feedforward or not self.in_use:
            return bias
        wide = torch.promote_types(bias.dtype, torch.float32)
        return (bias.to(wide) * self.factors(wide).flatten()).to(bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in)``; the output ``(..., out)`` has the dtype that the base layer would give it."""
        if not self.in_use:
            return self.base_layer(x)
        if self.feedforward:
            return self.base_layer(x * self.factors(x.dtype).flatten())
        y = self.base_layer(x)
        return y * self.factors(y.dtype).flatten()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return "inputs rescaled" if self.feedforward else "outputs rescaled"
