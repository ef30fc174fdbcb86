# SPDX-License-Identifier: Apache-2.0
"""`AdapterFSDPStrategy`: FSDP 1, with adapters in units of their own.

FSDP 1 joins the parameters of a unit into one flat vector, of which each process keeps a part. A unit of frozen and
trained parameters would hold gradients for all of them, so each adapter is wrapped by itself. Between steps a
parameter is the part of it that this process holds, and so is its optimizer state; the parts of all processes, one
after the other, are the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import UnsupportedError
from lightning_lora.model.inner import clean_name
from lightning_lora.model.optimizers import fitting_state
from lightning_lora.model.sharding import check_plan, plan_blocks, without_units
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.model.unbuilt import refuse_unbuilt
from lightning_lora.nn.adapter import Use
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.ranks import gather
from lightning_lora.strategies.ddp import compare_bases
from lightning_lora.strategies.sharded import ShardedStateMixin


class FSDPStateMixin(ShardedStateMixin):
    """What `attach` gives a user's own `FSDPStrategy`: his wrapping policy, and a unit for each adapter."""

    kwargs: dict[str, Any]
    _shapes: dict[str, torch.Size]  # of what is trained, whole

    @property
    def writes_shards(self) -> bool:
        """``state_dict_type="sharded"``."""
        return bool(self._state_dict_type == "sharded")  # type: ignore[attr-defined]  # Lightning has no public name

    def shard(self, module: nn.Module) -> None:
        """Say what will be wrapped; Lightning wraps it in ``setup``.

        Raises:
            UnsupportedError: ``use_orig_params=False``, ``modules_to_save``, DoRA, or packed weights that mixed
                precision would cast.
            BaseMismatchError: The processes built different bases.
        """
        if any(_is_wrapped(m) for m in module.modules()):
            return
        if not self.kwargs.get("use_orig_params", True):
            raise UnsupportedError("`use_orig_params=False` hides the adapters from optimizers: leave it out")
        compare_bases(module, self.world_size)
        self._shapes = {name: tensor.shape for name, tensor in adapter_state_dict(module).items()}
        self._store_codes(module)
        fsdp2: dict[Use, str] = {"fsdp2": 'use the strategy "lora_model_parallel" (FSDP 2)'}
        refuse_unbuilt(module, "fsdp1", "FSDP 1", fsdp2, 'use the strategy "lora_ddp"')
        units: set[nn.Module] = {m.added for _, m in adapter_modules(module)}
        policy = self.kwargs.get("auto_wrap_policy")
        self.kwargs["auto_wrap_policy"] = _with_units(policy, {*units, *self._blocks(module)})

    def whole_module(self, base: bool = False) -> nn.Module | None:
        """A copy with plain tensors on the first process; the adapters' alone, or the base's too."""
        with _whole(self._root(), None if base else self._units()):
            return without_units(self._converted_module(), copies=base) if self.is_global_zero else None

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The adapters: this process's shards, or whole tensors on the first process and nothing on the others."""
        with _whole(self._root(), self._units()):
            state = adapter_state_dict(self._converted_module())
            found = {name: self._kept(tensor) for name, tensor in state.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load adapters; every one of them must be in the checkpoint and fit."""
        with _whole(self._root(), self._units(), write=True):
            super().load_model_state_dict(checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As torch's own ``state_dict``, with tensors put together as those of the adapters are."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        whole: dict[int, dict[str, Any]] = {}
        for number, (name, parameter) in self._names(optimizer).items():
            # A process that holds nothing of a parameter has no gradient for it either, and no state.
            values = state["state"].get(number, {})
            held = {key: None if _is_part(value, parameter) else value for key, value in values.items()}
            told = gather((parameter.numel(), held))
            sizes = [size for size, _ in told]
            each = dict(next((found for _, found in told if found), {}))
            for key in [key for key, value in each.items() if value is None]:
                joined = _joined(values.get(key, parameter.detach().new_empty(0)), sizes)
                each[key] = self._kept(joined.view(self._shapes[name]))
            if each and (self.writes_shards or self.is_global_zero):
                whole[number] = each
        return {**state, "state": whole}

    def _load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            names = self._names(optimizer)
            state = fitting_state(stored, optimizer, [self._shapes[name] for name, _ in names.values()])
            parts = {}
            for number, values in state["state"].items():
                name, parameter = names[int(number)]
                before = sum(gather(parameter.numel())[: self.global_rank])
                own = slice(before, before + parameter.numel())
                parts[number] = {
                    key: value.reshape(-1)[own].clone()
                    if isinstance(value, Tensor) and value.shape == self._shapes[name]
                    else value
                    for key, value in values.items()
                }
            optimizer.load_state_dict({**state, "state": parts})

    def _shard_like(self, name: str) -> Tensor | None:
        return None  # the parts of flat vectors are no shards of tensors: whole adapters are read

    def _blocks(self, module: nn.Module) -> list[nn.Module]:
        """What is wrapped beside adapters and what the user's own policy says."""
        return []

    def _root(self) -> nn.Module:
        """What Lightning wrapped, or the module where its parts are wrapped by themselves."""
        return self.model or self._converted_module()

    def _units(self) -> list[nn.Module]:
        """The wrappers of what is trained."""
        adapters = [m.adapter for _, m in adapter_modules(self._converted_module()) if isinstance(m, LoRALinear)]
        return [unit for unit in adapters if _is_wrapped(unit)]

    def _names(self, optimizer: Optimizer) -> dict[int, tuple[str, Tensor]]:
        """An optimizer's parameters with their names, under the numbers that its ``state_dict`` gives them."""
        names = {id(p): clean_name(name) for name, p in self._converted_module().named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return {number: (names[id(p)], p) for number, p in enumerate(parameters)}

    def _kept(self, whole: Tensor) -> Tensor | None:
        """A whole tensor as this process is to write it."""
        if not self.writes_shards:
            return whole.detach().cpu().clone() if self.is_global_zero else None
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        mesh = init_device_mesh(whole.device.type, (self.world_size,))
        return distribute_tensor(whole.detach().clone(), mesh, [Shard(0)], src_data_rank=None)

    def _store_codes(self, module: nn.Module) -> None:
        """FSDP 1 joins floating tensors of one dtype only: packed codes are stored as such, their bits unchanged."""
        packed = [m for m in module.modules() if isinstance(m, PackedWeight)]
        if not packed:
            return
        dtypes = {p.dtype for p in module.parameters() if not p.requires_grad and p.is_floating_point()}
        dtypes = dtypes or {packed[0].source_dtype}
        mixed = getattr(self.mixed_precision_config, "param_dtype", None)  # type: ignore[attr-defined]
        if len(dtypes) > 1 or (mixed is not None and mixed not in dtypes):
            raise UnsupportedError(
                "a packed base under FSDP 1 must be of one dtype that is not cast: it is of "
                f"{sorted(map(str, dtypes))} and mixed precision computes in {mixed}. Use "
                '`precision="bf16-true"`, or the strategy "lora_model_parallel"'
            )
        for weight in packed:
            weight.as_parameters(storage=next(iter(dtypes)))


class AdapterFSDPStrategy(FSDPStateMixin, FSDPStrategy):
    """Lightning's `FSDPStrategy` with adapter-only checkpoints and wrapping by names; ``strategy="lora_fsdp"``.

    Args:
        fsdp_plan: Which modules become units: "auto" for transformer blocks, or a list of module names, each a suffix
            of dotted names or a regular expression that matches one. Adapters are always units of their own.
        kwargs: Every argument of Lightning's strategy: ``state_dict_type``, ``sharding_strategy``, ``cpu_offload`` ...

    Raises:
        ConfigError: The plan is no plan.
        TargetError: A name of the plan matches no module.
    """

    strategy_name = "lora_fsdp"

    def __init__(self, fsdp_plan: Literal["auto"] | list[str] = "auto", **kwargs: Any) -> None:
        check_plan(fsdp_plan)
        super().__init__(**kwargs)
        self.fsdp_plan = fsdp_plan

    def _blocks(self, module: nn.Module) -> list[nn.Module]:
        return [module.get_submodule(name) for name in plan_blocks(module, self.fsdp_plan)]


def _is_wrapped(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


@contextmanager
def _whole(root: nn.Module, units: list[nn.Module] | None, write: bool = False) -> Iterator[None]:
    """Inside, parameters are whole on every process: those of ``units``, or all below ``root``."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    if _is_wrapped(root) and getattr(root, "_is_root", True) is None:  # torch has no public word for it
        with FSDP.summon_full_params(root, recurse=False, writeback=False):
            pass  # before the first forward the first unit that is summoned would take itself for the root
    with ExitStack() as stack:
        for unit in [m for m in root.modules() if _is_wrapped(m)] if units is None else units:
            stack.enter_context(FSDP.summon_full_params(unit, recurse=False, writeback=write))
        yield


def _with_units(policy: Any, units: set[nn.Module]) -> Any:
    """The user's wrapping policy, or none, that wraps ``units`` too."""
    from torch.distributed.fsdp.wrap import CustomPolicy

    if policy is None:
        return CustomPolicy(lambda module: module in units)
    if callable(policy) and not hasattr(policy, "_run_policy"):

        def either(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            if not recurse and module in units:
                return True
            return bool(policy(module=module, recurse=recurse, nonwrapped_numel=nonwrapped_numel))

        return either

    class Both(CustomPolicy):
        """One of torch's policies and the units."""

        def _run_policy(self, root_module: nn.Module, ignored_modules: set[nn.Module], root_kwargs: Any) -> Any:
            chosen: dict[nn.Module, Any] = policy._run_policy(root_module, ignored_modules, root_kwargs)
            return {**chosen, **super()._run_policy(root_module, ignored_modules, root_kwargs)}

    return Both(lambda module: module in units)


def _is_part(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0


def _joined(part: Tensor, sizes: list[int]) -> Tensor:
    """The parts of all processes, one after the other; a collective."""
    padded = part.new_zeros(max(sizes))
    padded[: part.numel()] = part.reshape(-1)
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])
