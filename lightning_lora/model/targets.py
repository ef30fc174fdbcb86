# SPDX-License-Identifier: Apache-2.0
"""Which modules of a model are adapted, packed and saved; with the nearest names when nothing matches."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_lora.config import AdapterConfig, AdapterRecord, matches_pattern
from lightning_lora.errors import Notice, TargetError, UnsupportedError
from lightning_lora.model.inner import hf_models, inner_model, names_of, outermost
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.adopted import quantized_elsewhere
from lightning_lora.nn.layers import is_conv1d

#: (module that is replaced, record, the module's names) -> what stands in its place.
Build = Callable[[nn.Module, AdapterRecord, tuple[str, ...]], AdapterModule]


@dataclass(frozen=True)
class Targets:
    """Module names, in model order.

    Args:
        adapted: Modules that get an adapter: linears, and what a method adapts beside them.
        packed: Linears whose weight is packed when the base is quantized: all but the head and saved ones.
        saved: Modules that are trained in full.
        special: By name of an adapted module, what makes the one in its place, where that is not the method's rule.
    """

    adapted: list[str]
    packed: list[str]
    saved: list[str]
    special: Mapping[str, Build] = field(default_factory=dict)


def find_targets(
    model: nn.Module,
    config: AdapterConfig,
    others: Callable[[nn.Module], bool] = lambda module: False,
    special: Mapping[str, Build] | None = None,
) -> Targets:
    """Choose modules as ``config`` says.

    Args:
        model: The model.
        config: Which modules.
        others: What may be named in ``target_modules`` beside linears; "all-linear" never chooses it.
        special: Modules that are adapted whatever ``target_modules`` says; see `Targets.special`.

    Raises:
        TargetError: An entry that must match something matches nothing, or something that cannot be adapted.
        UnsupportedError: The base is to be packed and bitsandbytes has quantized it already; or a module is to be
            adapted in two ways.
    """
    linears, special = _linears(model), special or {}
    layers = {name: m for name, m in model.named_modules() if name and (name in linears or others(m))}
    prefix = inner_model(model)[0]
    heads = find_heads(model, linears)
    saved = saved_modules(model, config, prefix)
    free = [name for name in layers if not under(name, saved)]
    if config.target_modules == "all-linear":
        chosen = [name for name in free if name in linears and name not in heads]
        _say_other_maps(model)
        if not heads and _has_no_embedding(model):
            _notice_no_head(chosen)
    else:
        chosen = [name for name in free if matches(config.target_modules, name, prefix)]
        _check_target_entries(model, config.target_modules, prefix, layers, linears)
    if config.exclude_modules is not None:
        chosen = [name for name in chosen if not matches(config.exclude_modules, name, prefix)]
        _say_unused_excludes(config.exclude_modules, layers, prefix)
    chosen = in_layers(chosen, config)
    whole = [name for name in chosen if name not in linears]  # with the linears inside them, as an attention module
    chosen = [name for name in chosen if name not in linears or not under(name, whole)]
    chosen = _with_special(model, chosen, special, saved)
    if not chosen and not saved:
        raise TargetError(_nothing_matched(model, config, linears))
    if not chosen:
        raise TargetError(f"only `modules_to_save` matched ({saved}); {_nothing_matched(model, config, linears)}")
    inner = [f"{name}.{own}" for name in special for own in model.get_submodule(name)._parameters]
    _check_patterns(config, [*chosen, *inner], prefix)
    return Targets(chosen, packed_linears(model, config, saved, chosen, whole), saved, special)


def packed_linears(
    model: nn.Module, config: AdapterConfig, saved: list[str], chosen: list[str], whole: Sequence[str] = ()
) -> list[str]:
    """Linears that are packed when the base is quantized: all but heads, excluded ones and those in saved modules.

    Args:
        model: The model.
        config: The configuration.
        saved: Names of modules that are trained in full.
        chosen: Names of linears that are packed though they are heads: those that get an adapter.
        whole: Names of modules that are adapted with the linears inside them, which stay as they are.

    Raises:
        UnsupportedError: The base is to be packed and bitsandbytes has quantized it already.
    """
    linears, prefix = _linears(model), inner_model(model)[0]
    heads = find_heads(model, linears)
    _say_untied(model, saved)
    _check_other_owner(linears, config)
    excluded = config.exclude_modules
    packed = [
        name
        for name in linears
        if not under(name, [*saved, *whole])
        and (name not in heads or name in chosen)
        and not (excluded and matches(excluded, name, prefix))
    ]
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}  # packing would take it away
    return [name for name in packed if id(linears[name].weight) not in embedded]


def saved_modules(model: nn.Module, config: AdapterConfig, prefix: str) -> list[str]:
    """Modules that are trained in full: those of ``modules_to_save``, and fresh task heads.

    Args:
        model: The model.
        config: The configuration.
        prefix: Where the transformers model lies.

    Raises:
        TargetError: An entry matches nothing.
    """
    saved = _saved(model, config, prefix)
    fresh = [name for name in _fresh_task_heads(model) if not under(name, saved)]
    if fresh:
        _notice_task_head(fresh)
    return outermost(dict.fromkeys(saved + fresh))


def find_heads(model: nn.Module, linears: dict[str, nn.Module] | None = None) -> set[str]:
    """Names of output heads, found by what they do.

    A head is what ``get_output_embeddings`` gives, or a linear tied to an embedding, or the last linear
    whose output is as wide as the largest embedding is long.
    """
    linears = _linears(model) if linears is None else linears
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tied = {id(e.weight) for e in embeddings}
    outputs = {id(head) for _, hf in hf_models(model) if (head := _output_embeddings(hf)) is not None}
    heads = {name for name, m in linears.items() if id(m) in outputs or id(m.weight) in tied}
    if not heads and embeddings:
        longest = max(e.num_embeddings for e in embeddings)
        wide = [n for n, m in linears.items() if getattr(m, "out_features", None) == longest]
        heads = set(wide[-1:])
    return heads


def matches(spec: str | list[str], name: str, prefix: str = "") -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or suffixes.

    ``prefix`` is where the transformers model sits in a LightningModule: names inside it count too.
    """
    names = names_of(name, prefix)
    if isinstance(spec, str):
        return any(re.fullmatch(spec, n) for n in names)
    return any(n == entry or n.endswith(f".{entry}") for n in names for entry in spec)


