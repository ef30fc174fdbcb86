# SPDX-License-Identifier: Apache-2.0
"""Fold adapters into dense weights: in memory, or as the tensors of a plain model.

Every merged weight is summed in fp32 and rounded once:

    W' = round( W + strength * scaling * B A )

W of a packed base is its dequantized weight, which is what the adapter was trained over. Rounding to 16 bits
can lose much of a small update, so the error is measured layer by layer, against W' and against the update.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, MergeError, UnsupportedError
from lightning_lora.io.names import adapter_root, clean, parents, unwrap
from lightning_lora.io.tied import untie_apart
from lightning_lora.model.apply import mark_merged
from lightning_lora.model.plain import empty_linear
from lightning_lora.model.slots import adapter_modules, is_adapted
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import AdapterModule, torch_dtype
from lightning_lora.nn.parts import AdaptedParts
from lightning_lora.nn.quantized import PackedLinear
from lightning_lora.nn.saved import SavedModule
from lightning_lora.nn.tokens import TrainedTokens

#: Largest relative difference of logits to the live model that a merge may have, by the written dtype.
LOGIT_LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class MergeReport:
    """What a merge cost in accuracy.

    Args:
        layers: By layer, ``||W' - (W + dW)|| / ||W + dW||`` in fp32.
        lost: By layer, the same difference over ``||dW||``: the share of the update that rounding took.
        dtype: Of the merged weights.
        logit_error: ``||merged - live|| / ||live||`` of the outputs, None where no input was at hand.
        logit_limit: What `logit_error` may be.
        checked_on: What the outputs were compared on.
        not_finite: Names of merged layers and of modules trained in full with values that are not finite.
    """

    layers: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    dtype: str = ""
    logit_error: float | None = None
    logit_limit: float | None = None
    checked_on: str | None = None
    not_finite: list[str] = field(default_factory=list)

    @property
    def worst(self) -> tuple[str, float]:
        """Name and relative error of the worst layer; ``("", 0.0)`` without layers."""
        return max(self.layers.items(), key=lambda item: item[1], default=("", 0.0))

    @property
    def worst_lost(self) -> tuple[str, float]:
        """Name and lost share of the layer whose update lost most."""
        return max(self.lost.items(), key=lambda item: item[1], default=("", 0.0))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON's primitives."""
        return {**asdict(self), "worst": list(self.worst), "worst_lost": list(self.worst_lost)}

    def __str__(self) -> str:
        """One line for people."""
        text = f"{len(self.layers)} layers merged in {self.dtype}: weight error {self.worst[1]:.2e} at worst"
        if self.worst_lost[1] > 0.01:
            text += f", up to {self.worst_lost[1]:.1%} of an update lost to rounding ({self.worst_lost[0]})"
        if self.logit_error is not None:
            limit = "no limit" if self.logit_limit is None else f"limit {self.logit_limit:.0e}"
            text += f"; outputs differ by {self.logit_error:.2e} ({limit}) on {self.checked_on}"
        return text


@torch.no_grad()
def merge_adapters(model: nn.Module, inputs: Mapping[str, Any] | Tensor | None = None) -> MergeReport:
    """Fold every adapter of `model` into its base, in memory, in place, layer by layer.

    Each adapted layer becomes a plain linear again, a packed layer a dense one, a module of
    ``modules_to_save`` its trained copy. What was adapted stays frozen. Of several adapters the one in use is folded
    in, and the others are gone with the layers.

    Args:
        model: A converted model, or a LightningModule around one.
        inputs: Keyword arguments, or the one positional argument, of `model`: with them its outputs before
            and after are compared.

    Returns:
        The report, `logit_error` in it where `inputs` were given.

    Raises:
        ConfigError: The model has no adapters.
        MergeError: The outputs differ by more than the limit of the dtype, or merged weights are not finite; the
            model is merged then.
    """
    if not is_adapted(model):
        raise ConfigError("the model has no adapters to merge")
    refuse_unmergeable(model)
    before = None if inputs is None else outputs_of(model, inputs)
    report, (_, root) = MergeReport(), adapter_root(model)
    dtypes = set()
    dense = dense_dtype(model)
    todo = replaceable(model)[::-1]
    done: set[int] = set()
    heads: list[tuple[TrainedTokens, nn.Module]] = []
    plains: dict[AdapterModule, nn.Module] = {}
    while todo:  # popped one by one, so that each old weight is freed before the next one is made
        names, module = todo.pop()
        plain = plain_module(module, dense, done)
        if isinstance(module, AdaptedLayer):
            weight: Tensor = plain.weight  # type: ignore[assignment]
            dtypes.add(weight.dtype)
            _measure(report, clean(names[0]), module, weight)
            if not module.vacant:
                mark_merged(plain)
        elif isinstance(module, AdaptedParts):
            for own in module.merged():
                weight = plain.get_parameter(own)
                dtypes.add(weight.dtype)
                _measure_part(report, clean(names[0]), module, own, weight)
            if not module.vacant:
                mark_merged(plain)
            if isinstance(module, TrainedTokens):
                plains[module] = plain
                heads.append((module, plain))
        elif isinstance(module, SavedModule):
            _check_finite(report, clean(names[0]), *plain.parameters())
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain)
    for head, plain in heads:  # tied before, and by the same rows after
        if head.owner is not None:
            plain.weight = plains[head.owner].weight
    untie_apart(root)
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)
    report.dtype = str(narrowest).removeprefix("torch.")
    if inputs is not None and before is not None:
        report.logit_error = relative_error(outputs_of(model, inputs), before)
        report.logit_limit, report.checked_on = LOGIT_LIMITS[narrowest], "the given inputs"
    check_limit(report)
    return report


