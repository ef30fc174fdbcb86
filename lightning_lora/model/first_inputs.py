# SPDX-License-Identifier: Apache-2.0
"""`FirstInputs`: what a model is called with, kept to compare it later with what is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.model.inner import is_hf_model
from lightning_lora.nn.adapter import AdapterModule

ROWS = 4  # of a batch that a transformers model is compared on


class FirstInputs:
    """What the modules with adapters are called with in the first step after `armed` was set, copied to the CPU.

    Of a plain module the outermost parts that are called themselves: a container is not, what is in it is. A hook
    a module, removed by its first call or by that of a module around it.

    Args:
        training: Whether only calls with gradients count: those of a training step, and no look of a monitor's.
    """

    def __init__(self, training: bool) -> None:
        self.training = training
        self.seen: dict[str, tuple[tuple, dict]] = {}
        self.armed = False
        self._handles: dict[str, RemovableHandle] = {}

    def wait(self, root: nn.Module, whole: nn.Module) -> None:
        """Put the hooks in; none into compiled code, where a traced hook would stay.

        Args:
            root: The transformers model, or the plain module whose parts are watched.
            whole: The module around it.
        """
        if any(_is_compiled(name, module) for name, module in whole.named_modules()):
            return
        hf = is_hf_model(root)
        labels = hf and bool(getattr(root.config, "is_encoder_decoder", False))  # from which it makes decoder inputs
        for name, module in [("", root)] if hf else list(_parts_with_adapters(root)):
            hook = self._hook(name, ROWS if hf else None, labels or not hf)
            self._handles[name] = module.register_forward_pre_hook(hook, with_kwargs=True)

    def stop(self) -> None:
        """Take out the hooks that are left."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.armed = False

    def _hook(self, name: str, rows: int | None, labels: bool) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.armed or (self.training and not torch.is_grad_enabled()):
                return
            for inner in [n for n in self._handles if n == name or n.startswith(f"{name}.")]:
                self._handles.pop(inner).remove()
            self.seen = {n: given for n, given in self.seen.items() if not n.startswith(f"{name}.")}
            self.seen[name] = _kept(args, kwargs, rows, labels)

        return hook


def _kept(args: tuple, kwargs: dict, rows: int | None, labels: bool) -> tuple[tuple, dict]:
    """CPU copies of tensors and plain values; caches and other objects left out, labels where not asked for."""
    tensors = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.dim() > 1]
    batch = tensors[0].shape[0] if tensors else None

    def keep(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        cut = rows is not None and value.dim() > 1 and value.shape[0] == batch
        return (value[:rows] if cut else value).detach().to("cpu", copy=True)

    plain = (Tensor, int, float, bool, str, type(None))
    named = {k: keep(v) for k, v in kwargs.items() if (labels or k != "labels") and isinstance(v, plain)}
    return tuple(keep(value) for value in args), named


def _parts_with_adapters(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root` that is or holds adapters, by name, nothing inside an adapter module."""
    inside = ""
    for name, module in root.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, AdapterModule):
            inside = f"{name}."
        if any(isinstance(m, AdapterModule) for m in module.modules()):
            yield name, module


def _is_compiled(name: str, module: nn.Module) -> bool:
    # `module.compile()` leaves no public mark.
    return "_orig_mod" in name.split(".") or getattr(module, "_compiled_call_impl", None) is not None
