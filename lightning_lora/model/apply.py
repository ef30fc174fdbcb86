# SPDX-License-Identifier: Apache-2.0
"""Put adapters into a model, switch them off and scale them."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.bars import Bar, no_bar
from lightning_lora.config import AdapterConfig, AdapterRecord, LoRAConfig
from lightning_lora.errors import (
    AlreadyAdaptedError,
    ConfigError,
    Notice,
    UnsupportedError,
)
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.inner import inner_model, names_of
from lightning_lora.model.methods import method_of
from lightning_lora.model.slots import adapter_modules, adapter_slots, is_adapted
from lightning_lora.nn.adapter import freeze_statistics, torch_dtype
from lightning_lora.nn.adopted import adopt_linear, quantized_elsewhere
from lightning_lora.nn.layers import is_conv1d, is_transparent
from lightning_lora.nn.quantized import PackedLinear, PackedWeight
from lightning_lora.nn.saved import SavedModule
from lightning_lora.nn.sharded import is_sharded

_MERGED = "_lightning_lora_merged"  # on a layer


@dataclass(frozen=True)
class ApplyReport:
    """What `apply_lora` did.

    Args:
        adapted: Names of the modules that got an adapter.
        saved: Names of the modules that are trained in full.
        trainable_params: Trainable parameters now.
        logical_params: Parameters of the base, packed ones counted as what they stand for.
        base_bytes: Bytes of the base's parameters and buffers before [bytes].
        packed_bytes: The same after packing [bytes]; equal without ``quantize``.
        fingerprint: Of the base before packing, None where it had no values (meta device).
        quantize: How the base was packed.
    """

    adapted: list[str]
    saved: list[str]
    trainable_params: int
    logical_params: int
    base_bytes: int
    packed_bytes: int
    fingerprint: dict[str, Any] | None
    quantize: str


def apply_lora(
    model: nn.Module, config: LoRAConfig, device: torch.device | str | None = None, bar: Bar = no_bar
) -> ApplyReport:
    """Freeze ``model``, pack its linears as ``config.quantize`` says, and add adapters, in place.

    The update starts at exactly zero: the model computes what it computed before, bit for bit (a packed
    base: what the packed base computes). Conversion goes tensor by tensor. Layers that bitsandbytes has
    quantized already are taken over as they are, without a copy.

    Args:
        model: Any module with linear layers; a LightningModule or a transformers model alike.
        config: What to adapt and how.
        device: Where weights are packed and then stay, the GPU that the model will run on; where they are if None.
        bar: Shows how many layers are done.

    Raises:
        AlreadyAdaptedError: The model already carries adapters, or they were merged into it in memory.
        TargetError: Nothing matched, or something that cannot be adapted.
        UnsupportedError: The model is already sharded, or is to be packed and is quantized already.
        QuantizationError: A layer that bitsandbytes quantized cannot be taken over.
    """
    if not isinstance(config, LoRAConfig):
        raise ConfigError(
            f"`config` must be a LoRAConfig, got {config!r}; LoRAConfig.from_dict takes a dict, `apply_adapters` the "
            "configuration of another method"
        )
    return apply_adapters(model, config, device, bar)


def apply_adapters(
    model: nn.Module, config: AdapterConfig, device: torch.device | str | None = None, bar: Bar = no_bar
) -> ApplyReport:
    """`apply_lora` by any method: ``config`` says which, such as `IA3Config`.

    Args:
        model: See `apply_lora`.
        config: What to adapt and how.
        device: See `apply_lora`.
        bar: See `apply_lora`.

    Raises:
        ConfigError: ``config`` is none.
        AlreadyAdaptedError, TargetError, UnsupportedError, QuantizationError: See `apply_lora`.
    """
    if not isinstance(config, AdapterConfig):
        raise ConfigError(
            f"`config` must be the configuration of a method, such as LoRAConfig, got {config!r}; "
            "LoRAConfig.from_dict takes a dict"
        )
    _refuse_converted(model)
    prefix = inner_model(model)[0]
    method = method_of(config)
    targets = method.targets(model, config)
    record = AdapterRecord(config, fingerprint(model, targets.saved))
    if method.share is not None:
        record.shared = method.share(config, [model.get_submodule(name) for name in targets.adapted])
    base_bytes = _count(model)[1]
    model.requires_grad_(False)
    _freeze_statistics(model, [*targets.saved, *(targets.adapted if method.in_full else [])])
    paths = _paths(model)
    for name in targets.saved:
        _replace(model, paths[name], SavedModule(model.get_submodule(name), record))
    taken = {name for name, module in model.named_modules() if quantized_elsewhere(module)}
    packed = _packable(model, targets.packed) if config.quantize != "none" else set()
    adapted = set(targets.adapted)
    plain = adapted - set(targets.special)
    narrow = None if config.compute_dtype == "auto" else torch_dtype(config.compute_dtype)
    todo = [n for n in paths if n in adapted or n in packed or n in taken]
    todo.sort(key=lambda n: n in adapted)  # what is packed may lie inside what is adapted
    with bar("packing" if packed else "adapting", len(todo)) as advance:
        for name in todo:
            layer = original = model.get_submodule(name)
            own = method.first(layer, record, names_of(name, prefix), device) if name in plain else None
            if own is not None:
                layer = own
            elif name in taken:
                layer = adopt_linear(layer, narrow)
            elif name in packed:
                weight = PackedWeight(layer.weight if device is None else layer.weight.to(device), config.quantize)  # type: ignore[arg-type]
                layer = PackedLinear(weight, layer.bias, is_conv1d(layer), narrow)  # type: ignore[arg-type]
            if name in adapted and own is None:
                build = targets.special.get(name, method.build)
                layer = build(layer, record, names_of(name, prefix))
            if layer.training != original.training:  # else what lies inside is left as it is
                layer.train(original.training)
            _replace(model, paths[name], layer)
            advance(1)
    method.finish(model)
    _close_fast_paths(model)
    logical, packed_bytes = _count(model, skip=set(map(id, _added(model))))
    return ApplyReport(
        adapted=list(targets.adapted),
        saved=list(targets.saved),
        trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        logical_params=logical,
        base_bytes=base_bytes,
        packed_bytes=packed_bytes,
        fingerprint=record.fingerprint,
        quantize=config.quantize,
    )


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is its base: same weights, adapters and `modules_to_save` off. Restored on exceptions."""
    before = [(module, module.enabled) for _, module in adapter_slots(model)]
    try:
        for module, _ in before:
            module.enabled = False
        yield
    finally:
        for module, enabled in before:
            module.enabled = enabled


