# SPDX-License-Identifier: Apache-2.0
"""`find_sublayers`: the attention and feed-forward sublayers of transformer blocks, by their structure.

A block is an item of a list of modules of one class that hold norms and linears. In it, what holds linears and no norm
of the hidden states is a part of a sublayer; a bare linear that follows belongs to the part before it (BERT's
``output.dense``), and what comes last gives the sublayer's output::

    Llama      self_attn | mlp
    GPT-2      attn | mlp
    Mixtral    self_attn | mlp
    T5         SelfAttention | EncDecAttention | DenseReluDense
    BERT       attention.self, attention.output.dense | intermediate, output.dense
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lora.config import BottleneckConfig
from lightning_lora.errors import TargetError, UnsupportedError
from lightning_lora.model.inner import inner_model
from lightning_lora.model.targets import Targets, in_layers, matches, nearest, packed_linears, saved_modules, under
from lightning_lora.nn.bottleneck import is_linear


@dataclass(frozen=True)
class Sublayer:
    """One attention or feed-forward sublayer.

    Args:
        name: Of the module that gives its output, before the residual is added.
        kind: "attention" or "feed_forward".
        width: Of the hidden states.
        whole: Whether that module reads the sublayer's input too.
    """

    name: str
    kind: str
    width: int
    whole: bool


def find_sublayers(model: nn.Module) -> list[Sublayer]:
    """Every sublayer of every transformer block, in model order; none where there are no blocks.

    Args:
        model: Any module.
    """
    found: list[Sublayer] = []
    for name, block in _blocks(model, ""):
        found += _sublayers(name, block)
    return found


def bottleneck_targets(model: nn.Module, config: BottleneckConfig) -> Targets:
    """Choose sublayers as ``config`` says.

    Raises:
        TargetError: No blocks were found, or an entry matches nothing, or one module lies in another.
        UnsupportedError: The adapters are to read what sublayers read that are not one module.
    """
    prefix = inner_model(model)[0]
    saved = saved_modules(model, config, prefix)
    found = find_sublayers(model)
    spec = config.target_modules
    if spec == "blocks":
        chosen = [s.name for s in found if config.placement == "houlsby" or s.kind == "feed_forward"]
        if not chosen:
            raise TargetError(
                f"{type(model).__name__} has no transformer blocks whose sublayers are known: name modules that give "
                "hidden states in `target_modules`"
            )
    else:
        names = {name: m for name, m in model.named_modules() if name}
        for entry in [spec] if isinstance(spec, str) else spec:
            if not any(matches(entry if isinstance(spec, str) else [entry], name, prefix) for name in names):
                raise TargetError(f"`target_modules` entry {entry!r} matches no module{nearest(entry, names)}")
        chosen = [name for name in names if matches(spec, name, prefix)]
    if config.exclude_modules is not None:
        chosen = [name for name in chosen if not matches(config.exclude_modules, name, prefix)]
    chosen = in_layers([name for name in chosen if not under(name, saved)], config)
    if not chosen:
        raise TargetError("`exclude_modules`, `layers_to_transform` and `modules_to_save` leave no sublayer to adapt")
    inside = next((name for name in chosen if under(name, [other for other in chosen if other != name])), None)
    if inside is not None:
        raise TargetError(f"`target_modules` names {inside!r} and a module around it: name one of them")
    _check_reads(model, config, chosen, {s.name: s for s in found})
    return Targets(chosen, packed_linears(model, config, saved, []), saved)


def _check_reads(model: nn.Module, config: BottleneckConfig, chosen: list[str], found: dict[str, Sublayer]) -> None:
    if config.mode != "parallel":
        return
    for name in chosen:
        if is_linear(model.get_submodule(name)) or (name in found and not found[name].whole):
            raise UnsupportedError(
                f'`mode="parallel"` reads what a sublayer reads, and {name!r} is only the end of one: use '
                '`mode="sequential"`, or name whole sublayers in `target_modules`'
            )


def block_width(block: nn.Module) -> int | None:
    """The width of a block's hidden states: of its widest norm. None where it has none."""
    return max((_width(m) for m in block.modules() if _is_norm(m)), default=None)


def _blocks(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Items of the outermost lists of alike modules that look like blocks."""
    for own, child in module.named_children():
        path = f"{name}.{own}" if name else own
        items = list(child.children())
        if (
            isinstance(child, nn.ModuleList | nn.Sequential)
            and items
            and len({type(item) for item in items}) == 1
            and all(_is_block(item) for item in items)
        ):
            yield from ((f"{path}.{number}", item) for number, item in child.named_children())
        else:
            yield from _blocks(child, path)


def _is_block(module: nn.Module) -> bool:
    return block_width(module) is not None and {s.kind for s in _sublayers("", module)} == {"attention", "feed_forward"}


def _sublayers(name: str, block: nn.Module) -> list[Sublayer]:
    width = block_width(block)
    if width is None:
        return []
    groups: list[tuple[str, list[tuple[str, nn.Module]]]] = []
    for path, part in _parts(block, "", width):
        kind = "attention" if any(word in path.lower() for word in ("attn", "attention")) else "feed_forward"
        if groups and groups[-1][0] == kind and is_linear(part):
            groups[-1][1].append((path, part))
        else:
            groups.append((kind, [(path, part)]))
    found = []
    for kind, parts in groups:
        path, part = parts[-1]
        if _adds_residual(part):
            continue
        full = f"{name}.{path}" if name else path
        found.append(Sublayer(full, kind, width, whole=len(parts) == 1 and not is_linear(part)))
    return found


def _parts(module: nn.Module, name: str, width: int) -> Iterator[tuple[str, nn.Module]]:
    """What holds weights and no norm of the hidden states, outermost, in order."""
    for own, child in module.named_children():
        path = f"{name}.{own}" if name else own
        if _is_norm(child) or isinstance(child, nn.Embedding) or not any(True for _ in child.parameters()):
            continue
        if any(_is_norm(m) and _width(m) == width for m in child.modules()):
            yield from _parts(child, path, width)
        else:
            yield path, child


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None


def _width(norm: nn.Module) -> int:
    weight: Tensor = norm.weight  # type: ignore[assignment]
    return weight.shape[-1]


def _adds_residual(module: nn.Module) -> bool:
    """Whether a module takes the residual and adds it itself: what it gives is no sublayer's output alone."""
    return "residual" in inspect.signature(type(module).forward).parameters
