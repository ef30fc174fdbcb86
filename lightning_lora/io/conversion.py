# SPDX-License-Identifier: Apache-2.0
"""From an adapter folder to the configuration that converts a plain model to exactly what the folder holds."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from lightning_lora.config import AdapterConfig, LoRAConfig, config_from_dict
from lightning_lora.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    Notice,
    TargetError,
)
from lightning_lora.io.folder import CONFIG, RECORD, AdapterFolder, compare_shapes
from lightning_lora.io.kinds import EXPERTS, SAVED, TOKENS, AdapterKind, Part, row_for
from lightning_lora.io.names import clean, inside, plain_modules
from lightning_lora.io.peft_types import more_words
from lightning_lora.model.inner import clean_name, outermost
from lightning_lora.model.lora_targets import expert_parameters, is_other_layer, token_layers
from lightning_lora.model.methods import method_of
from lightning_lora.model.targets import Targets
from lightning_lora.nn.sharded import is_sharded

#: Relative difference of a base's weight and its copy that a cast to another dtype explains.
_CAST_ERROR = 1e-2


def config_for(model: nn.Module, folder: AdapterFolder) -> AdapterConfig:
    """The configuration that converts a plain `model` to exactly what the folder holds.

    PEFT's rules say which modules are meant; where the engine's reading of the same words differs, or a
    pattern is anchored at the transformers model's root, names are written out.
    """
    prefix, root = folder.root(model)
    modules = plain_modules(root)
    saved = outermost([name for name in modules if folder.spec.saves(name)])
    config = _written_config(folder, saved)
    if folder.spec.target_modules == "all-linear" or not folder.kind.by_names:
        found = method_of(config).targets(model, config)
        adapted = [clean(inside(name, prefix)) for name in found.adapted if name not in found.special]
    else:
        try:
            fits = method_of(config).fits
            adapted = [name for name, m in modules.items() if folder.spec.targets(name) and fits(m)]
            whole = [name for name in adapted if isinstance(config, LoRAConfig) and is_other_layer(modules[name])]
            adapted = [name for name in adapted if not any(name.startswith(f"{other}.") for other in whole)]
        except re.error as error:
            raise CheckpointError(
                f"{folder.path / CONFIG} has a pattern that is no regular expression: {error}"
            ) from error
    special = _special(model, prefix, config)
    shapes = _shapes_for(modules, adapted, saved, folder)
    for name, kind in special.items():
        if kind is not None:
            shapes |= kind.file_shapes(modules[name], Part(name, folder.spec.rank(folder.sized(name)), config))
    compare_shapes(shapes, folder.shapes(), folder.path)
    _compare_copies(modules, folder)
    full = {name: f"{prefix}.{name}" if prefix else name for name in [*adapted, *special, *saved]}
    return fit(model, config, folder.spec, {n: full[n] for n in [*adapted, *special]}, {n: full[n] for n in saved})


def _special(model: nn.Module, prefix: str, config: AdapterConfig) -> dict[str, AdapterKind | None]:
    """What ``target_parameters`` and ``trainable_token_indices`` adapt, by name, with its row if it has tensors."""
    if not isinstance(config, LoRAConfig):
        return {}
    found: dict[str, AdapterKind | None] = dict.fromkeys(expert_parameters(model, config), EXPERTS)
    found |= {name: None if owner else TOKENS for name, (_, owner) in token_layers(model, config).items()}
    return {clean(inside(name, prefix)): kind for name, kind in found.items()}


def compare_use(config: AdapterConfig, folder: AdapterFolder) -> None:
    """See that a model that was converted by ``config`` uses the folder's tensors as they were used in the training.

    Raises:
        AdapterMismatchError: They are another method's, or it uses them in another way.
    """
    if folder.kind.config is not type(config):
        raise AdapterMismatchError(
            f"{folder.path} holds an adapter of {folder.kind.config.title}, the model was converted for "
            f"{config.title}: load it into a fresh base"
        )
    if config.use_fields:
        theirs = _written_config(folder, [])
        for name in config.use_fields:
            if getattr(theirs, name) != getattr(config, name):
                raise AdapterMismatchError(
                    f"{folder.path}: `{name}` is {getattr(theirs, name)!r} there and {getattr(config, name)!r} in the "
                    "model: convert it with the same, or load the folder into a fresh base"
                )


def repacked(config: AdapterConfig, quantize: str | None) -> AdapterConfig:
    """The configuration with another packing of the base; as it is if null.

    Raises:
        ConfigError: There is no such packing.
    """
    return config if quantize is None else config_from_dict({**config.to_dict(), "quantize": quantize})


def _written_config(folder: AdapterFolder, saved: list[str]) -> AdapterConfig:
    """Our configuration from the folder's record, or one made of PEFT's words."""
    path = folder.path
    own = folder.record.get("config")
    if own:
        try:
            config = config_from_dict(own)
            if not isinstance(config, LoRAConfig):
                return config
            # PEFT's words for these are names inside the transformers model, wherever that lay in training.
            return dataclasses.replace(config, **more_words(folder.config))
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{path / RECORD}: {error}; it may be of a newer version") from error
    spec = folder.spec
    pattern = spec.layers_pattern
    shared = {
        "exclude_modules": spec.exclude_modules or None,
        "layers_to_transform": spec.layers_to_transform if spec.layers_to_transform != [] else None,
        "layers_pattern": pattern if isinstance(pattern, str) and spec.layers_to_transform else None,
        "modules_to_save": saved or None,  # PEFT's entries may match nothing, or without a dot
    }
    if folder.kind.by_names:
        shared["target_modules"] = spec.target_modules
    return folder.kind.read(folder.config, shared)


class Ranks(Protocol):
    """Rank and alpha of modules, by their names inside the transformers model."""

    @property
    def r(self) -> int:
        """Of most."""

    @property
    def lora_alpha(self) -> float:
        """Of most."""

    def rank(self, name: str) -> int:
        """Of one."""

    def alpha(self, name: str) -> float:
        """Of one."""


def fit(
    model: nn.Module, config: AdapterConfig, spec: Ranks, adapted: dict[str, str], saved: dict[str, str]
) -> AdapterConfig:
    """Write names out in `config` wherever its words do not give exactly these modules, ranks and scales.

    Args:
        model: A plain model.
        config: A configuration that is meant to choose them.
        spec: Ranks and scales.
        adapted: By name inside the transformers model, the full name of each module to adapt.
        saved: The same of the modules to train in full.
    """
    if isinstance(config, LoRAConfig):
        experts: dict[str, tuple[str, ...]] = {}
        with contextlib.suppress(TargetError):  # said where the model is converted
            experts = expert_parameters(model, config)
        inner = {f"{name}.{own}": f"{full}.{own}" for name, full in adapted.items() for own in experts.get(full, ())}
        config = _with_ranks(config, spec, {**{n: f for n, f in adapted.items() if f not in experts}, **inner})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        try:
            found = method_of(config).targets(model, config)
        except TargetError:  # words that hold another attribute's name
            found = Targets([], [], [])
    if {clean_name(n) for n in found.saved} != {clean_name(n) for n in saved.values()}:
        config = dataclasses.replace(config, modules_to_save=list(saved.values()) or None)
    if {clean_name(n) for n in found.adapted} != {clean_name(n) for n in adapted.values()}:
        names = "|".join(re.escape(full) for full in adapted.values() if full not in found.special)
        config = dataclasses.replace(
            config, target_modules=names or [], exclude_modules=None, layers_to_transform=None, layers_pattern=None
        )
    return config


def _with_ranks(config: LoRAConfig, spec: Ranks, adapted: dict[str, str]) -> LoRAConfig:
    """Ranks and scales written out where the configuration's words do not give those of `spec`."""
    if any(config.rank_for(full) != spec.rank(name) for name, full in adapted.items()):
        ranks = {f"^{re.escape(full)}": spec.rank(name) for name, full in adapted.items()}
        config = dataclasses.replace(config, r=spec.r, rank_pattern=ranks)
    if any(config.alpha_for(full) != spec.alpha(name) for name, full in adapted.items()):
        alphas = {f"^{re.escape(full)}": spec.alpha(name) for name, full in adapted.items()}
        config = dataclasses.replace(config, lora_alpha=spec.lora_alpha, alpha_pattern=alphas)
    return config


