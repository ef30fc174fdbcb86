# SPDX-License-Identifier: Apache-2.0
"""`LowRankModule`: a frozen module some of whose parameters get a low-rank update each, other than `LoRALinear`.

    W' = W + s delta(A, B),    s = lora_alpha / r

What delta is, and whether W' is ever made, is the kind's own: embeddings, convolutions, attention, experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, LoRAConfig, scaling
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.adapter import Held, KeepsDType, torch_dtype
from lightning_lora.nn.parts import AdaptedParts


class Site(NamedTuple):
    """One parameter of the user's module and the two factors of its update.

    Args:
        parameter: Its name in the module: "weight", "in_proj_weight".
        A: Name of the first factor in `LowRankAdapter`.
        B: Name of the second.
        shape_A: Shape of the first.
        shape_B: Shape of the second.
        times: How many times the scaled update is added.
    """

    parameter: str
    A: str
    B: str
    shape_A: tuple[int, ...]
    shape_B: tuple[int, ...]
    times: int = 1


class LowRankAdapter(KeepsDType):
    """The factors of all sites: master weights, fp32 (or ``adapter_dtype``) whatever the model is cast to.

    Args:
        sites: What there is an update for.
        r: Rank; 0 in a vacant module.
        init: ``init_lora_weights``.
        device: Of the factors.
        dtype: Of the factors.
    """

    def __init__(self, sites: tuple[Site, ...], r: int, init: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.r, self.init = r, init
        self.names = tuple((site.A, site.B) for site in sites)
        for site in sites:
            for name, shape in ((site.A, site.shape_A), (site.B, site.shape_B)):
                self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `start` says: every update begins at exactly zero."""
        for A, B in self.names:
            if getattr(self, A).numel() > 0:  # else vacant: there is nothing to begin with
                self.start(getattr(self, A), getattr(self, B))

    def start(self, A: Tensor, B: Tensor) -> None:
        """A as ``init`` says, B zero."""
        if self.init == "gaussian":
            nn.init.normal_(A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return ", ".join(f"{name}={tuple(parameter.shape)}" for name, parameter in self.named_parameters())


class LowRankModule(AdaptedParts):
    """A frozen ``base_layer`` and what is trained beside it.

    Args:
        base_layer: The user's module; frozen by the caller.
        record: Shared by all modules of one `apply_lora`; its config gives dtype, dropout and start.
        r: Rank; 0 for a vacant module.
        lora_alpha: Numerator of the scale.

    Raises:
        UnsupportedError: The module computes something that the update is not built for.
    """

    adapter_kind: type[LowRankAdapter] = LowRankAdapter

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, record)
        config = cast(LoRAConfig, record.config)
        self.check(base_layer, record)
        self.r, self.lora_alpha = r, lora_alpha
        self.lora_dropout, self.use_rslora = config.lora_dropout, config.use_rslora
        self.sites = self.sites_of(base_layer, r)
        first = base_layer.get_parameter(self.sites[0].parameter)
        self.adapter = self.adapter_kind(
            self.sites, r, config.init_lora_weights, first.device, torch_dtype(config.adapter_dtype)
        )
        if r == 0:
            self.hold(None)

    @property
    def one_product(self) -> bool:
        """Whether an update is one product ``B A``, of the factors as matrices."""
        return True

    @classmethod
    def check(cls, plain: nn.Module, record: AdapterRecord) -> None:
        """See that the update is built for this module and configuration.

        Raises:
            UnsupportedError: It is not.
        """
        config = cast(LoRAConfig, record.config)
        if config.freeze_lora_A:
            raise UnsupportedError(
                f"`freeze_lora_A=True` is built for linear layers, and a {type(plain).__name__} is adapted too: leave "
                "it out, or train both factors"
            )
        init = config.init_lora_weights
        if init not in ("kaiming", "gaussian"):
            raise UnsupportedError(
                f"`init_lora_weights={init!r}` is built for linear layers, and a "
                f'{type(plain).__name__} is adapted too: start with "kaiming" or "gaussian", or leave it out'
            )

    def sites_of(self, plain: nn.Module, r: int) -> tuple[Site, ...]:
        """What there is an update for, and shapes of the factors.

        Args:
            plain: The user's module.
            r: Rank.
        """
        raise NotImplementedError

    def delta(self, site: Site, A: Tensor, B: Tensor) -> Tensor:
        """The update of a parameter without its scale, in the parameter's own layout; with gradient."""
        raise NotImplementedError

    def factors(self, site: Site) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B."""
        return getattr(self.adapter, site.A), getattr(self.adapter, site.B)

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, or ``lora_alpha / sqrt(r)``; `strength` not included."""
        return 0.0 if self.vacant else scaling(self.r, self.lora_alpha, self.use_rslora)

    def factor(self, site: Site) -> float:
        """What ``delta(A, B)`` is multiplied by: scaling and strength."""
        return self.scaling * self.strength * site.times

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """See `AdapterModule.successors`: the factors, in place of their parameter."""
        return {site.parameter: list(self.factors(site)) for site in self.sites}

    def watched(self) -> list[nn.Parameter]:
        """See `AdapterModule.watched`: of each pair the one that begins as zero."""
        return [self.factors(site)[1] for site in self.sites]

    def own_names(self) -> list[str]:
        """``adapter.`` and the name of each factor."""
        return [f"adapter.{name}" for site in self.sites for name in (site.A, site.B)]

    def held(self) -> Held | None:
        """See `AdapterModule.held`."""
        held = super().held()
        if held is None:
            return None
        return Held(held.tensors, self.strength, self.r, self.lora_alpha, self.use_rslora, self.lora_dropout)

    def hold(self, held: Held | None, in_place: bool = True) -> None:
        """See `AdapterModule.hold`; the rank may be another one."""
        words = held or Held({})
        self.r, self.lora_alpha, self.use_rslora = words.r, words.lora_alpha, words.use_rslora
        self.lora_dropout = words.lora_dropout
        super().hold(held, in_place)

    def _nothing(self) -> dict[str, Tensor]:
        found = {}
        for site in self.sites_of(self.base_layer, 0):
            A, B = self.factors(site)
            found[f"adapter.{site.A}"], found[f"adapter.{site.B}"] = (
                A.new_empty(site.shape_A),
                B.new_empty(site.shape_B),
            )
        return found

    def untrained(self) -> bool:
        """Whether every update is exactly zero."""
        return all(any(not bool(factor.detach().any()) for factor in self.factors(site)) for site in self.sites)

    def updated(self, site: Site) -> Tensor:
        """``W + strength scaling delta(A, B)`` in the base's dtype, summed in fp32 at least; with gradient."""
        weight = self.base_layer.get_parameter(site.parameter)
        wide = torch.promote_types(weight.dtype, torch.float32)
        A, B = (factor.to(wide) for factor in self.factors(site))
        scaled = self.delta(site, A, B) * self.factor(site)
        return (weight.to(wide) + scaled).to(weight.dtype)

    def merged_names(self) -> list[str]:
        """See `AdaptedParts.merged_names`."""
        return [site.parameter for site in self.sites]

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `AdaptedParts.merged`."""
        found = {}
        for site in self.sites:
            weight = self.base_layer.get_parameter(site.parameter)
            wide = torch.promote_types(dtype or weight.dtype, torch.float32)
            own = weight.detach().to(dtype or weight.dtype)
            found[site.parameter] = own
            if self.in_use:
                A, B = (factor.to(wide) for factor in self.factors(site))
                total = weight.to(wide) + self.delta(site, A, B) * self.factor(site)
                found[site.parameter] = total.to(own.dtype)
        return found

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:.4g}"