@torch.no_grad()
def merged_tensors(
    model: nn.Module, dtype: str = "auto", report: MergeReport | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the plain model that `model` stands for, one at a time; nothing is changed.

    Names are those inside the transformers model (of the whole module, without one). Tied tensors come
    out as one tensor, under each of their names.

    Args:
        model: A converted model, or a LightningModule around one.
        dtype: "auto" (each weight's own; a packed one's is `dense_dtype`), "fp32", "bf16" or "fp16".
        report: Filled with each layer's error.

    Yields:
        Name and CPU tensor of every parameter and persistent buffer.
    """
    refuse_unmergeable(model)
    _, root = adapter_root(model)
    yield from ((clean(name), tensor) for name, tensor in _plain_tensors(root, dtype, report))


@torch.no_grad()
def merged_state_dict(model: nn.Module, dtype: str = "auto") -> dict[str, Any]:
    """The ``state_dict`` that `model` would have had without adapters, merged; nothing is changed.

    Its names are the user's own, those of the whole module given: the plain LightningModule loads it strictly.

    Args:
        model: A converted model, or a LightningModule around one.
        dtype: "auto" (each weight's own; a packed one's is `dense_dtype`), "fp32", "bf16" or "fp16".

    Returns:
        CPU tensors by name, and the extra state of modules that have one.

    Raises:
        ConfigError: The model has no adapters.
        MergeError: Merged weights are not finite.
    """
    if not is_adapted(model):
        raise ConfigError("the model has no adapters to merge; its own `state_dict()` is what you want")
    refuse_unmergeable(model)
    model = unwrap(model)
    report = MergeReport()
    merged: dict[str, Any] = dict(_plain_tensors(model, dtype, report))
    check_limit(report)
    extra = {name: value for name, value in model.state_dict().items() if name.endswith("_extra_state")}
    return merged | {name: value for name, value in extra.items() if not isinstance(value, Tensor)}


def refuse_unmergeable(model: nn.Module) -> None:
    """See that what every adapter of a model does can be folded into weights.

    Raises:
        UnsupportedError: It cannot, with the reason.
    """
    for _, module in adapter_modules(model):
        if module.unmergeable:
            raise UnsupportedError(
                f"{module.title} cannot be merged: {module.unmergeable}. Keep the adapter beside the base "
                "(`save_adapter`, `load_adapter`)"
            )


def _plain_tensors(root: nn.Module, dtype: str, report: MergeReport | None) -> Iterator[tuple[str, Tensor]]:
    wanted = None if dtype == "auto" else torch_dtype(dtype)
    dense = dense_dtype(root)
    replaced = {name: module for names, module in replaceable(root) for name in names}
    for names, module in replaceable(root):
        if isinstance(module, AdaptedLayer | PackedLinear):
            weight = merged_weight(module, dense, wanted)
            if report is not None and isinstance(module, AdaptedLayer):
                _measure(report, clean(names[0]), module, weight)
            weight = weight.cpu().contiguous()
            yield from ((f"{name}.weight" if name else "weight", weight) for name in names)
        elif isinstance(module, AdaptedParts):
            for own, weight in module.merged(wanted).items():
                if report is not None:
                    _measure_part(report, clean(names[0]), module, own, weight)
                weight = weight.cpu().contiguous()
                yield from ((f"{name}.{own}" if name else own, weight) for name in names)
    done: dict[int, Tensor] = {}
    for name, tensor in root.state_dict(keep_vars=True).items():
        plain = _plain_name(name, replaced)
        if plain is None or not isinstance(tensor, Tensor):
            continue
        if id(tensor) not in done:
            value = _strengthened(name, tensor, replaced)
            keep = wanted is None or not value.is_floating_point()
            done[id(tensor)] = value.to("cpu", value.dtype if keep else wanted).contiguous()
            if report is not None and plain != name and isinstance(tensor, nn.Parameter):
                _check_finite(report, clean(plain), done[id(tensor)])
        yield plain, done[id(tensor)]


def dense_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of most of a model's frozen dense values: what its packed layers become when unpacked.

    That is not always what they were packed from: Lightning's ``bf16-true`` casts the model after conversion.
    None where nothing dense is left: each packed layer then goes back to what it was.
    """
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else None


def merged_weight(
    module: AdaptedLayer | PackedLinear, dense: torch.dtype | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """The dense weight that a layer computes with, summed in fp32 and rounded once.

    Args:
        module: `AdaptedLayer` or `PackedLinear`.
        dense: Dtype of the result for a packed layer; that before packing if null.
        dtype: Dtype of the result, whatever the layer.
    """
    base = module.replaced if isinstance(module, AdaptedLayer) else module
    if isinstance(base, PackedLinear):
        dtype = dtype or dense or base.packed.source_dtype
    if isinstance(module, PackedLinear):
        return module.packed.dequantize(dtype or module.packed.source_dtype)
    dtype = dtype or module.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if not module.enabled or module.strength == 0.0:
        return module.base_weight(dtype)  # not by way of a wider dtype
    return module.merged_weight(wide).to(dtype)


def plain_module(
    module: SavedModule | AdaptedLayer | AdaptedParts | PackedLinear, dense: torch.dtype | None, done: set[int]
) -> nn.Module:
    """The plain layer that an adapter module or a packed layer stands for, with its merged weight.

    Args:
        module: What stands in the converted model.
        dense: See `merged_weight`.
        done: Ids of parameters of trained copies that are merged already, by way of another module that shares them.
    """
    if isinstance(module, SavedModule):
        plain = module.active
        for name, parameter in plain.named_parameters():
            if id(parameter) not in done:
                parameter.data.copy_(module.value(name, module.strength if module.enabled else 0.0))
                done.add(id(parameter))
        return plain.requires_grad_(False)
    if isinstance(module, AdaptedParts):
        return _with_parameters(module.replaced, module.merged()).train(module.training)
    weight = merged_weight(module, dense)
    layer = module.replaced if isinstance(module, AdaptedLayer) else module
    if isinstance(layer, PackedLinear):
        plain = empty_linear(layer)
        plain.register_parameter("bias", layer.bias)
    else:  # a copy of the user's own layer, whatever else it carries, without copying its weight
        plain = copy.copy(layer)
        plain._parameters = dict(layer._parameters)
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if isinstance(module, AdaptedLayer) and (bias := module.merged_bias()) is not module.bias:
        plain.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return plain.train(module.training)


def _with_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the user's own module with other values of some parameters, the rest shared."""
    plain = copy.copy(module)
    plain._parameters, plain._modules = dict(module._parameters), dict(module._modules)
    for name, tensor in tensors.items():
        own, _, inside = name.partition(".")
        if inside:
            setattr(plain, own, _with_parameters(getattr(plain, own), {inside: tensor}))
        else:
            setattr(plain, own, nn.Parameter(tensor.contiguous(), requires_grad=False))
    return plain


def check_limit(report: MergeReport) -> None:
    """Refuse a merge whose outputs differ from the live model's by more than the limit.

    Raises:
        MergeError: They do, or they or merged weights are not finite.
    """
    error, limit = report.logit_error, report.logit_limit
    broken = [*report.not_finite, *(name for name, e in report.layers.items() if not math.isfinite(e))]
    if broken:
        raise MergeError(
            f"the merged weights are not finite in {len(set(broken))} modules, {broken[0]!r} first: the run "
            f"diverged, or {report.dtype} has no room for them"
            + ("" if report.dtype == "float32" else ' (merge with dtype="fp32")')
        )
    if error is not None and limit is not None and not error <= limit:
        raise MergeError(
            f"the merged model's outputs differ from the live model's by {error:.3e}, the limit for "
            f"{report.dtype} is {limit:.0e}; the worst layer is {report.worst[0]!r} ({report.worst[1]:.2e}). "
            + ('Merge with dtype="fp32"' if report.dtype != "float32" else "Keep the adapter apart from the base")
        )


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Any] | Tensor | tuple[tuple, dict]) -> list[Tensor]:
    """The floating outputs of a model in eval mode, its train flags put back.

    Args:
        model: Any module.
        inputs: Keyword arguments, one positional argument, or ``(args, kwargs)``.
    """
    args: tuple
    kwargs: Mapping[str, Any]
    if isinstance(inputs, tuple):
        args, kwargs = inputs
    else:
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else ((inputs,), {})
    flags = [(module, module.training) for module in model.modules()]
    try:
        out = model.eval()(*args, **kwargs)
    finally:
        for module, training in flags:
            module.training = training
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(out, name, None), Tensor):
            out = getattr(out, name)
    return [tensor.detach().float().cpu() for tensor in _floating(out)]


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """``||actual - expected|| / ||expected||`` over all tensors together; inf where shapes differ."""
    if [a.shape for a in actual] != [e.shape for e in expected] or not expected:
        return float("inf")
    difference = sum(float((a - e).double().square().sum()) for a, e in zip(actual, expected, strict=True))
    norm = sum(float(e.double().square().sum()) for e in expected)
    return (difference / norm) ** 0.5 if norm > 0 else difference**0.5


