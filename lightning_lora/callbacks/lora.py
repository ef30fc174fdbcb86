# SPDX-License-Identifier: Apache-2.0
"""`LoRA`: the callback that makes an ordinary LightningModule train adapters on a frozen base."""

from __future__ import annotations

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
from lightning_lora.config import DTypeName, InitMode, LoRAConfig, MasterDTypeName, QuantizeMode
from lightning_lora.errors import AlreadyAdaptedError, Notice, UnsupportedError
from lightning_lora.io.adapter import load_adapter
from lightning_lora.model.apply import ApplyReport, adapter_modules, adapter_record, apply_lora, merged_layers
from lightning_lora.model.gradients import GradientCheck, check_loss
from lightning_lora.model.loraplus import part_groups, schedulers_in
from lightning_lora.model.optimizers import Succession, check_optimizers, check_trained, held_by, repair_optimizers
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.strategies.registry import attach
from lightning_lora.strategies.sharded import ShardedStateMixin
from lightning_lora.strategies.state import AdapterStateMixin


class LoRA(Callback):
    """Quantizes the base, puts adapters on the chosen linears, freezes the rest and keeps checkpoints small.

    The module is converted at the end of ``configure_model``, whether it was built there or in ``__init__``;
    its optimizers are made to hold what is trained; every checkpoint, whoever writes it, holds adapters only.

    Example::

        trainer = Trainer(callbacks=[LoRA(r=16, lora_alpha=32, quantize="nf4")])
        trainer.fit(model, datamodule)

    Args:
        r: Rank of every adapter, the inner size of ``B A``.
        lora_alpha: Numerator of the scale; the update is multiplied by ``lora_alpha / r``.
        lora_dropout: Share of the adapter's input that is dropped in training, in [0, 1).
        target_modules: Which linears to adapt: "all-linear" (all but the output head), a list of name
            suffixes, or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all if null.
        layers_pattern: Name of the block list that `layers_to_transform` counts, e.g. "layers".
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        rank_pattern: Ranks for some modules, by name suffix or regular expression.
        alpha_pattern: The same for `lora_alpha`.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` instead of ``lora_alpha / r``.
        use_dora: Train the magnitude of each output apart from its direction (DoRA, Liu et al. 2024).
        init_lora_weights: Start of A, "kaiming" or "gaussian"; B is zero either way.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the master adapters, kept under every `precision`.
        loraplus_lr_ratio: LoRA+: the learning rate of B as a multiple of that of A, such as 16. Each group of the
            optimizers that holds both is parted in two, and schedulers follow; null leaves the groups alone.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only. A checkpoint that
            is given to `fit` goes before it.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it.
        GradientError, OptimizerError: Adapters are in the model but would not learn.
    """

    def __init__(
        self,
        r: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        modules_to_save: list[str] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        init_lora_weights: InitMode = "kaiming",
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        loraplus_lr_ratio: float | None = None,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.config = LoRAConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=modules_to_save,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            use_rslora=use_rslora,
            use_dora=use_dora,
            init_lora_weights=init_lora_weights,
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
            loraplus_lr_ratio=loraplus_lr_ratio,
        )
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
                repair_optimizers(_optimizers_in(result), pl_module, self._succession)
            if self.config.loraplus_lr_ratio is not None:
                part_groups(_optimizers_in(result), schedulers_in(result), pl_module, self.config.loraplus_lr_ratio)
            return result

        self._wrap(pl_module, "configure_model", converted)
        self._wrap(pl_module, "configure_optimizers", repaired)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that the optimizers hold every adapter; from here on no other one may take its place."""
        strategy = _own(trainer)
        check_optimizers(trainer.optimizers, pl_module, held_by if strategy is None else strategy.held_by)
        self._mark(pl_module, fitting=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the first steps."""
        self._gradients = GradientCheck(pl_module)
        with _rank_zero_notices(trainer):
            _say_idle_dropout(pl_module, self.config.lora_dropout)

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
                    f"the module already carries adapters of another configuration: {record.config}; the callback "
                    f"says {self.config}. Use the same in both places, or a fresh module"
                )
            return
        if merged_layers(pl_module) and trainer.state.fn != TrainerFn.FITTING:
            return  # it is looked at as it is; a checkpoint that is to be loaded into it is refused
        self._succession = Succession(pl_module)
        with _rank_zero_notices(trainer):
            root = trainer.strategy.root_device
            device = None if root.type == "cpu" else root
            self.report = apply_lora(pl_module, self.config, device, trainer_bar(trainer))
        self._succession.converted(pl_module)
        if self.init_from is not None:
            load_adapter(pl_module, self.init_from)
        rank_zero_info(_summary(self.report))


