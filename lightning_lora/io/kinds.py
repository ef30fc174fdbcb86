# SPDX-License-Identifier: Apache-2.0
"""How each kind of adapter stands in a file and is folded into a weight: one row a kind, and what a model has of each.

Writing, reading, checking and merging of folders and checkpoints go by these rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import (
    AdaLoRAConfig,
    AdapterConfig,
    BottleneckConfig,
    FullTuningConfig,
    IA3Config,
    LoRAConfig,
    NormTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeRAConfig,
)
from lightning_lora.errors import UnsupportedError
from lightning_lora.io.folder import PREFIX, SHARED
from lightning_lora.io.names import adapter_root, clean, inside
from lightning_lora.model.lora_targets import named_parameters, named_tokens, other_kind
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adalora import AdaLoRALinear
from lightning_lora.nn.adapter import AdapterModule, Held
from lightning_lora.nn.attention import LoRAMultiheadAttention, attention_sites
from lightning_lora.nn.bottleneck import BottleneckSublayer, sublayer_width
from lightning_lora.nn.conv import LoRAConv, conv_sites
from lightning_lora.nn.dora import MAGNITUDE, DoRALinear, magnified
from lightning_lora.nn.embedding import LoRAEmbedding, embedding_sites
from lightning_lora.nn.experts import LoRAExperts, expert_sites
from lightning_lora.nn.ia3 import NAME as IA3
from lightning_lora.nn.ia3 import IA3Linear
from lightning_lora.nn.layers import linear_shape, widest
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lowrank import LowRankModule, Site
from lightning_lora.nn.prefix import PrefixedDecoder, cache_shape
from lightning_lora.nn.prompt import PromptedDecoder
from lightning_lora.nn.residual import ResidualLoRALinear
from lightning_lora.nn.saved import SavedModule
from lightning_lora.nn.tokens import ROWS as TOKEN_ROWS
from lightning_lora.nn.tokens import TrainedTokens
from lightning_lora.nn.tuned import TunedNorm
from lightning_lora.nn.vera import PROJECTIONS, VeRALinear

#: Shapes of tensors by name.
Shapes = dict[str, tuple[int, ...]]
#: Rank, ``lora_alpha``, ``use_rslora``, dropout.
Words = tuple[int, float, bool, float]


@dataclass(frozen=True)
class Part:
    """What is known of one adapted module before it is converted.

    Args:
        name: Of the module, inside the transformers model.
        r: Rank; 0 for a method without one.
        config: Of the adapter.
    """

    name: str
    r: int
    config: AdapterConfig


#: (plain module, what it gets) -> the parameters that get a low-rank update each.
Sites = Callable[[nn.Module, Part], tuple[Site, ...]]
#: (tensors by their names in the file, scale, weight of the base, whether it is ``(in, out)``, dtype to sum in) ->
#: the weight with the adapter in it and the norm of what was added.
Fold = Callable[[Mapping[str, Tensor], float, Tensor, bool, torch.dtype], tuple[Tensor, float]]

_ROWS = 2**18  # elements that are summed at a time


@dataclass(frozen=True)
class AdapterKind:
    """How one kind of adapter stands in the file: its keys there, by the names of `trained_names` here."""

    module: type[AdapterModule]
    file_name: Callable[[str], str]  # name inside the adapter module -> name in the file
    tensor: Callable[[Any, str], Tensor]  # (module, name inside it) -> the tensor as the live model uses it
    shapes: Callable[[nn.Module, Part], Shapes]  # (plain module, what it gets) -> by name inside, each tensor's shape
    fold: Fold | None = None  # how it changes a linear layer's weight, for a kind with a rank and a scale
    names: tuple[str, ...] = ()  # inside every module of such a kind
    shared: Mapping[str, str] = field(default_factory=dict)  # keys of what a model has once, by names inside one module
    shared_shapes: Callable[[Any, list[nn.Module]], Shapes] = lambda config, plain: {}  # their shapes, by those keys
    alone: Callable[[str], str] | None = None  # name inside -> key, of a kind of which a model has one module
    filed: Callable[[Any], list[str]] | None = None  # what stands in a folder, where that is not what is trained

    @property
    def file_names(self) -> dict[str, str]:
        """By name in the file, the name inside the module: of a kind with a rank and a scale."""
        return {self.file_name(own): own for own in self.names}

    def file_shapes(self, plain: nn.Module, part: Part) -> Shapes:
        """What an adapter folder holds of one module.

        Args:
            plain: The user's module.
            part: What it gets.
        """
        return {self.key(part.name, own): shape for own, shape in self.shapes(plain, part).items()}

    def key(self, name: str, own: str) -> str:
        """The key in an adapter folder of a tensor by its name inside a module."""
        if own in self.shared:
            return self.shared[own]
        if self.alone is not None:
            return self.alone(own)
        return PREFIX + ".".join(part for part in (name, self.file_name(own)) if part)

    def held(self, tensors: dict[str, Tensor], strength: float, words: Callable[[], Words]) -> Held:
        """What one adapter has in a module.

        Args:
            tensors: By name inside the module.
            strength: At which it is used.
            words: Gives rank, ``lora_alpha``, ``use_rslora`` and dropout, where the kind has them.
        """
        ranked = self.fold is not None or issubclass(self.module, LowRankModule)
        return Held(tensors, strength, *words()) if ranked else Held(tensors, strength)


def _lora_tensor(module: LoRALinear, name: str) -> Tensor:
    return {"adapter.lora_A": module.lora_A, "adapter.lora_B": module.lora_B}[name].detach()


def _dora_tensor(module: DoRALinear, name: str) -> Tensor:
    return module.magnitudes() if name == MAGNITUDE else _lora_tensor(module, name)


def _residual_tensor(module: ResidualLoRALinear, name: str) -> Tensor:
    """Of the update of the base as it was: the start's factors stand beside the adapter's."""
    return module.update_factors()[name == "adapter.lora_B"]


def _lora_shapes(plain: nn.Module, part: Part) -> Shapes:
    inn, out = linear_shape(plain)
    return {"adapter.lora_A": (part.r, inn), "adapter.lora_B": (out, part.r)}


def _lora_fold(
    tensors: Mapping[str, Tensor], scale: float, weight: Tensor, transposed: bool, wide: torch.dtype
) -> tuple[Tensor, float]:
    """``W + s B A``; the sum takes the place of the update."""
    A, B = (tensors[f"lora_{x}.weight"].to(wide) for x in "AB")
    delta = (B @ A).mul_(scale)
    if transposed:
        delta = delta.t()
    update = float(delta.norm())
    for total, part in rows(delta, weight):
        total.add_(part.to(total.dtype))
    return delta, update


def _dora_shapes(plain: nn.Module, part: Part) -> Shapes:
    return {**_lora_shapes(plain, part), MAGNITUDE: (linear_shape(plain)[1],)}


def _dora_fold(
    tensors: Mapping[str, Tensor], scale: float, weight: Tensor, transposed: bool, wide: torch.dtype
) -> tuple[Tensor, float]:
    """``m V / |V|`` with ``V = W + s B A``, which its result takes the place of."""
    direction, _ = _lora_fold(tensors, scale, weight, transposed, wide)
    merged = magnified(direction, tensors["lora_magnitude_vector"], transposed)
    update = sum(float((new - old.to(wide)).double().square().sum()) for new, old in rows(merged, weight))
    return merged, update**0.5


def _adalora_tensor(module: AdaLoRALinear, name: str) -> Tensor:
    tensor = module.live(name).detach()
    return module.strength * tensor if name == "adapter.lora_E" and module.strength != 1.0 else tensor


def _adalora_shapes(plain: nn.Module, part: Part) -> Shapes:
    inn, out = linear_shape(plain)
    r = part.config.rank_for(part.name)
    return {"adapter.lora_A": (r, inn), "adapter.lora_E": (r, 1), "adapter.lora_B": (out, r)}


def _vera_tensor(module: VeRALinear, name: str) -> Tensor:
    tensor = module.live(name).detach()
    return module.strength * tensor if name == "adapter.vera_lambda_b" and module.strength != 1.0 else tensor


def _vera_shapes(plain: nn.Module, part: Part) -> Shapes:
    r = part.config.rank_for(part.name)
    return {"adapter.vera_lambda_b": (linear_shape(plain)[1],), "adapter.vera_lambda_d": (r,)}


def _vera_shared(config: VeRAConfig, plain: list[nn.Module]) -> Shapes:
    if not config.save_projection:
        return {}
    inn, out = widest(plain)
    return dict(zip(SHARED, ((config.r, inn), (out, config.r)), strict=True))


def _saved_tensor(module: SavedModule, name: str) -> Tensor:
    return module.value(name.removeprefix("trained."), module.strength).detach()


def _ia3_shapes(plain: nn.Module, part: Part) -> Shapes:
    inn, out = linear_shape(plain)
    config = cast(IA3Config, part.config)
    return {IA3: (1, inn) if config.is_feedforward(part.name) else (out, 1)}


def _low_rank(module: type[LowRankModule], file_name: Callable[[str], str], sites: Sites) -> AdapterKind:
    """The row of factors beside what is no linear layer."""

    def shapes(plain: nn.Module, part: Part) -> Shapes:
        found = sites(plain, part)
        return {f"adapter.{own}": shape for s in found for own, shape in ((s.A, s.shape_A), (s.B, s.shape_B))}

    return AdapterKind(module, file_name, lambda m, name: m.live(name).detach(), shapes)


def _nested(name: str) -> str:
    """PEFT's name of a factor, which may lie inside another adapter: of an output projection, of one more parameter."""
    own = name.removeprefix("adapter.")
    if own.startswith("out_proj_"):
        return f"base_layer.out_proj.{own.removeprefix('out_proj_')}.weight"
    if own.startswith("inner"):
        depth, _, own = own.removeprefix("inner").partition("_")
        return "base_layer." * int(depth) + f"{own}.weight"
    return f"{own}.weight"


