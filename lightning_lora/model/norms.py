# SPDX-License-Identifier: Apache-2.0
"""`norm_targets`: the norms of a model that layer-norm tuning trains."""

from __future__ import annotations

from torch import nn

from lightning_lora.config import NormTuningConfig
from lightning_lora.errors import TargetError
from lightning_lora.model.inner import inner_model
from lightning_lora.model.targets import Targets, in_layers, matches, nearest, packed_linears, saved_modules, under


def norm_targets(model: nn.Module, config: NormTuningConfig) -> Targets:
    """Choose norms as ``config`` says.

    Raises:
        TargetError: An entry matches nothing, or something that is no norm.
    """
    prefix = inner_model(model)[0]
    saved = saved_modules(model, config, prefix)
    norms = {name: m for name, m in model.named_modules() if name and is_norm(m) and not under(name, saved)}
    spec = config.target_modules
    if spec == "all-norms":
        chosen = list(norms)
    else:
        chosen = [name for name in norms if matches(spec, name, prefix)]
        _check_entries(model, spec, prefix, norms)
    if config.exclude_modules is not None:
        chosen = [name for name in chosen if not matches(config.exclude_modules, name, prefix)]
    chosen = in_layers(chosen, config)
    if not chosen:
        raise TargetError(
            f"`target_modules` {spec!r} matches no norm (LayerNorm, RMSNorm or GroupNorm with a weight); there are "
            f"{sorted({name.rpartition('.')[2] for name in norms})}"
        )
    return Targets(chosen, packed_linears(model, config, saved, []), saved)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm over features: one without running statistics, with a weight a feature."""
    if isinstance(module, nn.modules.batchnorm._NormBase) or "norm" not in type(module).__name__.lower():
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1 and not module._modules


def _check_entries(model: nn.Module, spec: str | list[str], prefix: str, norms: dict[str, nn.Module]) -> None:
    for entry in [] if isinstance(spec, str) else spec:
        if any(matches([entry], name, prefix) for name in norms):
            continue
        others = [(name, m) for name, m in model.named_modules() if name and matches([entry], name, prefix)]
        if others:
            raise TargetError(
                f"`target_modules` entry {entry!r} names {others[0][0]!r}, a {type(others[0][1]).__name__}: layer-norm "
                "tuning trains norms; name other modules in `modules_to_save`"
            )
        raise TargetError(f"`target_modules` entry {entry!r} matches no norm{nearest(entry, norms)}")