def _own(trainer: pl.Trainer) -> AdapterStateMixin | None:
    """The Trainer's strategy as `attach` made it; None where it is of a kind that `attach` leaves alone."""
    return trainer.strategy if isinstance(trainer.strategy, AdapterStateMixin) else None


def _refuse_company(callback: LoRA, trainer: pl.Trainer) -> None:
    others = [c for c in trainer.callbacks if isinstance(c, LoRA)]  # type: ignore[attr-defined]
    if len(others) > 1:
        raise UnsupportedError(
            f"the Trainer has {len(others)} `LoRA` callbacks; one model takes one, remove the others"
        )
    if callback.config.quantize != "none" and isinstance(trainer.precision_plugin, BitsandbytesPrecision):
        raise UnsupportedError(
            f"`BitsandbytesPrecision` and `LoRA(quantize={callback.config.quantize!r})` would both quantize the base: "
            'remove the plugin, or set `quantize="none"`'
        )
    if any(isinstance(other, StochasticWeightAveraging) for other in trainer.callbacks):  # type: ignore[attr-defined]
        raise UnsupportedError(
            "`StochasticWeightAveraging` copies the model before the adapters are in it and fails at its first "
            "epoch: use Lightning's `WeightAveraging`, after `LoRA` in `callbacks`"
        )
    for other in trainer.callbacks[: trainer.callbacks.index(callback)]:  # type: ignore[attr-defined]
        if isinstance(other, WeightAveraging):
            raise UnsupportedError(
                f"`{type(other).__name__}` stands before `LoRA` in `callbacks` and would average the model without "
                "adapters: put `LoRA` first"
            )


def _say_idle_dropout(model: nn.Module, dropout: float) -> None:
    idle = [n for n, m in adapter_modules(model) if isinstance(m, LoRALinear) and not m.training]
    if dropout > 0.0 and idle:
        warnings.warn(
            f"`lora_dropout={dropout}` does nothing in {len(idle)} adapted layers, {idle[0]!r} first, that are in "
            "evaluation mode (`from_pretrained` leaves a model so): call `.train()` on the model in `__init__`",
            Notice,
            stacklevel=2,
        )


def _optimizers_in(result: Any) -> list[Optimizer]:
    """The optimizers in whatever ``configure_optimizers`` may return."""
    if isinstance(result, Optimizer):
        return [result]
    if isinstance(result, dict):
        return _optimizers_in(result.get("optimizer"))  # None: a scheduler's dict in the second list
    if isinstance(result, list | tuple):
        return [optimizer for item in result for optimizer in _optimizers_in(item)]
    return []  # None, or a scheduler


@contextmanager
def _rank_zero_notices(trainer: pl.Trainer) -> Iterator[None]:
    """Every rank would say the same."""
    with warnings.catch_warnings():
        if trainer.global_rank != 0:
            warnings.simplefilter("ignore", Notice)
        yield


def _summary(report: ApplyReport) -> str:
    share = 100 * report.trainable_params / max(report.logical_params, 1)
    text = (
        f"LoRA: {len(report.adapted)} linears adapted, {report.trainable_params:,} trainable parameters "
        f"({share:.2f} % of {report.logical_params:,})"
    )
    if report.saved:
        text += f", {len(report.saved)} modules trained in full"
    if report.quantize != "none":
        text += f"; base {report.base_bytes / 1e6:,.1f} MB -> {report.packed_bytes / 1e6:,.1f} MB ({report.quantize})"
    return text
