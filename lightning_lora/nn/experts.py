# SPDX-License-Identifier: Apache-2.0
"""`LoRAExperts`: a mixture's fused experts with a low-rank update for each expert.

    W'[e] = W[e] + s B[e] A[e]        W: experts x out x in, one frozen parameter (transposed in some mixtures)

    A of all experts lies in one matrix (experts * r, in), expert by expert, and B in one (out, r * experts), the
    experts innermost, as PEFT has them.

The module reads its parameters in its own way (a loop, a grouped product), so it computes with W' in their place: a
tensor of each one's size is made at every forward, and a dropout inside the update has no place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.lowrank import LowRankModule, Site


class LoRAExperts(LowRankModule):
    """A module with fused experts' parameters.

    Args:
        base_layer: The user's module; frozen by the caller.
        record: Shared by all modules of one `apply_lora`.
        r: Rank of each expert's update; 0 for a vacant module.
        lora_alpha: Numerator of the scale.
        parameters: Names of the module's parameters that are adapted.
    """

    title = "LoRA on fused experts (`target_parameters`)"

    def __init__(
        self, base_layer: nn.Module, record: AdapterRecord, r: int, lora_alpha: float, parameters: tuple[str, ...]
    ) -> None:
        self.__dict__["parameters_adapted"] = parameters  # `sites_of` reads it while the base class is set up
        super().__init__(base_layer, record, r, lora_alpha)

    @property
    def one_product(self) -> bool:
        """See `LowRankModule.one_product`: there is one for each expert."""
        return False

    @classmethod
    def check(cls, plain: nn.Module, record: AdapterRecord) -> None:
        """See `LowRankModule.check`."""
        super().check(plain, record)
        if record.config.dropout > 0:
            raise UnsupportedError(
                "fused experts compute with their whole weights and have no input of an update to drop from: set "
                "`lora_dropout=0`"
            )

    def sites_of(self, plain: nn.Module, r: int) -> tuple[Site, ...]:
        """See `LowRankModule.sites_of`."""
        return expert_sites(plain, r, self.parameters_adapted)

    def expert_factors(self, site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The factors expert by expert: A ``(experts, r, in)`` and B ``(experts, out, r)``."""
        count = self.base_layer.get_parameter(site.parameter).shape[0]
        return A.reshape(count, -1, A.shape[1]), B.reshape(B.shape[0], -1, count).permute(2, 0, 1)

    def delta(self, site: Site, A: Tensor, B: Tensor) -> Tensor:
        """``B[e] A[e]``, or its transpose where the parameter is ``(experts, in, out)``."""
        own_A, own_B = self.expert_factors(site, A, B)
        return (own_B @ own_A).mT if is_transposed(self.base_layer) else own_B @ own_A

    def updated(self, site: Site) -> Tensor:
        """See `LowRankModule.updated`; one tensor of the parameter's size and no more."""
        weight = self.base_layer.get_parameter(site.parameter)
        A, B = self.expert_factors(site, *(factor.to(weight.dtype) for factor in self.factors(site)))
        first, second = (A.mT, B.mT) if is_transposed(self.base_layer) else (B, A)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, first, second, alpha=self.factor(site))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the user's module takes and gives."""
        if not self.in_use:
            return self.base_layer(*args, **kwargs)
        return functional_call(
            self.base_layer, {site.parameter: self.updated(site) for site in self.sites}, args, kwargs
        )


def expert_sites(plain: nn.Module, r: int, parameters: tuple[str, ...]) -> tuple[Site, ...]:
    """Those of fused experts, in the order of the module's parameters; PEFT nests them, the last one outermost."""
    own = [name for name, _ in plain.named_parameters(recurse=False) if name in parameters]
    found = []
    for depth, name in enumerate(reversed(own)):
        weight = plain.get_parameter(name)
        if weight.dim() != 3:
            raise UnsupportedError(
                f"`target_parameters` is for fused experts, parameters of three dimensions, and {name!r} has "
                f"{weight.dim()}: name the layer itself in `target_modules`"
            )
        count, out, inn = weight.shape
        if is_transposed(plain):
            out, inn = inn, out
        inner = f"inner{depth}_" if depth else ""
        found.append(Site(name, f"{inner}lora_A", f"{inner}lora_B", (count * r, inn), (out, r * count)))
    return tuple(reversed(found))


def is_transposed(plain: nn.Module) -> bool:
    """Whether experts' parameters are ``(experts, in, out)``."""
    return bool(getattr(plain, "is_transposed", False))
