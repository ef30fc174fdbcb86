# SPDX-License-Identifier: Apache-2.0
"""The user's own layers: which of them are linear, how wide they are, and whether they may be computed here."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``, a linear layer with its weight stored ``(in, out)``."""
    utils = sys.modules.get("transformers.pytorch_utils")  # not loaded: no such module can exist
    return utils is not None and isinstance(module, utils.Conv1D)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of anything that `AdaptedLinear` takes as its base."""
    if is_conv1d(layer):
        inn, out = layer.weight.shape  # type: ignore[misc]
        return inn, out
    return layer.in_features, layer.out_features  # type: ignore[return-value]


def widest(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """The largest ``in_features`` and the largest ``out_features`` of some layers."""
    shapes = [linear_shape(layer) for layer in layers]
    return max(inn for inn, _ in shapes), max(out for _, out in shapes)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer is."""
    return next((t.device for t in [*layer.parameters(), *layer.buffers()]), torch.device("cpu"))


def is_transparent(base: nn.Module) -> bool:
    """Whether ``base`` is exactly ``x W^T + b``, frozen and without hooks, so that it may be computed here."""
    forward = type(base).forward
    plain = forward is nn.Linear.forward or (is_conv1d(base) and type(base).__name__ == "Conv1D")
    # nn.Module has no public view of its hooks; `forward` on the instance is how accelerate hooks a module.
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or "forward" in vars(base)
    trained = any(p is not None and p.requires_grad for p in base._parameters.values())
    return plain and not hooked and not trained