def _expert_sites(plain: nn.Module, part: Part) -> tuple[Site, ...]:
    return expert_sites(plain, part.r, named_parameters(plain, part.name, cast(LoRAConfig, part.config)))


def _token_shapes(plain: nn.Module, part: Part) -> Shapes:
    weight = cast(Tensor, plain.weight)
    return {TOKEN_ROWS: (len(named_tokens(part.name, cast(LoRAConfig, part.config))), weight.shape[1])}


def _prompt_shapes(plain: nn.Module, part: Part) -> Shapes:
    config: Any = part.config
    return {"adapter.embedding": (config.num_virtual_tokens, plain.get_input_embeddings().weight.shape[1])}  # type: ignore[operator]


def _prefix_shapes(plain: nn.Module, part: Part) -> Shapes:
    config: Any = part.config
    layers, heads, width = cache_shape(plain)
    return {"adapter.embedding": (config.num_virtual_tokens, layers * 2 * heads * width)}


def _prefix_key(own: str) -> str:
    if own.startswith("adapter.transform"):
        raise UnsupportedError(
            "a prefix that is trained through an MLP (`prefix_projection`) takes no adapter folder in, which holds "
            "what an MLP gave: load it into a plain model, or go on from a checkpoint, which has the MLP"
        )
    return PROMPT_KEY


