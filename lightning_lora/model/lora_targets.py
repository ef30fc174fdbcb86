# SPDX-License-Identifier: Apache-2.0
"""What LoRA adapts beside linears: layers named in ``target_modules``, fused experts, and rows of embeddings.

::

    target_modules            nn.Embedding, nn.Conv1d/2d/3d, nn.MultiheadAttention    by name, never by "all-linear"
    target_parameters         fused experts: names of parameters, or their ends
    trainable_token_indices   ids for the input embedding, or by name of an embedding; a head tied to it follows
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.errors import Notice, TargetError, UnsupportedError
from lightning_lora.model.inner import hf_models, inner_model
from lightning_lora.model.targets import Build, Targets, find_targets, matches
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.attention import LoRAMultiheadAttention
from lightning_lora.nn.conv import LoRAConv
from lightning_lora.nn.embedding import LoRAEmbedding
from lightning_lora.nn.experts import LoRAExperts
from lightning_lora.nn.lowrank import LowRankModule
from lightning_lora.nn.tokens import TrainedTokens

_KINDS: tuple[tuple[type[nn.Module], type[LowRankModule]], ...] = (
    (nn.Embedding, LoRAEmbedding),
    (nn.Conv1d, LoRAConv),
    (nn.Conv2d, LoRAConv),
    (nn.Conv3d, LoRAConv),
    (nn.MultiheadAttention, LoRAMultiheadAttention),
)


def other_kind(module: nn.Module) -> type[LowRankModule] | None:
    """What LoRA puts in the place of a layer that is no linear one; None for what it cannot adapt."""
    return next((kind for layer, kind in _KINDS if isinstance(module, layer)), None)


def is_other_layer(module: nn.Module) -> bool:
    """Whether LoRA adapts ``module`` though it is no linear layer."""
    return other_kind(module) is not None


def lora_targets(model: nn.Module, config: LoRAConfig) -> Targets:
    """`find_targets` with all that LoRA adapts.

    Raises:
        TargetError: See `find_targets`; or an entry of ``target_parameters`` or ``trainable_token_indices`` names
            nothing.
        UnsupportedError: See `find_targets`; or ``use_dora`` or a packing is asked for something that is no linear
            layer.
    """
    special: dict[str, Build] = {}
    for name, parameters in expert_parameters(model, config).items():
        special[name] = _experts(config, parameters)
    made: dict[str, TrainedTokens] = {}
    for name, (tokens, owner) in token_layers(model, config).items():
        special[name] = _tokens(made, name, tokens, owner)
    targets = find_targets(model, config, others=is_other_layer, special=special)
    others = [name for name in targets.adapted if name in special or is_other_layer(model.get_submodule(name))]
    if others and config.use_dora:
        kind = type(model.get_submodule(others[0])).__name__
        raise UnsupportedError(
            f"`use_dora=True` is built for linear layers, and {others[0]!r} is a {kind}: adapt it by plain LoRA, or "
            "leave it out"
        )
    _say_tied(model, [name for name in others if name not in special], targets)
    return targets


def expert_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[str, ...]]:
    """By name of a module, its parameters that ``target_parameters`` means.

    Raises:
        TargetError: An entry names no parameter.
    """
    entries, prefix = config.target_parameters or [], inner_model(model)[0]
    found = {n: own for n, m in model.named_modules() if entries and (own := named_parameters(m, n, config, prefix))}
    full = [f"{name}.{parameter}" for name, own in found.items() for parameter in own]
    lost = [entry for entry in entries if not any(matches([entry], name, prefix) for name in full)]
    if lost:
        raise TargetError(
            f"`target_parameters` entry {lost[0]!r} names no parameter of the model: give the ends of names such as "
            '"mlp.experts.gate_up_proj"'
        )
    return found


def named_parameters(module: nn.Module, name: str, config: LoRAConfig, prefix: str = "") -> tuple[str, ...]:
    """A module's own parameters that ``target_parameters`` means.

    Args:
        module: The module.
        name: Its name.
        config: Which parameters.
        prefix: Where the transformers model sits in a LightningModule.
    """
    entries, start = config.target_parameters or [], f"{name}." if name else ""
    return tuple(p for p, _ in module.named_parameters(recurse=False) if matches(entries, start + p, prefix))


def named_tokens(name: str, config: LoRAConfig, prefix: str = "") -> list[int]:
    """The ids that ``trainable_token_indices`` gives a module of this name; those of a list, whatever the name."""
    wanted = config.trainable_token_indices or []
    tables = wanted if isinstance(wanted, dict) else {name: wanted}
    return next((list(ids) for entry, ids in tables.items() if matches([entry], name, prefix)), [])


def token_layers(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[list[int], str | None]]:
    """By name of an embedding or a head, the ids whose rows are trained, and the embedding that it is tied to.

    Raises:
        TargetError: A name is that of no module, or there is no input embedding.
        UnsupportedError: A head is named that is tied to an embedding which is not.
    """
    wanted, prefix = config.trainable_token_indices, inner_model(model)[0]
    if not wanted:
        return {}
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, tuple[list[int], str | None]] = {}
    if isinstance(wanted, dict):
        found = {name: (ids, None) for name in modules if (ids := named_tokens(name, config, prefix))}
        lost = [entry for entry in wanted if not any(matches([entry], name, prefix) for name in found)]
        if lost:
            raise TargetError(f"`trainable_token_indices` entry {lost[0]!r} matches no module of the model")
    else:
        found[_input_embedding(model, modules)] = list(wanted), None
    owners: dict[int, str] = {}
    for name, module in modules.items():
        weight = id(module._parameters.get("weight"))
        if name in found and weight in owners and found[name][0] == found[owners[weight]][0]:
            found[name] = found[name][0], owners[weight]
        elif name in found:
            owners.setdefault(weight, name)
        elif weight in owners and isinstance(module, nn.Linear | nn.Embedding):
            found[name] = found[owners[weight]][0], owners[weight]
    return dict(sorted(found.items(), key=lambda item: list(modules).index(item[0])))


def _input_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    for prefix, hf in hf_models(model):
        own: Any = hf
        embedding = own.get_input_embeddings()
        name = next((name for name, module in modules.items() if module is embedding), None)
        if name is not None and name.startswith(prefix):
            return name
    name = next((name for name in modules if name.rpartition(".")[2] == "embed_tokens"), None)
    if name is None:
        raise TargetError(
            "`trainable_token_indices` is a list and the model's input embedding cannot be told: give a table by its "
            'name, {"embed": [100, 101]}'
        )
    return name


def _experts(config: LoRAConfig, parameters: tuple[str, ...]) -> Build:
    def build(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> AdapterModule:
        sizes = {expert_size(config, parameter, names) for parameter in parameters}
        if len(sizes) > 1:
            raise UnsupportedError(
                f"`rank_pattern` and `alpha_pattern` give the parameters {list(parameters)} of {names[0]!r} several "
                "ranks or scales: those of one module share theirs"
            )
        return LoRAExperts(layer, record, *sizes.pop(), parameters)

    return build


def expert_size(config: LoRAConfig, parameter: str, names: tuple[str, ...]) -> tuple[int, float]:
    """Rank and ``lora_alpha`` of an experts' parameter, by PEFT's name of it.

    Args:
        config: Whose patterns.
        parameter: Its own name.
        names: The names of its module.
    """
    full = [f"{name}.{parameter}" for name in names]
    return config.rank_for(*full), config.alpha_for(*full)


def _tokens(made: dict[str, TrainedTokens], name: str, tokens: list[int], owner: str | None) -> Build:
    def build(layer: nn.Module, record: AdapterRecord, names: tuple[str, ...]) -> AdapterModule:
        made[name] = TrainedTokens(layer, record, tokens, None if owner is None else made[owner])
        return made[name]

    return build


def _say_tied(model: nn.Module, names: list[str], targets: Targets) -> None:
    """Say where an embedding is adapted and a layer that shares its weight is not."""
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Embedding):
            continue
        tied = [n for n, m in model.named_modules() if n != name and m._parameters.get("weight") is module.weight]
        if tied and tied[0] not in targets.adapted:
            warnings.warn(
                f"{tied[0]!r} shares its weight with the embedding {name!r}, which is adapted: it stays the base's, as "
                "in PEFT, and a merged model is written untied",
                Notice,
                stacklevel=4,
            )
