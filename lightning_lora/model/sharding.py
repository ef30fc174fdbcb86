# SPDX-License-Identifier: Apache-2.0
"""Spread a converted model over processes by FSDP 2, from names alone.

Every unit is gathered as it is entered and freed as it is left. The units are::

    root                      what no other unit holds (embeddings, norms, head)     frozen
    blocks of the plan        their frozen weights, packed codes as uint8 shards     frozen
    each `LoRALinear`         its A and B, nothing else                              trained
    each `SavedModule`        its trained copy, nothing else                         trained

Frozen and trained parameters never share a unit, so gradients are reduced for the adapters alone. (An adapted
linear that lies in no other module is its own root, and the one exception.)
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, TargetError, UnsupportedError
from lightning_lora.model.slots import adapter_modules, is_adapted
from lightning_lora.model.unbuilt import refuse_unbuilt
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.nn.saved import SavedModule
from lightning_lora.nn.sharded import is_sharded, whole, whole_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_plan(plan: str | Sequence[str]) -> None:
    """See that ``plan`` is one.

    Raises:
        ConfigError: It is neither "auto" nor a list of names.
    """
    named = isinstance(plan, list | tuple) and all(isinstance(name, str) and name for name in plan)
    if plan != "auto" and not named:
        raise ConfigError(f'`fsdp_plan` must be "auto" or a list of module names or regular expressions, got {plan!r}')


def shard_model(model: nn.Module, mesh: DeviceMesh, plan: str | Sequence[str] = "auto") -> list[str]:
    """Apply ``torch.distributed.fsdp.fully_shard`` to ``model``, in place.

    Args:
        model: A converted module, whole on every process and the same on all of them. Parts that are called
            themselves (a LightningModule's children) become roots.
        mesh: The data-parallel mesh, of one dimension.
        plan: Which modules become units of their own beside roots and adapters: "auto" for the blocks of the
            outermost lists that hold adapters, or names, each a suffix of dotted names or a regular expression
            that matches one.

    Returns:
        The names of the blocks.

    Raises:
        ConfigError: The plan is no plan.
        TargetError: A name of the plan matches no module.
        UnsupportedError: The model has no adapters, or is sharded already.
    """
    from torch.distributed.fsdp import fully_shard

    check_plan(plan)
    if not is_adapted(model):
        raise UnsupportedError("only a model with adapters is sharded here: call `apply_lora(model, config)` first")
    refuse_unbuilt(model, "fsdp2", "FSDP 2", {}, 'use the strategy "lora_ddp"')
    if is_fully_sharded(model):
        raise UnsupportedError("the model is sharded already; leave the sharding to one place")
    blocks = plan_blocks(model, plan)
    for weight in [m for m in model.modules() if isinstance(m, PackedWeight)]:
        weight.as_parameters()
    adapters = [module for _, module in adapter_modules(model)]
    trained = {p for module in adapters for p in module.parameters() if p.requires_grad}
    # From within outwards: a unit leaves out what an inner one holds already. The adapters' units lie inside
    # their blocks and are made last, of what all others were told to ignore.
    for name in sorted(blocks, key=lambda n: -n.count(".")):
        fully_shard(model.get_submodule(name), mesh=mesh, ignored_params=trained)
    roots = list(_roots(model))
    for root in roots:
        if not isinstance(root, LoRALinear):
            fully_shard(root, mesh=mesh, ignored_params=trained)
    for module in adapters:
        unit = module.trained if isinstance(module, SavedModule) else module
        held = set() if module in roots else {p for p in module.parameters() if p not in trained}
        fully_shard(unit, mesh=mesh, ignored_params=held)
    return blocks


@torch.no_grad()
def gathered(model: nn.Module, keep: bool, base: bool = True) -> nn.Module | None:
    """A copy of a sharded model that needs no other process: plain tensors on the CPU, no hooks of FSDP's.

    Every process takes part, tensor by tensor; what is not sharded is shared with ``model``.

    Args:
        model: The sharded model.
        keep: Whether this process is to have the copy; the others hold one tensor at a time.
        base: Whether the frozen base is wanted too; without it, its tensors are on the meta device.

    Returns:
        The copy, None without ``keep``.
    """
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    copies: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if not is_sharded(tensor):
            copies[id(tensor)] = tensor
            continue
        if base or id(tensor) in wanted:
            full = whole(tensor).detach().cpu()
        else:
            full = torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")
        if keep:
            copies[id(tensor)] = nn.Parameter(full, requires_grad=tensor.requires_grad)
        del full
    return _plain(model, copies, {}) if keep else None


@torch.no_grad()
def without_units(model: nn.Module, copies: bool) -> nn.Module:
    """A copy of a model that FSDP 1 wrapped, without the wrappers, while its parameters are whole.

    Args:
        model: The model, with the parameters that are wanted whole.
        copies: Whether all of them are; otherwise those that are not trained go to the meta device.
    """
    made: dict[int, Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if isinstance(tensor, nn.Parameter):
            full = tensor.detach().cpu().clone() if copies or tensor.requires_grad else tensor.detach().to("meta")
            made[id(tensor)] = nn.Parameter(full, requires_grad=tensor.requires_grad)
        else:
            made[id(tensor)] = tensor
    return _plain(model, made, {})


def is_sharded_model(model: nn.Module) -> bool:
    """Whether any parameter of ``model`` is spread over processes, by FSDP 2 or by tensor parallelism."""
    return any(is_sharded(p) for p in model.parameters())


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP 2 holds any part of ``model``."""
    return any(_is_unit(module) for module in model.modules())


def needs_every_rank(model: nn.Module) -> bool:
    """Whether a forward of ``model`` waits for the other processes: FSDP 1 or 2, tensor parallelism, ZeRO 3."""
    wrapped = any(type(module).__module__.startswith("torch.distributed.fsdp") for module in model.modules())
    zero = any(hasattr(p, "ds_id") for p in model.parameters())
    return wrapped or zero or is_sharded_model(model) or is_fully_sharded(model)


def plan_blocks(model: nn.Module, plan: str | Sequence[str]) -> list[str]:
    """The names of the modules that ``plan`` means.

    Raises:
        ConfigError, TargetError: As of `shard_model`.
    """
    return find_blocks(model) if plan == "auto" else _named(model, plan)


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the members of the outermost module lists that hold adapters: a transformer's blocks."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{block}.") for block in found):
            continue
        members = [(f"{name}.{key}" if name else key, member) for key, member in module.named_children()]
        found += [n for n, m in members if is_adapted(m) and not isinstance(m, AdapterModule)]
    return found


def _named(model: nn.Module, plan: Sequence[str]) -> list[str]:
    names = [n for n, m in model.named_modules() if n and not isinstance(m, nn.ModuleList | nn.ModuleDict)]
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, AdapterModule))
    names = [n for n in names if not n.startswith(inside) and not isinstance(model.get_submodule(n), AdapterModule)]
    found: dict[str, None] = {}
    for pattern in plan:
        try:
            matching = [n for n in names if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", n)]
        except re.error as error:
            raise ConfigError(f"`fsdp_plan` holds {pattern!r}, which is no regular expression: {error}") from error
        if not matching and any(re.fullmatch(rf"(?:.*\.)?(?:{pattern})", n.rstrip(".")) for n in inside):
            raise TargetError(
                f"`fsdp_plan` names {pattern!r}, an adapted layer: its adapter is a unit of its own already; name the "
                "module around it"
            )
        if not matching:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise TargetError(f"`fsdp_plan` names {pattern!r}, which matches no module; there are, for one, {near}")
        found.update(dict.fromkeys(matching))
    return list(found)


def _roots(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parameters that are called themselves: a LightningModule and containers are not."""
    for child in model.children():
        if not any(True for _ in child.parameters()):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _roots(child)
        elif isinstance(child, SavedModule):
            yield child.original
        elif not _is_unit(child):
            yield child


def _plain(module: nn.Module, tensors: dict[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
    """``module`` once more over other tensors; everything that is neither tensor nor module is shared."""
    if id(module) in made:
        return made[id(module)]
    inner = module._modules.get("_fsdp_wrapped_module")
    if inner is not None:  # FSDP 1's wrapper
        made[id(module)] = _plain(inner, tensors, made)
        return made[id(module)]
    kind = type(module).__mro__[2] if _is_unit(module) else type(module)  # FSDP<X>, FSDPModule, X
    copy: nn.Module = object.__new__(kind)
    made[id(module)] = copy
    vars(copy).update(vars(module))
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        vars(copy)[name] = OrderedDict((k, h) for k, h in vars(module)[name].items() if not _distributes(h))
    for name in ("_parameters", "_buffers"):
        vars(copy)[name] = {k: t if t is None else tensors[id(t)] for k, t in vars(module)[name].items()}
    vars(copy)["_modules"] = {
        k: m if m is None else _plain(m, tensors, made) for k, m in vars(module)["_modules"].items()
    }
    return copy


def _distributes(hook: Callable[..., Any]) -> bool:
    """Whether a hook is one of those by which torch or DeepSpeed gathers, sends or spreads tensors."""
    function = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(function, "__module__", "")).startswith(("torch.distributed.", "deepspeed."))


def _is_unit(module: nn.Module) -> bool:
    """Whether FSDP 2 holds ``module``."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