def _bottleneck_shapes(plain: nn.Module, part: Part) -> Shapes:
    config: Any = part.config
    width = sublayer_width(plain)
    size = config.size_for(width)
    shapes: Shapes = {
        "down.weight": (size, width),
        "down.bias": (size,),
        "up.weight": (width, size),
        "up.bias": (width,),
    }
    return {f"adapter.{name}": shape for name, shape in shapes.items()}


def _saved_shapes(plain: nn.Module, part: Part) -> Shapes:
    return {f"trained.{name}": tuple(tensor.shape) for name, tensor in plain.state_dict().items()}


def _bottleneck_tensor(module: BottleneckSublayer, name: str) -> Tensor:
    """A folder's ``up`` holds the strength, which it has no other place for."""
    tensor = module.live(name).detach()
    return tensor * module.strength if name.startswith("adapter.up.") and module.strength != 1.0 else tensor


def _live(module: AdapterModule, name: str) -> Tensor:
    return module.live(name).detach()


#: The one key in a folder of virtual tokens, as PEFT has it.
PROMPT_KEY = "prompt_embeddings"

#: One row for every kind, the special before the general; who adds an adapter kind adds its row.
KINDS = (
    AdapterKind(
        DoRALinear,
        lambda name: name.removeprefix("adapter.") + ("" if name == MAGNITUDE else ".weight"),
        _dora_tensor,
        _dora_shapes,
        _dora_fold,
        ("adapter.lora_A", "adapter.lora_B", MAGNITUDE),
    ),
    AdapterKind(
        ResidualLoRALinear,
        lambda name: name.removeprefix("adapter.") + ".weight",
        _residual_tensor,
        _lora_shapes,
        _lora_fold,
        ("adapter.lora_A", "adapter.lora_B"),
        filed=lambda module: ["adapter.lora_A", "adapter.lora_B"],
    ),
    AdapterKind(
        LoRALinear,
        lambda name: name.removeprefix("adapter.") + ".weight",
        _lora_tensor,
        _lora_shapes,
        _lora_fold,
        ("adapter.lora_A", "adapter.lora_B"),
    ),
    AdapterKind(PromptedDecoder, str, _live, _prompt_shapes, alone=lambda own: PROMPT_KEY),
    AdapterKind(
        PrefixedDecoder,
        str,
        lambda module, name: module.prefix().detach() if name == "prefix" else _live(module, name),
        _prefix_shapes,
        alone=_prefix_key,
        filed=lambda module: ["prefix"],
    ),
    AdapterKind(
        IA3Linear,
        lambda name: name.removeprefix("adapter."),
        lambda m, _: m.factors(m.ia3_l.dtype).detach(),
        _ia3_shapes,
    ),
    AdapterKind(AdaLoRALinear, lambda name: name.removeprefix("adapter."), _adalora_tensor, _adalora_shapes),
    AdapterKind(
        VeRALinear,
        lambda name: name.removeprefix("adapter."),
        _vera_tensor,
        _vera_shapes,
        shared=dict(zip(PROJECTIONS, SHARED, strict=True)),
        shared_shapes=_vera_shared,
    ),
    _low_rank(
        LoRAEmbedding,
        lambda name: name.replace("adapter.lora_", "lora_embedding_"),
        lambda plain, part: embedding_sites(plain, part.r),
    ),
    _low_rank(LoRAConv, _nested, lambda plain, part: conv_sites(plain, part.r)),
    _low_rank(LoRAMultiheadAttention, _nested, lambda plain, part: attention_sites(plain, part.r)),
    _low_rank(LoRAExperts, _nested, _expert_sites),
    AdapterKind(
        TrainedTokens,
        lambda name: name.replace("adapter.", "token_adapter."),
        lambda module, _: module.value().detach(),
        _token_shapes,
    ),
    AdapterKind(
        BottleneckSublayer,
        lambda name: f"bottleneck.{name.removeprefix('adapter.')}",
        _bottleneck_tensor,
        _bottleneck_shapes,
    ),
    AdapterKind(
        TunedNorm, lambda name: f"ln_tuning_layers.{name.removeprefix('trained.')}", _saved_tensor, _saved_shapes
    ),
    AdapterKind(SavedModule, lambda name: name.removeprefix("trained."), _saved_tensor, _saved_shapes),
)
DORA, _, LORA, PROMPT, PREFIX_TUNING, IA3_ROW, ADALORA, VERA, *_OTHERS, EXPERTS, TOKENS, BOTTLENECK, NORM, SAVED = KINDS


