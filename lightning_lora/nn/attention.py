# SPDX-License-Identifier: Apache-2.0
"""`LoRAMultiheadAttention`: torch's attention with low-rank updates of its packed input and its output projection.

    in_proj_weight' = W (3 dim, dim) + s B A        A: r x dim    B: 3 dim x r
    out_proj.weight' = W (dim, dim) + 2 s B A       A: r x dim    B: dim x r

The 2 is PEFT's: up to 0.21 it adds the update of the output projection twice, in forward and in merges, and a file
means here what it means there.

The module computes with the two sums in place of its parameters, since it reads them and calls no linear layers: a
matrix of each one's size is made at every forward, and a dropout inside the update has no place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.lowrank import LowRankModule, Site


class LoRAMultiheadAttention(LowRankModule):
    """An `nn.MultiheadAttention` whose query, key and value are of one width."""

    title = "LoRA on nn.MultiheadAttention"

    @classmethod
    def check(cls, plain: nn.Module, record: AdapterRecord) -> None:
        """See `LowRankModule.check`."""
        super().check(plain, record)
        if type(plain).forward is not nn.MultiheadAttention.forward or "forward" in vars(plain):
            raise UnsupportedError(
                f"{type(plain).__name__} is nn.MultiheadAttention by class and computes in its own way: leave it out "
                "of `target_modules`, or train it in full by `modules_to_save`"
            )
        if not plain._qkv_same_embed_dim:
            raise UnsupportedError(
                "an nn.MultiheadAttention with `kdim` or `vdim` keeps three weights of its own, for which no update is "
                "built (PEFT has none either): leave it out of `target_modules`"
            )
        if record.config.dropout > 0:
            raise UnsupportedError(
                "an nn.MultiheadAttention reads its weights and has no input of an update to drop from: set "
                "`lora_dropout=0`"
            )

    def sites_of(self, plain: nn.Module, r: int) -> tuple[Site, ...]:
        """See `LowRankModule.sites_of`."""
        return attention_sites(plain, r)

    def delta(self, site: Site, A: Tensor, B: Tensor) -> Tensor:
        """``B A``."""
        return B @ A

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Whatever `nn.MultiheadAttention` takes and gives."""
        if not self.in_use:
            return self.base_layer(query, *args, **kwargs)
        weights = {site.parameter: self.updated(site) for site in self.sites}
        return functional_call(self.base_layer, weights, (query, *args), kwargs)


def attention_sites(plain: nn.Module, r: int) -> tuple[Site, ...]:
    """Those of a `nn.MultiheadAttention`."""
    dim: int = plain.embed_dim  # type: ignore[assignment]
    return (
        Site("in_proj_weight", "lora_A", "lora_B", (r, dim), (3 * dim, r)),
        Site("out_proj.weight", "out_proj_lora_A", "out_proj_lora_B", (r, dim), (dim, r), times=2),
    )
