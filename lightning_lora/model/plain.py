# SPDX-License-Identifier: Apache-2.0
"""`plain_view`: a converted model as it was before conversion, for code that chooses modules by name and type."""

from __future__ import annotations

import torch
from torch import nn

from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.quantized import PackedLinear


def plain_view(model: nn.Module) -> nn.Module:
    """A second tree of modules around the same weights, with the user's own layers in place of adapters.

    Packed layers are linears on the meta device. The tree is there to be looked at: nothing of it is to be run.
    """
    return _view(model, {})


def empty_linear(layer: PackedLinear) -> nn.Module:
    """The dense layer that was packed, on the meta device, without a bias."""
    if layer.fan_in_fan_out:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            return Conv1D(layer.out_features, layer.in_features)
    return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")


def _view(module: nn.Module, seen: dict[int, nn.Module]) -> nn.Module:
    if id(module) in seen:
        return seen[id(module)]
    if isinstance(module, AdapterModule):
        view = _view(module.replaced, seen)
    elif isinstance(module, PackedLinear):
        view = empty_linear(module)
        view.register_parameter("bias", module.bias)
    elif not module._modules:
        view = module
    else:  # not by copy.copy, which would run what a class does when it is copied
        view = object.__new__(type(module))
        seen[id(module)] = view
        view.__dict__.update(module.__dict__)
        view._modules = {n: None if m is None else _view(m, seen) for n, m in module._modules.items()}
    seen[id(module)] = view
    return view