#: Key in the file, name in the model, module, name inside it.
Place = tuple[str, str, AdapterModule, str]


def places(model: nn.Module) -> Iterator[Place]:
    """Everything that the adapter in use trains."""
    prefix, _ = adapter_root(model)
    for raw, module in adapter_modules(model):
        name = clean(inside(raw, prefix))
        kind = kind_of(module, raw)
        for own in module.trained_names():
            yield kind.key(name, own), f"{raw}.{own}" if raw else own, module, own


def entries(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(key in the file, name in the model, tensor as the model uses it) of everything that adapters train."""
    prefix, _ = adapter_root(model)
    for raw, module in adapter_modules(model):
        name = clean(inside(raw, prefix))
        kind = kind_of(module, raw)
        for own in module.trained_names() if kind.filed is None else kind.filed(module):
            yield kind.key(name, own), f"{raw}.{own}" if raw else own, kind.tensor(module, own)


def linear_row(use_dora: bool) -> AdapterKind:
    """The row of LoRA's adapters of linears by a configuration's word."""
    return DORA if use_dora else LORA


def _lora_row(config: LoRAConfig, plain: nn.Module) -> AdapterKind:
    """By ``target_modules``; that of `EXPERTS` and `TOKENS` their own words say."""
    kind = other_kind(plain)
    return next((row for row in _OTHERS if row.module is kind), linear_row(config.use_dora))


#: By configuration: (the configuration, the user's module) -> the row of what stands in the module's place.
ROWS: dict[type[AdapterConfig], Callable[[Any, nn.Module], AdapterKind]] = {
    LoRAConfig: lambda config, plain: _lora_row(config, plain),
    IA3Config: lambda config, plain: IA3_ROW,
    AdaLoRAConfig: lambda config, plain: ADALORA,
    VeRAConfig: lambda config, plain: VERA,
    PromptTuningConfig: lambda config, plain: PROMPT,
    PrefixTuningConfig: lambda config, plain: PREFIX_TUNING,
    BottleneckConfig: lambda config, plain: BOTTLENECK,
    NormTuningConfig: lambda config, plain: NORM,
    FullTuningConfig: lambda config, plain: SAVED,
}


def row_for(config: AdapterConfig, plain: nn.Module) -> AdapterKind:
    """The row of what a configuration puts in the place of one of the user's modules."""
    return ROWS[type(config)](config, plain)


def kind_of(module: AdapterModule, raw: str) -> AdapterKind:
    """The row of a module.

    Raises:
        UnsupportedError: It has none.
    """
    kind = next((k for k in KINDS if isinstance(module, k.module)), None)
    if kind is None:
        raise UnsupportedError(f"{raw!r}: a {type(module).__name__} has no place in an adapter file yet")
    return kind


def rows(first: Tensor, second: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Both matrices in pieces of some rows, so that summing and measuring need little memory."""
    count = max(1, _ROWS // max(1, first.shape[-1]))
    return list(zip(first.split(count), second.split(count), strict=True))