def adaptable_suffixes(model: nn.Module, suffixes: Iterable[str]) -> list[str]:
    """Those of ``suffixes`` that end the name of a linear layer of ``model``."""
    names = list(_linears(model))
    return [s for s in suffixes if any(name == s or name.endswith(f".{s}") for name in names)]


def is_adaptable(module: nn.Module) -> bool:
    """Whether `LoRALinear` can stand in for ``module``: a linear layer that maps vectors to vectors."""
    return is_conv1d(module) or (isinstance(module, nn.Linear) and not _is_other_map(module))


def _is_other_map(module: nn.Linear) -> bool:
    """Whether a subclass of `nn.Linear` gives something else than ``(..., out)`` for ``(..., in)``.

    A router of a mixture of experts may give a tuple, a grouped layer reads its input in another shape. The layer is
    called once without values, on the meta device; what cannot run there is taken for linear.
    """
    if type(module).forward is nn.Linear.forward or quantized_elsewhere(module) or "forward" in vars(module):
        return False
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    bare = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
    x = torch.empty(2, 5, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        with torch.no_grad():
            y = functional_call(module, bare, (x,))
    except NotImplementedError:
        return False
    except Exception as error:  # whatever a forward may raise that is given an input of the wrong shape
        return "meta" not in str(error)
    return not (isinstance(y, Tensor) and y.shape == (2, 5, module.out_features))


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name and is_adaptable(m)}


def _say_other_maps(model: nn.Module) -> None:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_adaptable(m)]
    if names:
        kind = type(model.get_submodule(names[0])).__name__
        warnings.warn(
            f"{len(names)} layers, {names[0]!r} first ({kind}), are nn.Linear by class and compute something else "
            "than (..., in) -> (..., out): they are left alone",
            Notice,
            stacklevel=4,
        )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except NotImplementedError:  # encoders and vision models have none to give
        return None


