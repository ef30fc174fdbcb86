# SPDX-License-Identifier: Apache-2.0
"""`whole_targets`: the outermost modules that hold everything that is trained, for full fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_lora.config import FullTuningConfig
from lightning_lora.errors import TargetError, UnsupportedError
from lightning_lora.model.inner import is_hf_model
from lightning_lora.model.targets import Targets


def whole_targets(model: nn.Module, config: FullTuningConfig) -> Targets:
    """The outermost modules of which every parameter is trained; a transformers model itself stays where it is.

    What the user froze stays frozen: a module that is frozen in part is gone into.

    Raises:
        TargetError: Nothing is trained.
        UnsupportedError: A parameter lies in a module that stays, or that has no forward.
    """
    chosen = list(_outermost(model, ""))
    if not chosen:
        raise TargetError("every parameter of the model is frozen: full fine-tuning has nothing to train")
    return Targets(chosen, [], [])


def _outermost(module: nn.Module, name: str) -> Iterator[str]:
    own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
    if own:
        raise UnsupportedError(
            f"{'.'.join(part for part in (name, own[0]) if part)!r} is a parameter of the {type(module).__name__} "
            "itself, which full fine-tuning cannot keep a copy of beside it: put it into a module of its own, or "
            "freeze it"
        )
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        needs = [p.requires_grad for p in child.parameters()]
        if not any(needs):
            continue
        if all(needs) and _runs(child) and not is_hf_model(child):
            yield path
        elif all(needs) and is_hf_model(child) and is_hf_model(module):
            yield path  # the decoder inside a model with a head
        else:
            yield from _outermost(child, path)


def _runs(module: nn.Module) -> bool:
    """Whether the module computes something itself; lists of modules do not."""
    return not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict)