def set_adapter_scale(model: nn.Module, lam: float) -> None:
    """Multiply every adapter of ``model`` by ``lam``: 0 is the base, 1 what was trained.

    Raises:
        ConfigError: ``lam`` is no finite number, or the model has no adapters.
    """
    if not isinstance(lam, int | float) or not math.isfinite(lam):
        raise ConfigError(f"`lam` must be a finite number, got {lam!r}")
    modules = [module for _, module in adapter_modules(model)]
    if not modules:
        raise ConfigError("the model has no adapters to scale; call `apply_lora` or `load_adapter` first")
    for module in modules:
        module.strength = float(lam)


def mark_merged(layer: nn.Module) -> None:
    """Note on a plain layer that an adapter was folded into it."""
    setattr(layer, _MERGED, True)


def merged_layers(model: nn.Module) -> list[str]:
    """Names of the layers of ``model`` that an adapter was folded into in memory."""
    return [name for name, module in model.named_modules() if getattr(module, _MERGED, False)]


def refuse_merged(model: nn.Module) -> None:
    """See that no layer of ``model`` has an adapter folded into it.

    Raises:
        AlreadyAdaptedError: Some have.
    """
    merged = merged_layers(model)
    if merged:
        raise AlreadyAdaptedError(
            f"adapters were merged into {len(merged)} layers of the model in memory, {merged[0]!r} first: what they "
            "learned would count twice under an adapter that is loaded or resumed. Start from a fresh base model; to "
            "train on top of the merged weights, save the merged model and load it"
        )