def _saved(model: nn.Module, config: AdapterConfig, prefix: str) -> list[str]:
    saved = []
    modules = {name: m for name, m in model.named_modules() if name}
    for entry in config.modules_to_save or []:
        found = [name for name in modules if matches([entry], name, prefix)]
        if not found:
            raise TargetError(f"`modules_to_save` entry {entry!r} matches no module{nearest(entry, modules)}")
        saved += found
    return saved


def _fresh_task_heads(model: nn.Module) -> list[str]:
    """Modules of a transformers task model outside its ``base_model`` that no pretrained file filled."""
    fresh = []
    for name, hf in hf_models(model):
        base = hf.base_model
        if base is hf or _output_embeddings(hf) is not None:
            continue
        for child_name, child in hf.named_children():
            parameters = list(child.parameters())
            # transformers marks the parameters that it read from a file
            new = parameters and not all(getattr(p, "_is_hf_initialized", False) for p in parameters)
            if child is not base and new:
                fresh.append(f"{name}.{child_name}" if name else child_name)
    return fresh


def _notice_task_head(names: list[str]) -> None:
    text = f"the task head {names} was freshly initialised: it is trained in full, as `modules_to_save`"
    warnings.warn(text, Notice, stacklevel=4)


def under(name: str, parents: list[str]) -> bool:
    """Whether a module is one of ``parents`` or inside one."""
    return any(name == p or name.startswith(f"{p}.") for p in parents)


def _has_no_embedding(model: nn.Module) -> bool:
    return not any(isinstance(m, nn.Embedding) for m in model.modules()) and not hf_models(model)


def _notice_no_head(names: list[str]) -> None:
    warnings.warn(
        f"the model has no embedding, so no output head was looked for: every linear is adapted ({_few(names)}); "
        "name one to leave alone in `exclude_modules`",
        Notice,
        stacklevel=3,
    )


def in_layers(names: list[str], config: AdapterConfig) -> list[str]:
    """Those of ``names`` that lie in the blocks of ``layers_to_transform``."""
    wanted = config.layers_to_transform
    if wanted is None:
        return names
    wanted = [wanted] if isinstance(wanted, int) else wanted
    pattern = rf"(?:.*\.)?{config.layers_pattern}\.(\d+)\." if config.layers_pattern else r"(?:[^.]+\.)*?(\d+)\."
    found = {name: int(match[1]) for name in names if (match := re.match(pattern, name))}
    absent = sorted(set(wanted) - set(found.values()))
    if found and absent:
        text = f"`layers_to_transform` {absent} are no blocks of the model; there are {sorted(set(found.values()))}"
        warnings.warn(text, Notice, stacklevel=3)
    return [name for name in names if found.get(name) in wanted]


def _say_unused_excludes(spec: str | list[str], linears: dict[str, nn.Module], prefix: str) -> None:
    entries: list[str | list[str]] = [spec] if isinstance(spec, str) else [[entry] for entry in spec]
    for entry in entries:
        if not any(matches(entry, name, prefix) for name in linears):
            text = (
                f"`exclude_modules` entry {''.join(entry)!r} matches no linear layer{nearest(''.join(entry), linears)}"
            )
            warnings.warn(text, Notice, stacklevel=4)


def _with_special(model: nn.Module, chosen: list[str], special: Mapping[str, Build], saved: list[str]) -> list[str]:
    """The chosen modules and the special ones, in model order."""
    for name in special:
        other = next((n for n in [*chosen, *saved] if n == name or under(n, [name]) or under(name, [n])), None)
        if other is not None:
            how = "in full (`modules_to_save`)" if other in saved else "by `target_modules`"
            raise UnsupportedError(
                f"{name!r} is to be trained by `trainable_token_indices` or `target_parameters` and {other!r} {how}: "
                "choose one of the two"
            )
    wanted = {*chosen, *special}
    return [name for name, _ in model.named_modules() if name in wanted]


