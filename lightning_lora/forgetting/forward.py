# SPDX-License-Identifier: Apache-2.0
"""Forward: what computes logits inside the user's module."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.model.inner import hf_models

#: (token ids [batch, tokens], how many last positions are needed) -> logits of those, or of all positions.
Forward = Callable[[Tensor, int], Tensor]


def find_forward(module: nn.Module, forward: Callable[..., Any] | str | None) -> Forward:
    """The function from token ids to logits; a transformers model spares the head where nothing is scored.

    Args:
        module: the model, or the LightningModule around it.
        forward: None for the one transformers model inside ``module``. A string is the name of something
            inside it ("net", "student.score") or the import path of a function. A function takes
            ``(input_ids)`` or ``(module, input_ids)`` and gives logits, or an object with ``.logits``.

    Raises:
        ConfigError: when it cannot be told what computes the logits.
    """
    given = forward
    if forward is None:
        return _only_model(module)
    if isinstance(forward, str):
        forward = _lookup(module, forward)
    if not callable(forward):
        raise ConfigError(f"`forward`={given!r} is no function: got {type(forward).__name__}.")
    function = forward
    takes = [p for p in _parameters(function).values() if p.default is p.empty and p.kind <= 1]
    args: tuple[Any, ...] = (module,) if len(takes) == 2 and not isinstance(function, nn.Module) else ()
    return lambda input_ids, last: _logits(function(*args, input_ids), "`forward`")


def _only_model(module: nn.Module) -> Forward:
    models = hf_models(module)
    if len(models) != 1:
        names = ", ".join(name or "the module itself" for name, _ in models)
        raise ConfigError(
            f"{type(module).__name__} holds {len(models)} transformers models{f' ({names})' if names else ''}, so it "
            f"is not clear what computes logits. Give `forward`: the name of a part of the module, or a function "
            f"(input_ids) -> logits, in YAML its dotted path."
        )
    model = models[0][1]
    known = _parameters(model.forward)
    fixed = {"use_cache": False} if "use_cache" in known else {}

    def forward(input_ids: Tensor, last: int) -> Tensor:
        kwargs = {"logits_to_keep": last} if "logits_to_keep" in known else {}
        return _logits(model(input_ids=input_ids, **fixed, **kwargs), type(model).__name__)

    return forward


def _logits(output: Any, source: str) -> Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ConfigError(
            f"{source} gave no logits but {type(output).__name__}. Forgetting is measured on language models: give "
            f"`forward`, a function (input_ids) -> logits [batch, tokens, vocabulary]."
        )
    return logits


def _lookup(module: nn.Module, path: str) -> Any:
    found: Any = module
    with contextlib.suppress(AttributeError):
        for part in path.split("."):
            found = getattr(found, part)
        return found
    home, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(home), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`forward`={path!r} is neither a part of {type(module).__name__} nor the import path of a function: "
            f"{error}."
        ) from error


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
