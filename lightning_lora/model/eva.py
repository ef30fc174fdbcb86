# SPDX-License-Identifier: Apache-2.0
"""EVA (Paischer et al. 2024): A begins as the directions in which a layer's inputs vary most; B is zero.

    X   the inputs of a layer over some batches (N, in), their mean taken off
    X = U S V^T        A = the first r rows of V^T

Inputs are never kept. Of what was seen stay the count n, the mean m and the rows ``R = S V^T`` of the k largest
directions, k some times r; two such are joined into that of both::

    n = n1 + n2,    R = [R1; R2; sqrt(n1 n2 / n) (m1 - m2)], cut to its k largest directions

which is exact but for the cut (Ross et al. 2008). Ranks are as configured: the paper's second step, which takes rank
from one layer to give it to another, is not built.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, Notice, UnsupportedError
from lightning_lora.model.inner import evaluating
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.nn.residual import ResidualLoRALinear
from lightning_lora.nn.starts import top_singular, top_singular_randomized
from lightning_lora.ranks import from_rank_zero, gather, rank_and_world, together
from lightning_lora.rng import preserve_rng

#: How a batch goes through the model.
Forward = Callable[[nn.Module, Any], Any]

_EXACT = 512  # up to this size of the smaller side a matrix is decomposed in full
_ROUNDS = 4  # of the randomized decomposition beyond it
_NOTHING = 1e-6  # share of the largest singular value below which a direction is rounding


@dataclass(frozen=True)
class Seen:
    """What is kept of a layer's inputs.

    Args:
        count: How many.
        mean: ``(in,)``, in fp64.
        rows: Their largest directions, each as long as its singular value ``(k, in)``.
        total: The sum of all squared singular values, those that were cut too.
    """

    count: int
    mean: Tensor
    rows: Tensor
    total: float

    @classmethod
    def of(cls, inputs: Tensor, keep: int) -> Seen:
        """Of one batch.

        Args:
            inputs: ``(N, in)``, N at least 1.
            keep: How many directions to keep.
        """
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        mean = wide.mean(0, dtype=torch.float64)
        centered = wide - mean.to(wide)
        return cls(len(inputs), mean, _largest(centered, keep), float(centered.double().square().sum()))

    def joined(self, other: Seen, keep: int) -> Seen:
        """Of both."""
        count = self.count + other.count
        between = (self.count * other.count / count) ** 0.5 * (self.mean - other.mean)
        rows = torch.cat([self.rows, other.rows, between.to(self.rows).unsqueeze(0)])
        total = self.total + other.total + float(between.square().sum())
        mean = (self.count * self.mean + other.count * other.mean) / count
        return Seen(count, mean, _largest(rows, keep), total)

    def directions(self, r: int) -> tuple[Tensor, float]:
        """The r largest directions, or as many as there are, of length 1 ``(r, in)``; and their share of the total."""
        rank = min(r, *self.rows.shape)
        _, S, V = top_singular(self.rows, rank)
        kept = S / max(self.total, 1e-300) ** 0.5 > _NOTHING
        found = V[:, kept].t()
        turned = found.gather(1, found.abs().argmax(1, keepdim=True)).sign()  # the largest entry of each is positive
        return turned * found, float(S[kept].double().square().sum()) / self.total if self.total > 0 else 0.0


def _largest(rows: Tensor, keep: int) -> Tensor:
    """``S V^T`` of the largest directions; the rows themselves where they are no more."""
    if min(rows.shape) <= keep and len(rows) <= keep:
        return rows
    keep = min(keep, *rows.shape)
    if min(rows.shape) <= _EXACT:
        _, S, V = top_singular(rows, keep)
    else:
        _, S, V = top_singular_randomized(rows, keep, _ROUNDS)
    return (S.unsqueeze(1) * V.t()).to(rows.dtype)


def eva_start(model: nn.Module, batches: Iterable[Any], forward: Forward | None = None) -> dict[str, float]:
    """Set A of every adapted linear to the directions in which its inputs vary most, over ``batches``.

    The model runs in evaluation mode, without gradient; random states and buffers are as before. Positions that the
    batch's ``attention_mask`` leaves out do not count. In a distributed run every rank calls this with batches of its
    own, and all get the same A. The `LoRA` callback does it by itself for ``init_lora_weights="eva"``.

    Example::

        apply_lora(model, LoRAConfig(r=16, init_lora_weights="eva"))
        eva_start(model, itertools.islice(loader, 8))

    Args:
        model: A converted model whose adapters have not been trained.
        batches: Any number of batches, on the model's device.
        forward: ``(model, batch)`` runs a batch; by default a mapping is given as keyword arguments, a list or
            tuple as arguments, anything else as the one argument.

    Returns:
        By name of each layer, the share of its inputs' variance that lies in A's directions.

    Raises:
        ConfigError: The model has no adapted linears, or they are trained already, or there was no batch, or inputs
            are not finite.
        UnsupportedError: The adapters are sharded or wrapped, or their start is taken from the base.
    """
    layers = _layers(model)
    seen: dict[str, Seen] = {}
    with together("start its adapters by EVA", ConfigError):
        _look(model, layers, batches, forward or _call, seen)
    shares, few = {}, []
    for name, layer in layers.items():
        found = _of_all(seen.get(name), layer.r)
        if found is None:
            few.append(name)
            continue
        directions, shares[name] = found
        if len(directions) < layer.r:
            few.append(name)
        with torch.no_grad():
            layer.lora_A[: len(directions)].copy_(directions)
    if few and rank_and_world()[0] == 0:
        warnings.warn(
            f"EVA saw inputs of fewer directions than the rank in {len(few)} of {len(layers)} layers, {few[0]!r} first "
            "(experts that no token reached, say): the rest of their A begins at random",
            Notice,
            stacklevel=2,
        )
    next(iter(layers.values())).record.new_use()
    return shares


def _layers(model: nn.Module) -> dict[str, LoRALinear]:
    layers = {name: module for name, module in adapter_modules(model) if isinstance(module, LoRALinear)}
    if not layers:
        raise ConfigError("the model has no adapted linears to start by EVA; call `apply_lora` first")
    for name, layer in layers.items():
        if isinstance(layer, ResidualLoRALinear):
            raise UnsupportedError(
                f"{name!r} begins as `init_lora_weights={layer.init!r}` says, with a part "
                'of the base: EVA is a start of its own, `init_lora_weights="eva"`'
            )
        if not layer.is_plain() or layer.lora_A.is_meta:
            raise UnsupportedError(
                "EVA is not built for adapters that are sharded, wrapped or on the meta device (FSDP, DeepSpeed, "
                "tensor parallelism): use one device or DDP, or start from its folder with `init_from`"
            )
        if not layer.untrained():
            raise ConfigError(f"{name!r} has been trained already (B is not zero): EVA is a start")
    return layers


@torch.no_grad()
def _look(
    model: nn.Module, layers: Mapping[str, LoRALinear], batches: Iterable[Any], forward: Forward, seen: dict[str, Seen]
) -> None:
    """Run the batches, and note what the layers see."""
    state: dict[str, Any] = {}

    def note(name: str, layer: LoRALinear, args: tuple[Any, ...]) -> None:
        inputs = _counted(args[0], state.get("mask"))
        if not len(inputs):
            return
        keep = max(2 * layer.r, layer.r + 32)
        if state.get("inputs") is not args[0] or state["keep"] != keep:  # queries, keys and values have the same
            state.update(inputs=args[0], keep=keep, new=Seen.of(inputs, keep))
            if not torch.isfinite(state["new"].mean).all():
                raise ConfigError(f"the inputs of {name!r} are not finite: EVA cannot start from them")
        seen[name] = seen[name].joined(state["new"], keep) if name in seen else state["new"]

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    empty = True
    try:
        with evaluating(model), preserve_rng(), _kept_buffers(model):
            for batch in batches:
                empty = False
                state["mask"] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                forward(model, batch)
                state["inputs"] = None
    finally:
        for hook in hooks:
            hook.remove()
    if empty:
        raise ConfigError("`batches` is empty: EVA starts from what the layers see")


def _of_all(own: Seen | None, r: int) -> tuple[Tensor, float] | None:
    """What all ranks saw, as directions: the same on each."""
    if rank_and_world()[1] == 1:
        return None if own is None else own.directions(r)
    parts = gather(None if own is None else Seen(own.count, own.mean.cpu(), own.rows.cpu(), own.total))
    there = [part for part in parts if part is not None]
    if not there:
        return None
    total = there[0]
    for part in there[1:]:
        total = total.joined(part, max(2 * r, r + 32))
    return from_rank_zero(total.directions(r))


def _counted(inputs: Tensor, mask: Any) -> Tensor:
    """``(N, in)``, without positions that the mask leaves out."""
    if isinstance(mask, Tensor) and mask.shape == inputs.shape[:-1]:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1])


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, Sequence) else model(batch)


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    """Whatever code in the forward writes into buffers is undone; packed weights are not written into."""
    packed = {id(b) for m in model.modules() if isinstance(m, PackedWeight) for b in m.buffers()}
    kept = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in packed]
    try:
        yield
    finally:
        for buffer, before in kept:
            if buffer.shape == before.shape:
                buffer.copy_(before)
