# SPDX-License-Identifier: Apache-2.0
"""Forward: what computes logits inside the user's module."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.model.inner import hf_models

#: What is added to an attention score that is not to count: exp of it is 0 in every dtype, and fp16 can hold it.
_BLOCKED = -65504.0

# Attention that takes a mask [batch, 1, queries, keys]: from it on, or added to the scores.
_TAKE_MASKS = {"sdpa": torch.bool, "eager": torch.float32}


class Forward:
    """Token ids [batch, tokens] to logits.

    Args:
        function: (token ids, how many last positions are needed) -> logits of those, or of all positions.
    """

    #: Whether `tree` can be asked.
    takes_trees = False
    #: The longest input in which each token may see every other before it [tokens]; None for any.
    window: int | None = None

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        self._function = function

    def __call__(self, input_ids: Tensor, last: int) -> Tensor:
        """Logits of the ``last`` positions, or of all positions where the model cannot spare the others."""
        return self._function(input_ids, last)

    def tree(self, input_ids: Tensor, positions: Tensor, sees: Tensor, keep: Tensor) -> Tensor:
        """Logits where each row holds a tree of texts instead of one text.

        Args:
            input_ids: [batch, tokens].
            positions: how many tokens come before each in its own text [batch, tokens].
            sees: whether a token sees another one [batch, tokens, tokens].
            keep: the positions that are needed, ascending [any].

        Returns:
            Logits of the positions ``keep``, or of all positions.
        """
        raise ConfigError("`forward` is a function of token ids alone: it cannot take a tree.")


class ModelForward(Forward):
    """A transformers model, which spares the head where nothing is scored.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        known = _parameters(model.forward)
        self._fixed = {"use_cache": False} if "use_cache" in known else {}
        self._spares = "logits_to_keep" in known
        config = getattr(model, "config", None)
        self._mask_dtype = _TAKE_MASKS.get(getattr(config, "_attn_implementation", None) or "")
        self.takes_trees = self._mask_dtype is not None and {"attention_mask", "position_ids"} <= set(known)
        self.window = _smallest_window(model)

    def __call__(self, input_ids: Tensor, last: int) -> Tensor:
        """Logits of the ``last`` positions, or of all positions where the model cannot spare the others."""
        return self._ask(last, input_ids=input_ids)

    def tree(self, input_ids: Tensor, positions: Tensor, sees: Tensor, keep: Tensor) -> Tensor:
        """See `Forward.tree`."""
        mask = sees[:, None]
        if self._mask_dtype is not torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, _BLOCKED)
        return self._ask(keep, input_ids=input_ids, position_ids=positions, attention_mask=mask)

    def _ask(self, keep: int | Tensor, **inputs: Tensor) -> Tensor:
        kwargs = {"logits_to_keep": keep} if self._spares else {}
        return _logits(self.model(**inputs, **self._fixed, **kwargs), type(self.model).__name__)


def _smallest_window(model: nn.Module) -> int | None:
    """The shortest reach of any attention that a model speaks of, used or not [tokens]; None where all reach far.

    Spoken of are windows and chunks in its configuration, and causal masks of a fixed size among its buffers.
    """
    config = getattr(model, "config", None)
    values = vars(getattr(config, "text_config", None) or config or object)
    reaches = [value for name, value in values.items() if name.endswith(("window", "window_size", "chunk_size"))]
    reaches += [b.shape[-1] for b in model.buffers() if b.dim() > 2 and b.shape[-1] == b.shape[-2]]
    return min((n for n in reaches if isinstance(n, int) and not isinstance(n, bool) and n > 0), default=None)


def find_forward(module: nn.Module, forward: Callable[..., Any] | str | None) -> Forward:
    """The function from token ids to logits.

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
    return Forward(lambda input_ids, last: _logits(function(*args, input_ids), "`forward`"))


def _only_model(module: nn.Module) -> ModelForward:
    models = hf_models(module)
    if len(models) != 1:
        names = ", ".join(name or "the module itself" for name, _ in models)
        raise ConfigError(
            f"{type(module).__name__} holds {len(models)} transformers models{f' ({names})' if names else ''}, so it "
            f"is not clear what computes logits. Give `forward`: the name of a part of the module, or a function "
            f"(input_ids) -> logits, in YAML its dotted path."
        )
    return ModelForward(models[0][1])


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
