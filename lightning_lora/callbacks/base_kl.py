# SPDX-License-Identifier: Apache-2.0
r"""`BaseKL`: the loss holds the model to its base.

.. math:: L' = L + weight \cdot \frac{1}{N} \sum_{n=1}^{N} KL(p_{base}(\cdot \mid x_{<n}) \,\|\, p(\cdot \mid x_{<n}))

over the N positions of the batch that have a next token, with the base being the same weights, adapters off.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.forgetting.arguments import check_counts, check_real
from lightning_lora.forgetting.divergence import kl_sum
from lightning_lora.model.apply import disable_adapters
from lightning_lora.model.inner import evaluating, hf_models
from lightning_lora.model.slots import is_adapted

#: Arguments of a transformers model that only its own loss needs.
_OF_THE_LOSS = ("labels", "num_items_in_batch")


class BaseKL(Callback):
    """Adds to the training loss how far the model has moved from its base, measured on the batch at hand.

    The user's ``training_step`` runs as it is. The language model's calls in it are noted, each is repeated without
    gradient and with the adapters off, and the mean KL divergence of the base from the model joins the loss that the
    step returned: Lightning's accumulation, precision and DDP treat it as they treat the loss. It costs one forward
    without gradient. Logged as ``base_kl`` [nats/token].

    Positions without a next token, of which ``attention_mask`` leaves out the token or the next one, or whose label is
    -100 (where the model is given ``labels``), do not count.

    Example::

        trainer = Trainer(callbacks=[LoRA(r=16), BaseKL(weight=0.5)])

    Args:
        weight: Of the mean divergence beside the loss. 0 trains as without.
        non_target_only: Leave the target token out of both distributions, so that the term says nothing of what the
            loss is there to teach.
        every_n_steps: Add the term at every so many optimizer steps only, at all their accumulated batches.
        forward: Name of the part of the module whose calls give logits; None for the one transformers model in it.

    Raises:
        ConfigError: A value is out of range; the module has no adapters; the model's calls cannot be found.
        UnsupportedError: Under manual optimization, whose losses no callback sees.
    """

    def __init__(
        self, weight: float = 0.5, non_target_only: bool = False, every_n_steps: int = 1, forward: str | None = None
    ) -> None:
        super().__init__()
        check_real("weight", weight)
        check_counts(every_n_steps=every_n_steps)
        self.weight = weight
        self.non_target_only = non_target_only
        self.every_n_steps = every_n_steps
        self.forward = forward
        self._module: LightningModule | None = None
        self._before: Any = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            raise ConfigError(
                f"BaseKL compares the model with adapters on and off, and {type(pl_module).__name__} has none. Add the "
                f"LoRA callback, or call apply_lora in configure_model."
            )
        if not pl_module.automatic_optimization:
            raise UnsupportedError(
                f"{type(pl_module).__name__} optimizes by hand, where no callback sees the loss: BaseKL needs "
                f"`automatic_optimization`."
            )
        model = self._find_model(pl_module)
        step = pl_module.training_step

        @functools.wraps(step)  # Lightning reads the step's signature through it
        def held(*args: Any, **kwargs: Any) -> Any:
            if not trainer.training or self.weight == 0 or trainer.global_step % self.every_n_steps:
                return step(*args, **kwargs)  # not training: a `validation_step` that calls this one
            with _listening(model) as calls:
                output = step(*args, **kwargs)
            return output if output is None else self._add(output, pl_module, model, calls)

        self._release()
        self._module, self._before = pl_module, vars(pl_module).get("training_step")
        pl_module.training_step = held  # type: ignore[method-assign]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._module is None:
            return
        if self._before is None:
            vars(self._module).pop("training_step", None)
        else:
            self._module.training_step = self._before  # type: ignore[method-assign]
        self._module = self._before = None

    def _find_model(self, pl_module: LightningModule) -> nn.Module:
        if self.forward is not None:
            try:
                return pl_module.get_submodule(self.forward)
            except AttributeError as error:
                raise ConfigError(
                    f"`forward`={self.forward!r} is no part of {type(pl_module).__name__}: {error}."
                ) from error
        models = hf_models(pl_module)
        if len(models) != 1:
            raise ConfigError(
                f"{type(pl_module).__name__} holds {len(models)} transformers models, so it is not clear whose logits "
                f"to compare. Give `forward`: the name of the part of the module whose calls give logits."
            )
        return models[0][1]

    def _add(self, output: Any, pl_module: LightningModule, model: nn.Module, calls: list[Call]) -> Any:
        if not calls:
            raise ConfigError(
                f"BaseKL saw no call of {self.forward or type(model).__name__!r} with a gradient in `training_step`. "
                f"Give `forward`: the name of the part of the module whose calls give logits. A whole LightningModule "
                f"that was compiled calls none: compile the model inside it instead."
            )
        total = positions = calls[0].logits.new_zeros((), dtype=torch.float32)
        for call in calls:
            keep, targets = call.positions()
            with torch.no_grad(), evaluating(model), disable_adapters(pl_module):
                base = call.fresh(logits_of(call.repeat(model)))
            masked = None
            if self.non_target_only:
                masked = _required(targets).flatten()
            vocabulary = base.shape[-1]
            total = total + kl_sum(
                call.logits.reshape(-1, vocabulary), base.reshape(-1, vocabulary), keep.flatten(), masked
            )
            positions = positions + keep.sum()
        kl = total / positions.clamp(min=1)
        pl_module.log("base_kl", kl.detach(), on_step=True, on_epoch=False)
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + self.weight * kl}
        return output + self.weight * kl


@dataclass
class Call:
    """One call of the language model in a training step."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Tensor

    def repeat(self, model: nn.Module) -> Any:
        """The same call, without what only a loss or a cache needs."""
        kwargs = {name: value for name, value in self.kwargs.items() if name not in _OF_THE_LOSS}
        if "use_cache" in inspect.signature(model.forward).parameters:
            kwargs["use_cache"] = False
        return model(*self.args, **kwargs)

    def fresh(self, base: Tensor) -> Tensor:
        """``base`` as memory of its own: a part of a model may hand on what it was given."""
        own = [x for x in (self.logits, *self.args, *self.kwargs.values()) if isinstance(x, Tensor)]
        places = {x.untyped_storage().data_ptr() for x in own}
        return base.clone() if base.untyped_storage().data_ptr() in places else base

    def positions(self) -> tuple[Tensor, Tensor | None]:
        """Which positions count, (batch, tokens) bool, and their target tokens, None where no ids were given."""
        keep = torch.ones(self.logits.shape[:2], dtype=torch.bool, device=self.logits.device)
        keep[:, -1] = False
        mask, labels = self._like_ids("attention_mask"), self._like_ids("labels")
        ids = self._like_ids("input_ids")
        if ids is None:
            ids = next((x for x in self.args if self._is_like_ids(x)), None)
        if mask is not None:
            keep[:, :-1] &= (mask[:, 1:] != 0) & (mask[:, :-1] != 0)  # padding may stand on either side
        if labels is not None:
            keep[:, :-1] &= labels[:, 1:] != -100
        if ids is None:
            return keep, None
        return keep, torch.cat([ids[:, 1:], ids[:, :1]], dim=1).long()

    def _like_ids(self, name: str) -> Tensor | None:
        value = self.kwargs.get(name)
        return value if self._is_like_ids(value) else None

    def _is_like_ids(self, value: Any) -> bool:
        return isinstance(value, Tensor) and not value.is_floating_point() and value.shape == self.logits.shape[:2]


def logits_of(output: Any) -> Tensor:
    """The logits (batch, tokens, vocabulary) in whatever a language model returns.

    Raises:
        ConfigError: There are none.
    """
    found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
    found = getattr(found, "logits", found)
    parts = found if isinstance(found, tuple | list) else [found]
    logits = next((x for x in parts if isinstance(x, Tensor) and x.ndim == 3), None)
    if logits is None:
        raise ConfigError(
            f"BaseKL needs logits [batch, tokens, vocabulary], and the model gave {type(output).__name__} without. A "
            f"fused loss that skips the logits must be off; `forward` names the part of the module that gives them."
        )
    return logits


@contextmanager
def _listening(model: nn.Module) -> Iterator[list[Call]]:
    """The calls of ``model`` inside whose logits need a gradient."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and (logits := logits_of(output)).requires_grad:
            calls.append(Call(args, kwargs, logits))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _required(targets: Tensor | None) -> Tensor:
    if targets is None:
        raise ConfigError(
            "`non_target_only` needs the token ids, and the model was called without any of the logits' "
            "(batch, tokens): call it with `input_ids`, or leave the whole distribution in."
        )
    return targets
