# SPDX-License-Identifier: Apache-2.0
"""`LoRAConv`: a frozen convolution with a low-rank update.

    y = W * x + b + s B * (A * D(x))        *: the convolution

    W (out, in / groups, k...), frozen      A (r, in, k...): stride, padding and dilation of W's
                                            B (out, r / groups, 1...): groups of W's

As in PEFT, A sees all channels however many groups W has: with groups the sum is no weight of W's shape, and is not
merged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.lowrank import LowRankModule, Site

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class LoRAConv(LowRankModule):
    """An `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` and the two convolutions beside it."""

    title = "LoRA on convolutions"

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, r: int, lora_alpha: float) -> None:
        if r % base_layer.groups:  # type: ignore[operator]
            raise UnsupportedError(
                f"a convolution of {base_layer.groups} groups needs a rank that they divide, got {r}: give it one in "
                "`rank_pattern`, or leave it out of `target_modules`"
            )
        super().__init__(base_layer, record, r, lora_alpha)

    @property
    def one_product(self) -> bool:
        """See `LowRankModule.one_product`: with groups there is one for each."""
        return bool(self.base_layer.groups == 1)

    @classmethod
    def check(cls, plain: nn.Module, record: AdapterRecord) -> None:
        """See `LowRankModule.check`."""
        super().check(plain, record)
        own = type(plain).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        if own or "forward" in vars(plain):
            raise UnsupportedError(
                f"{type(plain).__name__} is a convolution by class and computes in its own way: leave it out of "
                "`target_modules`, or train it in full by `modules_to_save`"
            )
        if plain.padding_mode != "zeros":
            raise UnsupportedError(
                f"a convolution with `padding_mode={plain.padding_mode!r}` is not built: PEFT pads the update's input "
                "with zeros, which its merge does not"
            )

    def sites_of(self, plain: nn.Module, r: int) -> tuple[Site, ...]:
        """See `LowRankModule.sites_of`."""
        return conv_sites(plain, r)

    def delta(self, site: Site, A: Tensor, B: Tensor) -> Tensor:
        """``B A`` over the channels, ``(out, in, k...)``."""
        return (B.flatten(1) @ A.flatten(1)).view(B.shape[0], *A.shape[1:])

    @property
    def unmergeable(self) -> str | None:  # type: ignore[override]
        """See `AdapterModule.unmergeable`."""
        if self.base_layer.groups == 1:
            return None
        return f"with {self.base_layer.groups} groups it mixes channels that the groups of the weight keep apart"

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in, length...)``, as the base layer takes it."""
        base: Any = self.base_layer
        y: Tensor = base(x)
        if not self.in_use:
            return y
        (site,) = self.sites
        A, B = (factor.to(y.dtype) for factor in self.factors(site))
        conv = _CONVOLUTIONS[base.weight.dim()]
        dropped = F.dropout(x.to(y.dtype), self.lora_dropout, self.training)
        u = conv(dropped, A, None, base.stride, base.padding, base.dilation)
        return y + conv(u, B, groups=base.groups).to(y.dtype) * self.factor(site)


def conv_sites(plain: nn.Module, r: int) -> tuple[Site, ...]:
    """The one of a convolution."""
    layer: Any = plain
    ones = (1,) * len(layer.kernel_size)
    A, B = (r, layer.in_channels, *layer.kernel_size), (layer.out_channels, r // layer.groups, *ones)
    return (Site("weight", "lora_A", "lora_B", A, B),)