def _check_target_entries(
    model: nn.Module,
    spec: str | list[str],
    prefix: str,
    layers: dict[str, nn.Module],
    linears: dict[str, nn.Module],
) -> None:
    if isinstance(spec, str):
        return
    others = {name: m for name, m in model.named_modules() if name and name not in layers}
    unmatched = []
    for entry in spec:
        if any(matches([entry], name, prefix) for name in layers):
            continue
        wrong = [name for name in others if matches([entry], name, prefix)]
        if wrong:
            kind = type(others[wrong[0]]).__name__
            raise TargetError(
                f"`target_modules` entry {entry!r} names {wrong[0]!r}, a {kind}: only linear layers (nn.Linear, "
                "transformers' Conv1D) can be adapted, and by LoRA embeddings, convolutions and nn.MultiheadAttention; "
                "name the layers inside it"
            )
        unmatched.append(entry)
    if unmatched and len(unmatched) < len(spec):
        hints = "".join(nearest(entry, linears) for entry in unmatched[:1])
        warnings.warn(f"`target_modules` entries {unmatched} match no linear layer{hints}", Notice, stacklevel=3)


def _check_patterns(config: AdapterConfig, chosen: list[str], prefix: str) -> None:
    for argument, table in config.patterns().items():
        for key in table:
            if not any(matches_pattern(key, *names_of(name, prefix)) for name in chosen):
                raise TargetError(f"`{argument}` entry {key!r} matches no adapted layer{nearest(key, chosen)}")


def _say_untied(model: nn.Module, saved: list[str]) -> None:
    """A weight that two modules share is trained in the saved one alone."""
    parts = {id(p) for name in saved for p in model.get_submodule(name).parameters()}
    outside = [
        name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in parts and not under(name, saved)
    ]
    if outside:
        warnings.warn(
            f"{outside[0]!r} shares its weight with a module of `modules_to_save` ({saved}): the two come apart, "
            "one trained and one frozen, and a merged model is written untied; name both to train both",
            Notice,
            stacklevel=4,
        )


def _check_other_owner(linears: dict[str, nn.Module], config: AdapterConfig) -> None:
    taken = [name for name, m in linears.items() if quantized_elsewhere(m)]
    if taken and config.quantize != "none":
        raise UnsupportedError(
            f"{len(taken)} layers, {taken[0]!r} first, are already quantized by bitsandbytes: leave "
            '`quantize="none"` to train adapters over them as they are, or load the model in full or half precision '
            f"and let `quantize={config.quantize!r}` pack it"
        )


def _nothing_matched(model: nn.Module, config: AdapterConfig, linears: dict[str, nn.Module]) -> str:
    if not linears:
        return "the model has no linear layer to adapt (was it built yet? build it in __init__ or configure_model)"
    spec = config.target_modules
    entries = [spec] if isinstance(spec, str) else spec
    hint = "" if spec == "all-linear" else "".join(nearest(entry, linears) for entry in entries[:2])
    if isinstance(spec, str) and any(matches([spec], name) for name in linears):
        hint = f"; a string is a regular expression for whole names: write [{spec!r}] for a name's end"
    limits = [
        f"{name}={value!r}"
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern")
        if (value := getattr(config, name)) is not None
    ]
    narrowed = f" with {', '.join(limits)}" if limits else ""
    return f"`target_modules`={spec!r}{narrowed} chose none of {len(linears)} linear layers{hint or _sample(linears)}"


def nearest(entry: str, names: Iterable[str]) -> str:
    """``; the nearest names are ...``, comparing last name parts first."""
    by_suffix = {name.rsplit(".", 1)[-1]: name for name in names}
    close = difflib.get_close_matches(entry, list(by_suffix), n=3, cutoff=0.5)
    close = close or difflib.get_close_matches(entry, list(names), n=3, cutoff=0.4)
    return f"; the nearest names are {close}" if close else _sample(names)


def _sample(names: Iterable[str]) -> str:
    suffixes = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return f"; there are {_few(suffixes)}"


def _few(names: list[str], count: int = 8) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
