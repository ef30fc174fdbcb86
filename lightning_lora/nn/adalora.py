# SPDX-License-Identifier: Apache-2.0
r"""`AdaLoRALinear`: a frozen linear layer with an update in the form of a singular value decomposition.

Zhang et al. 2023, with PEFT's names and numbers; the vectors of A and B are kept near orthonormal by a term of their
own (`lightning_lora.model.orthogonality`)::

    y = x W^T + b + s D(x) (E A)^T B^T        A: (r, in)   E: (r, 1)   B: (out, r)
    s = strength lora_alpha / (r + 1e-5)      r: the rank at the start, however many values of E are zero

E begins at zero, so that the layer is its base, and A and B with a standard deviation of 0.02.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.nn.adapted import AdaptedLinear, LowRank
from lightning_lora.nn.adapter import KeepsDType, torch_dtype
from lightning_lora.nn.functional import add_lora, lora_linear
from lightning_lora.nn.layers import device_of
from lightning_lora.nn.quantized import output_dtype

#: Standard deviation of A and B at the start.
START = 0.02
_EPS = 1e-5  # PEFT's, beside the rank


class Triplets(NamedTuple):
    """One layer's update ``B diag(E) A``.

    Args:
        A: ``(r, in)``.
        E: ``(r, 1)``.
        B: ``(out, r)``.
    """

    A: Tensor
    E: Tensor
    B: Tensor


class AdaLoRAAdapter(KeepsDType):
    """The triplets, master weights as `LoRAAdapter`'s factors are."""

    def __init__(self, in_features: int, out_features: int, r: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_E = nn.Parameter(torch.empty(r, 1, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The update starts at exactly zero."""
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_A, std=START)
        nn.init.normal_(self.lora_B, std=START)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"A={tuple(self.lora_A.shape)}, B={tuple(self.lora_B.shape)}, {self.lora_A.dtype}"


class AdaLoRALinear(AdaptedLinear):
    """A frozen ``base_layer`` and an update of which single ranks can be switched off.

    Args:
        base_layer: See `AdaptedLinear`.
        record: Shared by all modules of one conversion; its config gives dtype and dropout.
        r: Rank at the start.
        lora_alpha: Numerator of the scale.
    """

    title = "AdaLoRA"

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, record)
        config = record.config
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, config.dropout
        self.adapter: AdaLoRAAdapter = AdaLoRAAdapter(
            self.in_features, self.out_features, r, device_of(base_layer), torch_dtype(config.adapter_dtype)
        )

    @property
    def scaling(self) -> float:
        """``lora_alpha / (r + 1e-5)``; `strength` not included."""
        return self.lora_alpha / (self.r + _EPS)

    @property
    def triplets(self) -> Triplets:
        """The live parameters."""
        return Triplets(self.adapter.lora_A, self.adapter.lora_E, self.adapter.lora_B)

    def watched(self) -> list[nn.Parameter]:
        """E: while it is zero, the gradients of A and B are too."""
        return [self.adapter.lora_E]

    def low_rank(self) -> LowRank:
        """See `AdaptedLayer.low_rank`: of the ranks whose values are not zero, or of one where all are."""
        A, E, B = (tensor.detach() for tensor in self.triplets)
        kept = E.view(-1) != 0
        kept[0] |= ~kept.any()
        return LowRank(A[kept] * E[kept], B[:, kept], self.scaling * self.strength)

    def untrained(self) -> bool:
        """Whether E is exactly zero."""
        return not bool(self.adapter.lora_E.detach().any())

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `AdaptedLayer.delta_weight`: ``strength * scaling * B diag(E) A``."""
        A, E, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in self.triplets)
        delta = (B @ (A * E)).mul_(self.scaling * self.strength)
        return (delta.t() if self.fan_in_fan_out else delta).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in)``; the output ``(..., out)`` has the dtype that the base layer would give it."""
        base: Any = self.base_layer
        if not self.in_use:
            return base(x)
        A, E, B = self.triplets
        scale, dropout = self.scaling * self.strength, self.lora_dropout if self.training else 0.0
        form = self.frozen_form(x)
        if form is None:
            y = base(x)
            return add_lora(y, x.to(y.dtype), A * E, B, scale, dropout)
        dtype, weight = form
        use = 0 if torch.compiler.is_compiling() else self.record.use
        return lora_linear(x.to(dtype), weight, base.bias, A * E, B, scale, dropout, use).to(output_dtype(x))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:.4g}"
