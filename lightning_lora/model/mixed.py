# SPDX-License-Identifier: Apache-2.0
"""`mixed_batch`: rows of one batch through different adapters, at inference.

    y = x W^T + b                      for all rows at once
    y[rows of a] += c_a x[rows of a] A_a^T B_a^T        for each adapter in the batch

Layers are given another forward for as long as it lasts; the forward of training knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import scaling
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.model.inner import hf_models
from lightning_lora.model.residents import BASE, known, parts_of, record_of
from lightning_lora.model.slots import adapter_slots
from lightning_lora.nn.adapter import AdapterModule, Held
from lightning_lora.nn.functional import add_lora
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.saved import SavedModule

#: What a transformers model may be called with that has one row a sequence.
_INPUTS = ("decoder_input_ids", "input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class Routing:
    """Which rows go through which adapter, and how many rows a sequence has now (``num_beams`` in `generate`)."""

    def __init__(self, adapter_names: Sequence[str]) -> None:
        self.adapter_names = list(adapter_names)
        self.repeats = 1
        self._rows: dict[tuple[str, int, torch.device], Tensor] = {}

    def rows(self, name: str, count: int, device: torch.device) -> Tensor:
        """Indices of the rows of an adapter in a tensor of ``count`` rows.

        Raises:
            ConfigError: ``count`` is not the number of names, nor that times the beams.
        """
        names = len(self.adapter_names)
        if count not in (names, names * self.repeats):
            raise ConfigError(
                f"`adapter_names` has {names} names and a layer was called with {count} rows: give one name a row, and "
                "use models whose layers keep the batch as their first dimension"
            )
        key = (name, count, device)
        if key not in self._rows:
            chosen = [n == name for n in self.adapter_names]
            mask = torch.tensor(chosen, device=device).repeat_interleave(count // names)
            self._rows[key] = mask.nonzero().flatten()
        return self._rows[key]

    def see(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """A hook before a transformers model's forward: `generate` calls it with each row once a beam."""
        given = [kwargs[key] for key in _INPUTS if isinstance(kwargs.get(key), Tensor)]
        first = next((t for t in [*given, *args] if isinstance(t, Tensor) and t.dim() > 0), None)
        if first is not None and first.shape[0] % len(self.adapter_names) == 0:
            self.repeats = first.shape[0] // len(self.adapter_names)


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside, row i of every batch goes through the adapter called ``adapter_names[i]``.

    Modules of ``modules_to_save`` are routed too, where they take and give tensors with one row a sequence.
    `generate` with beams repeats the names as it repeats the rows.

    Example::

        with mixed_batch(model, ["law", "__base__", "law"]), torch.no_grad():
            logits = model(ids).logits  # three rows

    Args:
        model: A converted model in evaluation, or a LightningModule around one.
        adapter_names: One name a row: of a resident adapter, or "__base__" for none.

    Raises:
        ConfigError: A name is unknown, there is none, or the model is in training; inside, a layer whose first
            dimension has another size than the batch. One of the same size that is not the batch is not noticed.
        UnsupportedError: The adapters are DoRA.
    """
    record = record_of(model)
    if isinstance(adapter_names, str) or not adapter_names:
        raise ConfigError(f"`adapter_names` must be a list with one name a row, got {adapter_names!r}")
    names = [name for name in dict.fromkeys(adapter_names) if name != BASE]
    for name in names:
        known(record, name)
    slots = dict(adapter_slots(model))
    training = [name for name, module in slots.items() if module.training]
    if training:
        raise ConfigError(
            f"`mixed_batch` is for inference and {training[0]!r} is in training: call `model.eval()` first"
        )
    parts = {name: parts_of(model, name)[1] for name in names}
    routing = Routing(adapter_names)
    hooks = [hf.register_forward_pre_hook(routing.see, with_kwargs=True) for _, hf in hf_models(model)]
    former = {module: vars(module).get("forward") for module in slots.values()}
    try:
        for label, module in slots.items():
            own = {name: parts[name][module.slot] for name in names if module.slot in parts[name]}
            module.forward = _routed(label, module, own, routing)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, forward in former.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _routed(label: str, module: AdapterModule, parts: dict[str, Held], routing: Routing) -> Callable[..., Any]:
    if "mixed_batch" not in module.built_for:
        raise UnsupportedError(
            f"{label!r} is {module.title}, which is not built for `mixed_batch`: run one adapter at a time"
        )
    if isinstance(module, LoRALinear):
        return _routed_linear(module, parts, routing)
    if isinstance(module, SavedModule):
        return _routed_saved(label, module, parts, routing)
    raise UnsupportedError(f"{label!r}: a {type(module).__name__} cannot be routed row by row")


def _routed_linear(module: LoRALinear, parts: dict[str, Held], routing: Routing) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y = module.base_output(x)
        for name, part in parts.items() if module.enabled else ():
            rows = routing.rows(name, x.shape[0], x.device)
            c = part.strength * scaling(part.r, part.lora_alpha, part.use_rslora)
            A, B = part.tensors["adapter.lora_A"], part.tensors["adapter.lora_B"]
            y.index_copy_(0, rows, add_lora(y[rows], x[rows].to(y.dtype), A, B, c, 0.0))
        return y

    return forward


def _routed_saved(label: str, module: SavedModule, parts: dict[str, Held], routing: Routing) -> Callable[..., Any]:
    tensors = {name: module.values(part) for name, part in parts.items()}

    def forward(*args: Any, **kwargs: Any) -> Any:
        y = module.original(*args, **kwargs)
        if not module.enabled or not tensors:
            return y
        inputs = [t for t in [*args, *kwargs.values()] if isinstance(t, Tensor) and t.dim() > 0]
        if not isinstance(y, Tensor) or not inputs or inputs[0].shape[0] != y.shape[0]:
            raise UnsupportedError(f"{label!r} is trained in full and does not map rows to rows: it cannot be routed")
        count = y.shape[0]
        for name, own in tensors.items():
            rows = routing.rows(name, count, y.device)

            def take(value: Any, rows: Tensor = rows) -> Any:
                batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == count
                return value[rows] if batched else value

            taken = {key: take(value) for key, value in kwargs.items()}
            out = torch.func.functional_call(module.trained, own, tuple(map(take, args)), taken)
            y = y.index_copy(0, rows, out.to(y.dtype))
        return y

    return forward