def _compare_copies(modules: Mapping[str, nn.Module], folder: AdapterFolder) -> None:
    """Compare the base's weights that the folder holds with those of the model, where these are at hand.

    Raises:
        BaseMismatchError: They are others.
    """
    for name, copy in folder.base_copies().items():
        module, _, own = name.rpartition(".")
        live = getattr(modules.get(module), own, None)
        if not isinstance(live, Tensor) or live.is_meta or is_sharded(live):
            continue
        same = live.shape == copy.shape
        if same:
            found = live.detach().cpu()
            size, difference = found.float().norm(), (copy.to(found.dtype) - found).float().norm()
            same = bool(difference <= _CAST_ERROR * size)
        if not same:
            raise BaseMismatchError(
                f"{folder.path} was trained over another {name!r} than the model has: load the base that it was "
                "trained on, resized as it was there"
            )


def _shapes_for(
    modules: Mapping[str, nn.Module], adapted: list[str], saved: list[str], folder: AdapterFolder
) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor that a folder must hold for a plain model."""
    shapes: dict[str, tuple[int, ...]] = {}
    config = folder.kind.read(folder.config, {})  # PEFT's file, not our record: whoever loads it goes by that
    for name in [*adapted, *saved]:
        kind = SAVED if name in saved else row_for(config, modules[name])
        shapes |= kind.file_shapes(modules[name], Part(name, folder.spec.rank(name), config))
    plain = [modules[name] for name in adapted]
    return shapes | (row_for(config, plain[0]).shared_shapes(config, plain) if plain else {})