def _refuse_converted(model: nn.Module) -> None:
    if is_adapted(model):
        raise AlreadyAdaptedError(
            "the model already carries adapters; start from a fresh base model, or load into this one with "
            "`load_adapter`"
        )
    peft = sys.modules.get("peft.tuners.tuners_utils")  # not loaded: it has converted nothing
    if peft is not None and any(isinstance(m, peft.BaseTunerLayer) for m in model.modules()):
        raise AlreadyAdaptedError(
            "the model already carries adapters of PEFT's: give the base model, after `merge_and_unload()` or "
            "`unload()`, and load a saved adapter with `lightning_lora.load_adapter`"
        )
    refuse_merged(model)
    sharded = [name for name, p in model.named_parameters() if is_sharded(p)]
    if sharded or any("_fsdp_wrapped_module" in name.split(".") for name, _ in model.named_modules()):
        raise UnsupportedError(
            f"the model is already sharded ({(sharded or ['FSDP'])[0]!r}): call `apply_lora(self, config)` in "
            "`configure_model` before `fully_shard` or `wrap`, and build the model outside `deepspeed.zero.Init`"
        )


def _freeze_statistics(model: nn.Module, saved: list[str]) -> None:
    """Frozen layers keep their running statistics too, or the base would drift in training."""
    frozen = []
    for name, module in model.named_modules():
        inside = any(name == s or name.startswith(f"{s}.") for s in saved)
        if not inside and freeze_statistics(module):
            frozen.append(name)
    if frozen:
        warnings.warn(
            f"the running statistics of {len(frozen)} normalisation layers, {frozen[0]!r} first, are frozen with "
            "the base; name them in `modules_to_save` to train them",
            Notice,
            stacklevel=3,
        )


def _packable(model: nn.Module, names: list[str]) -> set[str]:
    """Those linears whose whole computation is ``x W^T + b``; a packed one could do nothing else."""
    own_way = [name for name in names if not is_transparent(model.get_submodule(name))]
    if own_way:
        warnings.warn(
            f"{len(own_way)} linear layers, {own_way[0]!r} first, have a forward or hooks of their own and stay "
            "unpacked",
            Notice,
            stacklevel=3,
        )
    return set(names) - set(own_way)


def _close_fast_paths(model: nn.Module) -> None:
    """In evaluation torch's encoder layers read the weights of their linears and would pass the adapters by."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # read by nothing but the choice of the fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # the form of a padded batch that only the fast path takes


def _paths(model: nn.Module) -> dict[str, list[str]]:
    """For each module's first name, every name that reaches the same module (shared layers)."""
    by_id: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_id.setdefault(id(module), []).append(name)
    return {names[0]: names for names in by_id.values()}


def put_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put modules into the places of those that they wrap, under each of their names.

    Args:
        model: Any model.
        layers: The new modules by the first name of the old ones.
    """
    paths = _paths(model)
    for name, layer in layers.items():
        _replace(model, paths[name], layer.train(model.get_submodule(name).training))
    _close_fast_paths(model)


def _replace(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)


def _added(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that conversion put beside the base."""
    for _, module in adapter_modules(model):
        yield from [*module.added.parameters(), *module.added.buffers()]


def _count(model: nn.Module, skip: Collection[int] = ()) -> tuple[int, int]:
    """Logical parameters, and bytes of parameters and buffers; ``skip`` holds ids of tensors to leave out."""
    packed = [m for m in model.modules() if isinstance(m, PackedWeight)]
    parameters = [p for p in model.parameters() if id(p) not in skip]
    logical = sum(p.numel() for p in parameters) + sum(p.logical_numel for p in packed)
    tensors = [*parameters, *(b for b in model.buffers() if id(b) not in skip)]
    return logical, sum(t.numel() * t.element_size() for t in tensors)