def replaceable(model: nn.Module) -> list[tuple[list[str], Any]]:
    """Modules that stand for plain ones, each once with all its names, those inside others left out."""
    by_id: dict[int, tuple[list[str], Any]] = {}
    outer: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(f"{o}.") for o in outer[-1:]):
            continue
        if isinstance(module, AdapterModule | PackedLinear):
            outer.append(name)
            by_id.setdefault(id(module), ([], module))[0].append(name)
    return list(by_id.values())


def _plain_name(name: str, replaced: Mapping[str, nn.Module]) -> str | None:
    """The plain model's name of an entry of the state dict; None for what only the adapters have."""
    owner = next((o for o in parents(name) if o in replaced), None)
    if owner is None:
        return name
    own, module = name.removeprefix(f"{owner}."), replaced[owner]
    if isinstance(module, SavedModule):
        return f"{owner}.{own.removeprefix('trained.')}" if own.startswith("trained.") else None
    if isinstance(module, AdaptedParts):
        kept = own.removeprefix("base_layer.")
        return f"{owner}.{kept}" if kept != own and kept not in module.merged_names() else None
    return f"{owner}.bias" if own in ("bias", "base_layer.bias") else None


def _strengthened(name: str, tensor: Tensor, replaced: Mapping[str, nn.Module]) -> Tensor:
    """A saved module's tensor, between original and trained by its strength, or an adapted layer's bias, as in use."""
    owner = next((o for o in parents(name) if o in replaced), "")
    module = replaced.get(owner)
    if isinstance(module, AdaptedLayer):  # of which nothing but the bias comes here
        bias = module.merged_bias()
        return tensor.detach() if bias is None else bias.detach()
    if not isinstance(module, SavedModule):
        return tensor.detach()
    return module.value(name.removeprefix(f"{owner}.trained."), module.strength if module.enabled else 0.0).detach()


def _measure(report: MergeReport, name: str, module: AdaptedLayer, weight: Tensor) -> None:
    if module.vacant:
        return
    exact = module.merged_weight(torch.float32)
    difference = float((weight.float() - exact).norm())
    size = float(exact.norm())
    update = float(module.delta_weight(torch.float32).norm()) if module.enabled else 0.0
    _check_finite(report, name, weight)
    report.layers[name] = difference / size if size > 0 else difference
    report.lost[name] = difference / update if update > 0 else 0.0


def _measure_part(report: MergeReport, name: str, module: AdaptedParts, own: str, weight: Tensor) -> None:
    """`_measure` of one parameter of a module."""
    if module.vacant:
        return
    exact = module.merged(torch.float32)[own]
    base = module.replaced.get_parameter(own).detach().float()
    difference, size, update = (float(t.norm()) for t in (weight.float() - exact, exact, exact - base))
    where = f"{name}.{own}".removesuffix(".weight")
    _check_finite(report, where, weight)
    report.layers[where] = difference / size if size > 0 else difference
    report.lost[where] = difference / update if update > 0 else 0.0


def _check_finite(report: MergeReport, name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        report.not_finite.append(name)


def _floating(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in nested outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floating(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _floating(item)
