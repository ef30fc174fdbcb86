# SPDX-License-Identifier: Apache-2.0
"""`METHODS`: by configuration, which modules of a model are adapted and what is put in their places.

Conversion (`apply`), other adapters beside the first (`residents`) and loading go by this table; who adds a method adds
its row here, its configuration in `config`, and the row of what it keeps in files in `io.kinds`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lightning_lora.config import (
    AdaLoRAConfig,
    AdapterConfig,
    AdapterRecord,
    BottleneckConfig,
    FullTuningConfig,
    IA3Config,
    LoRAConfig,
    NormTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeRAConfig,
    scaling,
)
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError
from lightning_lora.model.blocks import bottleneck_targets
from lightning_lora.model.decoder import decoder_targets
from lightning_lora.model.lora_targets import is_other_layer, lora_targets, other_kind
from lightning_lora.model.norms import is_norm, norm_targets
from lightning_lora.model.stack import check_stack, read_stack, stacked
from lightning_lora.model.targets import Build, Targets, adaptable_suffixes, find_targets, is_adaptable
from lightning_lora.model.whole import whole_targets
from lightning_lora.nn.adalora import AdaLoRALinear
from lightning_lora.nn.adapter import AdapterModule, torch_dtype
from lightning_lora.nn.dora import DoRALinear
from lightning_lora.nn.ia3 import IA3Linear
from lightning_lora.nn.layers import widest
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.prefix import PrefixedDecoder
from lightning_lora.nn.prompt import PromptedDecoder
from lightning_lora.nn.residual import ResidualLoRALinear, residual_base
from lightning_lora.nn.tuned import TunedModule, TunedNorm, tie_copies
from lightning_lora.nn.vera import Projections, VeRALinear

#: (module that is replaced, record, the module's names, where to compute) -> what stands in its place, or None.
First = Callable[[nn.Module, AdapterRecord, tuple[str, ...], torch.device | str | None], AdapterModule | None]


@dataclass(frozen=True)
class Method:
    """How one method converts a model.

    Args:
        build: Makes the module that stands in the place of one of the user's. Its configuration is the record's.
        beside: Whether several of its adapters may share a model.
        targets: Chooses modules; linears, as ``target_modules`` says, if not given.
        first: Makes the module from the user's own, before that is packed, and packs it itself; None to leave it.
        share: Makes what the modules have in common, from those that are chosen; it is kept as the record's ``shared``.
        fits: Whether a module is one that it can stand on, where names in a folder choose them.
        in_full: Whether it trains copies of what it chooses.
        finish: Done to the model once all modules stand in their places.
    """

    build: Build
    beside: bool = False
    targets: Callable[[nn.Module, Any], Targets] = find_targets
    first: First = lambda layer, record, names, device: None
    share: Callable[[Any, list[nn.Module]], Any] | None = None
    fits: Callable[[nn.Module], bool] = is_adaptable
    in_full: bool = False
    finish: Callable[[nn.Module], None] = lambda model: None


def _lora(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> AdapterModule:
    config = record.config
    kind = other_kind(layer) or linear_kind(config)
    return kind(layer, record, config.rank_for(*names), config.alpha_for(*names))


def _fits_lora(module: nn.Module) -> bool:
    return is_adaptable(module) or is_other_layer(module)


def _from_base(
    layer: nn.Module, record: AdapterRecord, names: tuple[str, ...], device: torch.device | str | None
) -> AdapterModule | None:
    """Of a start that is taken out of the base."""
    config = cast(LoRAConfig, record.config)
    if not config.takes_from_base or other_kind(layer) is not None:  # which says that it is not built for this
        return None
    r, alpha = config.rank_for(*names), config.alpha_for(*names)
    try:
        left, start = residual_base(layer, config, r, scaling(r, alpha, config.use_rslora), device)
    except (ConfigError, UnsupportedError) as error:
        raise type(error)(f"{names[0]!r}: {error}") from error
    return ResidualLoRALinear(left, record, r, alpha, start)


def _ia3(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> AdapterModule:
    return IA3Linear(layer, record, cast(IA3Config, record.config).is_feedforward(*names))


def _ia3_targets(model: nn.Module, config: IA3Config) -> Targets:
    """Those of "auto" are the names that lead to a linear layer here."""
    if config.suffixes is None:
        return find_targets(model, config)
    found = adaptable_suffixes(model, config.suffixes)
    if not found:
        raise TargetError(
            '`target_modules="auto"` knows no layer of this model by name: name its keys, values and feed-forwards in '
            "`target_modules`, and of these the feed-forwards in `feedforward_modules`"
        )
    return find_targets(model, dataclasses.replace(config, target_modules=found, feedforward_modules=None))


def _adalora(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> AdapterModule:
    return AdaLoRALinear(layer, record, record.config.rank_for(*names), record.config.alpha_for(*names))


def _vera(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> AdapterModule:
    return VeRALinear(layer, record, record.shared)


def _projections(config: VeRAConfig, layers: list[nn.Module]) -> Projections:
    return Projections(config.r, *widest(layers), config.projection_prng_key, torch_dtype(config.adapter_dtype))


def _tie(model: nn.Module) -> None:
    tie_copies([module for module in model.modules() if isinstance(module, TunedModule)])


METHODS: dict[type[AdapterConfig], Method] = {
    LoRAConfig: Method(_lora, beside=True, targets=lora_targets, first=_from_base, fits=_fits_lora),
    IA3Config: Method(_ia3, targets=_ia3_targets),
    AdaLoRAConfig: Method(_adalora),
    VeRAConfig: Method(_vera, share=_projections),
    PromptTuningConfig: Method(lambda layer, record, _: PromptedDecoder(layer, record), targets=decoder_targets),
    PrefixTuningConfig: Method(lambda layer, record, _: PrefixedDecoder(layer, record), targets=decoder_targets),
    BottleneckConfig: Method(stacked, targets=bottleneck_targets, share=read_stack, finish=check_stack),
    NormTuningConfig: Method(
        lambda layer, record, _: TunedNorm(layer, record), targets=norm_targets, fits=is_norm, in_full=True
    ),
    FullTuningConfig: Method(
        lambda layer, record, _: TunedModule(layer, record), targets=whole_targets, in_full=True, finish=_tie
    ),
}


def method_of(config: AdapterConfig) -> Method:
    """The row of a configuration."""
    return METHODS[type(config)]


def linear_kind(config: AdapterConfig) -> type[LoRALinear]:
    """What a configuration of LoRA puts in the place of a linear layer."""
    return DoRALinear if is_dora(config) else LoRALinear


def kind_name(config: AdapterConfig) -> str:
    """What a configuration puts into linears, in a text; those of one name may share a model."""
    if not isinstance(config, LoRAConfig):
        return config.title
    return "DoRA" if config.use_dora else "plain LoRA"


def stands_alone(config: AdapterConfig) -> bool:
    """Whether an adapter of this configuration cannot share a model with others."""
    return not method_of(config).beside


def is_dora(config: AdapterConfig) -> bool:
    """Whether a configuration is DoRA's."""
    return isinstance(config, LoRAConfig) and config.use_dora
