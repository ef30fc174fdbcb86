# SPDX-License-Identifier: Apache-2.0
"""`AdapterCallback`: makes an ordinary LightningModule train adapters on a frozen base, by any method.

`LoRA` and the other methods' callbacks are this one with arguments of their own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.callbacks.trainer_bar import trainer_bar
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import AlreadyAdaptedError, Notice, UnsupportedError
from lightning_lora.io.adapter import load_adapter
from lightning_lora.model.apply import ApplyReport, apply_adapters, merged_layers
from lightning_lora.model.gradients import GradientCheck, check_loss
from lightning_lora.model.optimizers import Succession, check_optimizers, check_trained, held_by, repair_optimizers
from lightning_lora.model.slots import adapter_modules, adapter_record
from lightning_lora.nn.adapted import AdaptedLinear
from lightning_lora.nn.saved import SavedModule
from lightning_lora.strategies.registry import attach
from lightning_lora.strategies.sharded import ShardedStateMixin
from lightning_lora.strategies.state import AdapterStateMixin


class AdapterCallback(Callback):
    """Converts the module at the end of ``configure_model``, makes its optimizers right and its checkpoints small.

    Args:
        config: What to adapt and how.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only. A checkpoint that
            is given to `fit` goes before it.

    Raises:
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it.
        GradientError, OptimizerError: Adapters are in the model but would not learn.
    """

    def __init__(self, config: AdapterConfig, init_from: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.init_from = init_from
        self.report: ApplyReport | None = None
        self._succession: Succession | None = None
        self._gradients: GradientCheck | None = None
        self._stepping = False  # whether a backward came before the optimizer step
        self._module: pl.LightningModule | None = None
        self._wrapped: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Arrange for conversion: the end of ``configure_model`` precedes both restore and optimizers."""
        _refuse_company(self, trainer)
        attach(trainer.strategy)
        if self._module is pl_module:
            return
        self._release()
        self._module = pl_module
        configure_model, configure_optimizers = pl_module.configure_model, pl_module.configure_optimizers

        # Plain closures: `functools.wraps` would make Lightning look through them and skip the call.
        def converted() -> None:
            configure_model()
            self._convert(trainer, pl_module)
            if isinstance(trainer.strategy, ShardedStateMixin):
                trainer.strategy.shard(pl_module)

        def repaired() -> Any:
            result = configure_optimizers()
            with _rank_zero_notices(trainer):
                repair_optimizers(optimizers_in(result), pl_module, self._succession)
            self.adjust_optimizers(result, pl_module)
            return result

        self._wrap(pl_module, "configure_model", converted)
        self._wrap(pl_module, "configure_optimizers", repaired)

    def adjust_optimizers(self, result: Any, pl_module: pl.LightningModule) -> None:
        """Change what ``configure_optimizers`` gave, once it holds what is trained; nothing unless a method does."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the optimizers hold every adapter; from here on no other one may take its place."""
        strategy = _own(trainer)
        check_optimizers(trainer.optimizers, pl_module, held_by if strategy is None else strategy.held_by)
        self._mark(pl_module, fitting=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the first steps."""
        self._gradients = GradientCheck(pl_module)
        with _rank_zero_notices(trainer):
            _say_idle_dropout(pl_module, self.config)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See that nothing but adapters is trained: `BaseFinetuning` unfreezes as an epoch begins."""
        if batch_idx == 0:
            check_trained(pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """A loss that does not depend on the adapters fails here, with the reason."""
        check_loss(loss)
        self._stepping = True

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """See that gradients reach the adapters."""
        if pl_module.automatic_optimization and not self._stepping:
            return  # `training_step` gave None: Lightning's step does nothing
        self._stepping = False
        strategy = _own(trainer)
        if self._gradients is None or not (strategy is None or strategy.steps_now):
            return
        with _rank_zero_notices(trainer):
            if strategy is None:
                self._gradients.check(held_by(optimizer))
            else:
                self._gradients.check(strategy.held_by(optimizer), strategy.gradient)
        if self._gradients.done:
            self._gradients = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """No step comes any more: another adapter may take the place of the one that was trained."""
        self._mark(pl_module, fitting=False)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The same where there was nothing left to train."""
        self._mark(pl_module, fitting=False)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the closures off the module, so that it can be pickled; the adapters stay."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The same after a run that failed, for which Lightning calls no teardown."""
        self._release()

    def _mark(self, pl_module: pl.LightningModule, fitting: bool) -> None:
        record = adapter_record(pl_module)
        if record is not None:
            record.fitting = fitting

    def _release(self) -> None:
        if self._module is not None:
            self._mark(self._module, fitting=False)
        for name, before in self._wrapped.items():
            if before is None:
                vars(self._module).pop(name, None)
            else:
                setattr(self._module, name, before)
        self._wrapped, self._module, self._succession = {}, None, None
        self._stepping = False
        if self._gradients is not None:
            self._gradients.close()
            self._gradients = None

    def _wrap(self, pl_module: pl.LightningModule, name: str, closure: Any) -> None:
        self._wrapped[name] = vars(pl_module).get(name)
        setattr(pl_module, name, closure)

    def _convert(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        record = adapter_record(pl_module)
        if record is not None:
            if record.config != self.config:
                raise AlreadyAdaptedError(
                    "the module already carries adapters of another configuration: "
                    f"{_difference(record.config, self.config)}. Use the same in both places, or a fresh module"
                )
            return
        if merged_layers(pl_module) and trainer.state.fn != TrainerFn.FITTING:
            return  # it is looked at as it is; a checkpoint that is to be loaded into it is refused
        self._succession = Succession(pl_module)
        with _rank_zero_notices(trainer):
            root = trainer.strategy.root_device
            device = None if root.type == "cpu" else root
            self.report = apply_adapters(pl_module, self.config, device, trainer_bar(trainer))
        self._succession.converted(pl_module)
        if self.init_from is not None:
            load_adapter(pl_module, self.init_from)
        adapted = [module for _, module in adapter_modules(pl_module) if not isinstance(module, SavedModule)]
        linear = bool(adapted) and all(isinstance(module, AdaptedLinear) for module in adapted)
        rank_zero_info(_summary(self.config.title, "linear" if linear else "module", self.report))


def _own(trainer: pl.Trainer) -> AdapterStateMixin | None:
    """The Trainer's strategy as `attach` made it; None where it is of a kind that `attach` leaves alone."""
    return trainer.strategy if isinstance(trainer.strategy, AdapterStateMixin) else None


def _refuse_company(callback: AdapterCallback, trainer: pl.Trainer) -> None:
    own = type(callback).__name__
    others = [c for c in trainer.callbacks if isinstance(c, AdapterCallback)]  # type: ignore[attr-defined]
    if len(others) > 1:
        names = sorted({type(c).__name__ for c in others})
        raise UnsupportedError(
            f"the Trainer has {len(others)} `{'` and `'.join(names)}` callbacks; one model takes one, remove the others"
        )
    if callback.config.quantize != "none" and isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise UnsupportedError(
            f"`BitsandbytesPrecision` and `{own}(quantize={callback.config.quantize!r})` would both quantize the base: "
            'remove the plugin, or set `quantize="none"`'
        )
    if any(isinstance(other, StochasticWeightAveraging) for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise UnsupportedError(
            "`StochasticWeightAveraging` copies the model before the adapters are in it and fails at its first "
            f"epoch: use Lightning's `WeightAveraging`, after `{own}` in `callbacks`"
        )
    for other in trainer.callbacks[: trainer.callbacks.index(callback)]:  # type: ignore[attr-defined]
        if isinstance(other, WeightAveraging):
            raise UnsupportedError(
                f"`{type(other).__name__}` stands before `{own}` in `callbacks` and would average the model without "
                f"adapters: put `{own}` first"
            )


def _difference(there: AdapterConfig, here: AdapterConfig) -> str:
    """The fields in which two configurations differ."""
    one, other = there.to_dict(), here.to_dict()
    return "; ".join(
        f"{key} is {one.get(key)!r} there and {other.get(key)!r} in the callback"
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    )


def _say_idle_dropout(model: nn.Module, config: AdapterConfig) -> None:
    idle = [n for n, m in adapter_modules(model) if not isinstance(m, SavedModule) and not m.training]
    if config.dropout > 0.0 and idle:
        name = next(f.name for f in dataclasses.fields(config) if f.name.endswith("dropout"))
        warnings.warn(
            f"`{name}={config.dropout}` does nothing in {len(idle)} adapted layers, {idle[0]!r} first, that are in "
            "evaluation mode (`from_pretrained` leaves a model so): call `.train()` on the model in `__init__`",
            Notice,
            stacklevel=2,
        )


def optimizers_in(result: Any) -> list[Optimizer]:
    """The optimizers in whatever ``configure_optimizers`` may return."""
    if isinstance(result, Optimizer):
        return [result]
    if isinstance(result, dict):
        return optimizers_in(result.get("optimizer"))  # None: a scheduler's dict in the second list
    if isinstance(result, list | tuple):
        return [optimizer for item in result for optimizer in optimizers_in(item)]
    return []  # None, or a scheduler


@contextmanager
def _rank_zero_notices(trainer: pl.Trainer) -> Iterator[None]:
    """Every rank would say the same."""
    with warnings.catch_warnings():
        if trainer.global_rank != 0:
            warnings.simplefilter("ignore", Notice)
        yield


def _summary(title: str, what: str, report: ApplyReport) -> str:
    share = 100 * report.trainable_params / max(report.logical_params, 1)
    text = (
        f"{title}: {len(report.adapted)} {what}{'s' * (len(report.adapted) != 1)} adapted, "
        f"{report.trainable_params:,} trainable parameters ({share:.2f} % of {report.logical_params:,})"
    )
    if report.saved:
        text += f", {len(report.saved)} modules trained in full"
    if report.quantize != "none":
        text += f"; base {report.base_bytes / 1e6:,.1f} MB -> {report.packed_bytes / 1e6:,.1f} MB ({report.quantize})"
    return text
