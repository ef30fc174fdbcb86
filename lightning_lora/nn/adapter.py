# SPDX-License-Identifier: Apache-2.0
"""`AdapterModule`: what stands in the model where a module of the user's stood; the seam of every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.sharded import is_sharded


class Held(NamedTuple):
    """What one adapter has in one module: its tensors, by their names there, and how they are used.

    The fields from ``r`` on are those of a low-rank update.
    """

    tensors: dict[str, Tensor]
    strength: float = 1.0
    r: int = 0
    lora_alpha: float = 0.0
    use_rslora: bool = False
    lora_dropout: float = 0.0

    def detached(self) -> Held:
        """The same values apart from the parameters that held them."""
        return self._replace(tensors={name: tensor.detach() for name, tensor in self.tensors.items()})


#: What a kind of adapter has to be built for, beyond one device, DDP, checkpoints, folders and switching off.
Use = Literal["fsdp1", "fsdp2", "deepspeed", "tensor_parallel", "mixed_batch", "combining", "portable", "beside"]


class AdapterModule(nn.Module):
    """Base of every module that replaces one of the user's. Adapters are known by this type, never by name.

    ``enabled``, ``vacant`` and ``strength`` are plain attributes: switched off, a module computes exactly what
    the module that it replaced computes. It holds one adapter, the one in use, or is ``vacant``: another adapter
    of the model has something here. Those not in use wait in the record, under the module's ``slot``.

    Args:
        record: What `apply_lora` did, shared by all modules of one call.
    """

    #: What texts call this kind.
    title: str = "this method"
    #: What it was built for; all else is refused by name.
    built_for: frozenset[Use] = frozenset()
    #: Why what it does cannot be folded into weights; None where it can.
    unmergeable: str | None = None
    #: Why there is nothing between the base and what was trained; None where every strength is taken.
    indivisible: str | None = None
    #: The child that is the user's module, where others of the user's modules lie inside it that have names in files.
    inner: str | None = None

    def __init__(self, record: AdapterRecord) -> None:
        super().__init__()
        self.record = record
        self.slot = record.new_slot()
        self.enabled = True
        self.vacant = False
        self.strength = 1.0
        self.learns = True  # whether parameters that come into a vacant module need gradients

    def own_names(self) -> list[str]:
        """Names, inside this module, of the parameters and buffers that an adapter has in it."""
        raise NotImplementedError

    def trained_names(self) -> list[str]:
        """Those that training owns and checkpoints keep: `own_names`, none in a vacant module."""
        return [] if self.vacant else self.own_names()

    def base_names(self) -> list[str]:
        """Those of `own_names` that hold a part of the base, alike in every process; none unless a method moves one."""
        return []

    def drawn(self) -> dict[str, Tensor]:
        """By name, tensors that the adapter needs and no file holds, since a seed gives them again."""
        return {}

    def untrained(self) -> bool:
        """Whether the module still computes exactly the base (B is zero, a saved module equals its original)."""
        raise NotImplementedError

    @property
    def replaced(self) -> nn.Module:
        """The user's module that this one stands for."""
        raise NotImplementedError

    @property
    def added(self) -> nn.Module:
        """The part of this module that conversion put beside the user's: it holds what an adapter has here."""
        raise NotImplementedError

    def watched(self) -> list[nn.Parameter]:
        """Parameters of which one at least has a gradient other than zero at the first step of any sound run."""
        return []

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """By name of a parameter of the user's module, the parameters that training moves in its stead."""
        raise NotImplementedError

    def held(self) -> Held | None:
        """What the adapter in use has here, the live parameters themselves; None in a vacant module."""
        if self.vacant:
            return None
        return Held({name: self.live(name) for name in self.own_names()}, self.strength)

    def hold(self, held: Held | None, in_place: bool = True) -> None:
        """Take an adapter's part in, and leave vacant for None; what was here is let go.

        Args:
            held: Tensors that fit the device and dtype of those here; they are taken as they are, not copied.
            in_place: Whether the parameters stay the objects that an optimizer knows, with other values. Else they
                are replaced, by those of ``held`` where it has parameters.
        """
        if not self.vacant:
            learning = [self.live(name).requires_grad for name in self.own_names()]
            self.learns = any(learning)
        for name, tensor in (self._nothing() if held is None else held.tensors).items():
            self._put(name, tensor, in_place, learns=held is not None and self.learns)
        self.vacant = held is None
        self.strength = 1.0 if held is None else held.strength

    def objects(self) -> dict[str, Tensor]:
        """The parameters and buffers that adapters have here, in a vacant module too."""
        return {name: self.live(name) for name in self.own_names()}

    def put_back(self, objects: dict[str, Tensor], held: Held | None) -> None:
        """Undo a `hold` that was not in place.

        Args:
            objects: What `objects` gave before.
            held: What `held` gave before, made of the same parameters.
        """
        self.hold(held, in_place=False)
        for name, tensor in objects.items() if held is None else ():
            self._put(name, tensor, in_place=False, learns=False)

    def exchange(self, held: Held | None, changed: list[Tensor]) -> Held | None:
        """`hold` in place, and what was here; parameters whose values are others now are added to ``changed``."""
        if held is not None and not self.is_plain():
            held = self.fitted(held)
        former = self.held()
        former = None if former is None else former.detached()
        self.hold(held)
        changed.extend(tensor for tensor in self.objects().values() if isinstance(tensor, nn.Parameter))
        return former

    def fitted(self, held: Held) -> Held:
        """The same on the device and in the dtypes of this module's own tensors.

        Raises:
            UnsupportedError: Those are sharded or on the meta device.
        """
        tensors = {}
        for name, tensor in held.tensors.items():
            own = self.live(name)
            if own.is_meta or is_sharded(own):
                raise UnsupportedError(
                    "the adapters are sharded or on the meta device: adapters are loaded and swapped before "
                    "`fully_shard`, once they have values"
                )
            tensor = tensor.detach().to(own.device, own.dtype)
            if tensor.is_inference():  # made inside `torch.inference_mode`: it could never be trained
                with torch.inference_mode(False):
                    tensor = tensor.clone()
            tensors[name] = tensor
        return held._replace(tensors=tensors)

    def is_plain(self) -> bool:
        """Whether the tensors here are of this process alone."""
        return not any(is_sharded(tensor) for tensor in self.objects().values())

    def live(self, name: str) -> Tensor:
        """The parameter or buffer of this name inside the module."""
        parent, _, own = name.rpartition(".")
        return getattr(self.get_submodule(parent), own)

    def restoring(self, values: Mapping[str, Tensor]) -> Callable[[], None] | None:
        """What is to be done before values of another run are copied into this module; None if nothing is.

        Args:
            values: By name inside the module, every tensor of `own_names`, of the right shape.
        """
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.record.moves += 1
        return super()._apply(fn, recurse)

    def _nothing(self) -> dict[str, Tensor]:
        """The tensors of a vacant module, without memory of their own."""
        raise NotImplementedError

    def _put(self, name: str, tensor: Tensor, in_place: bool, learns: bool) -> None:
        parent, _, own = name.rpartition(".")
        module, old = self.get_submodule(parent), self.live(name)
        if not isinstance(old, nn.Parameter):
            setattr(module, own, tensor)
        elif in_place:
            old.data = tensor.detach()
            old.requires_grad_(learns and old.is_floating_point())
        elif isinstance(tensor, nn.Parameter):
            if (tensor.device, tensor.dtype) != (old.device, old.dtype):
                tensor.data = tensor.data.to(old.device, old.dtype)  # the model has moved while it was away
            setattr(module, own, tensor)
        else:
            setattr(module, own, nn.Parameter(tensor, learns and tensor.is_floating_point()))


class KeepsDType(nn.Module):
    """A module whose tensors move between devices but keep their dtypes under ``.to(dtype)``, ``.half()`` ...

    Lightning's ``bf16-true`` and ``16-true`` cast the whole model after conversion. Master adapters would
    lose their small updates and quantization constants their meaning, so both opt out here.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


def freeze_statistics(module: nn.Module) -> bool:
    """Keep a normalisation layer's running statistics as they are in training; whether it has any."""
    if not getattr(module, "track_running_stats", False):
        return False
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        module.momentum = 0.0  # without tracking it would leave its statistics out of evaluation too
    else:
        module.track_running_stats = False  # type: ignore[assignment]  # batch statistics in training, no update
    return True


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a configuration's "fp32", "bf16" or "fp16" names."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
