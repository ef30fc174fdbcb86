# SPDX-License-Identifier: Apache-2.0
"""`AdaLoRA`: the callback that trains low-rank updates and shares their ranks out among the layers as it goes."""

from __future__ import annotations

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import AdaLoRAConfig, DTypeName, MasterDTypeName, QuantizeMode
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.model.inner import clean_name
from lightning_lora.model.optimizers import held_by
from lightning_lora.model.orthogonality import add_orthogonality_gradient, orthogonality
from lightning_lora.model.rank_allocator import BudgetSchedule, RankAllocator
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adalora import AdaLoRALinear


class AdaLoRA(AdapterCallback):
    """Trains low-rank updates on a frozen base and takes ranks away where they matter least (Zhang et al. 2023).

    The updates have the form of a singular value decomposition, ``B diag(E) A``; all else is as with `LoRA`.

    After every optimizer step each rank of each layer has a score, its sensitivity ``|w dL/dw|`` times the uncertainty
    of that, both smoothed; as the budget falls from ``init_r`` to ``target_r`` a layer, the ranks with the lowest
    scores of all layers are switched off, and may come back until ``tfinal`` steps are left. It is PEFT's
    ``update_and_allocate``, called after each step. The run's steps are those that the Trainer expects.

    The orthogonality term ``orth_reg_weight * mean |P^T P - 1|_F`` (P: the columns of each B, the rows of each A) is no
    part of the loss that is logged: its gradient is added before the optimizer's step, once a step however many batches
    are accumulated, to gradients that a loss scaler has unscaled, and is clipped with them.

    Scores and ranks are part of every checkpoint, so that a run goes on with the same bits; the schedule stays that of
    the run that began it. Logged, to every logger, each ``log_every_n_steps`` steps and when the ranks are final:

    ============================  ==========================================================  ==============
    Key                           Logged                                                      Unit
    ============================  ==========================================================  ==============
    ``adalora/budget``            Ranks that the schedule leaves, all layers together         ranks
    ``adalora/rank_mean``         Ranks that are left in a layer, mean over the layers        ranks
    ``adalora/rank_min``          the same, the smallest; as ``rank_q25``, ``rank_median``,   ranks
                                  ``rank_q75`` and ``rank_max`` the quartiles and largest
    ``adalora/layers_at_zero``    Layers without any rank left                                layers
    ``adalora/orthogonality``     The term without its weight, 0 for orthonormal vectors      1
    ============================  ==========================================================  ==============

    Example::

        trainer = Trainer(max_steps=1000, callbacks=[AdaLoRA(init_r=12, target_r=8, tinit=100, tfinal=300)])
        trainer.fit(model, datamodule)

    Args:
        init_r: Rank of every update at the start.
        target_r: Average rank at the end, at most `init_r`.
        lora_alpha: Numerator of the scale; updates are multiplied by ``lora_alpha / init_r`` throughout.
        lora_dropout: Share of the adapter's input that is dropped in training, in [0, 1).
        tinit: Optimizer steps before the first rank is taken away.
        tfinal: Optimizer steps at the end with the final ranks.
        deltaT: Optimizer steps from one choice of ranks to the next.
        beta1: Share of the old in the smoothed sensitivity, in (0, 1).
        beta2: Share of the old in its uncertainty, in (0, 1).
        orth_reg_weight: Factor of the orthogonality term; 0 for none.
        total_step: Optimizer steps of the run; the Trainer's ``estimated_stepping_batches`` if null.
        target_modules: Which linears to adapt: "all-linear" (all but the output head), a list of name
            suffixes, or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all if null.
        layers_pattern: Name of the block list that `layers_to_transform` counts, e.g. "layers".
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the master adapters, kept under every `precision`.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only. A checkpoint that
            is given to `fit` goes before it.

    Raises:
        ConfigError: An argument is out of its range, or the run's length is unknown or too short for the schedule.
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it, or the module
            optimizes by hand.
        GradientError, OptimizerError: Adapters are in the model but would not learn.
    """

    config: AdaLoRAConfig

    def __init__(
        self,
        init_r: int = 12,
        target_r: int = 8,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,  # PEFT's name
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.5,
        total_step: int | None = None,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        modules_to_save: list[str] | None = None,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        init_from: str | None = None,
    ) -> None:
        config = AdaLoRAConfig(
            init_r=init_r,
            target_r=target_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=deltaT,
            beta1=beta1,
            beta2=beta2,
            orth_reg_weight=orth_reg_weight,
            total_step=total_step,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=modules_to_save,
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
        )
        super().__init__(config, init_from)
        #: What scores and prunes, while a fit runs and after it.
        self.allocator: RankAllocator | None = None
        self._restored: dict[str, Any] = {}
        self._seen_step = 0
        self._steps = False  # whether the last step had gradients

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also refuse what takes steps of its own."""
        super().on_fit_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise UnsupportedError(
                "`AdaLoRA` takes ranks away after each optimizer step, by the gradients of that step, and the module "
                "optimizes by hand (`automatic_optimization = False`), where these may be gone: use `LoRA`"
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Also make the schedule, or go on with that of the checkpoint."""
        super().on_train_start(trainer, pl_module)
        config, total = self.config, self._restored.get("total_step") or self._expected_steps(trainer)
        layers = {
            clean_name(name): module.triplets
            for name, module in adapter_modules(pl_module)
            if isinstance(module, AdaLoRALinear)
        }
        schedule = BudgetSchedule(
            init=config.init_r * len(layers),
            target=config.target_r * len(layers),
            tinit=config.tinit,
            tfinal=config.tfinal,
            total=total,
            every=config.deltaT,
        )
        self.allocator = RankAllocator(layers, schedule, config.beta1, config.beta2)
        if self._restored:
            self.allocator.load_state_dict(self._restored["allocator"])
            self._restored = {}
        self._seen_step = trainer.global_step

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Also add the orthogonality term's gradient, to gradients that are unscaled and not yet clipped."""
        self._steps = self._stepping  # else `training_step` gave None
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._steps and self.allocator is not None and self.config.orth_reg_weight > 0:
            layers = list(self.allocator.layers.values())
            add_orthogonality_gradient(layers, self.config.orth_reg_weight, held_by(optimizer))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score and prune, once a step was made: its gradients are still there, and the parameters are those after."""
        if self.allocator is None or trainer.global_step == self._seen_step:
            return  # more batches are to be accumulated
        self._seen_step = step = trainer.global_step
        gradients = _gradients(self.allocator)
        if self._steps and not gradients:
            raise UnsupportedError(
                "`AdaLoRA` scores ranks by the gradients of each optimizer step, and they are gone when the step is "
                "over: leave out what clears them (`zero_grad` in the module's `optimizer_step`, say); Lightning does "
                "it before the next backward"
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # which leaves a step out, with gradients of inf
        self.allocator.update(step, score=self._steps and (scaler is None or _finite(gradients)))
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # public, set out of mypy's sight
        if step % every == 0 or step == self.allocator.schedule.settled_at:
            for logger in trainer.loggers:
                logger.log_metrics(self.metrics(step), step=step)

    def metrics(self, step: int) -> dict[str, float]:
        """What is logged, see the class; empty before a fit."""
        if self.allocator is None:
            return {}
        ranks = torch.tensor(list(self.allocator.ranks().values()), dtype=torch.float64)
        quartiles = torch.quantile(ranks, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)).tolist()
        names = ("rank_min", "rank_q25", "rank_median", "rank_q75", "rank_max")
        return {
            "adalora/budget": float(self.allocator.schedule.budget(step)),
            "adalora/rank_mean": float(ranks.mean()),
            **{f"adalora/{name}": value for name, value in zip(names, quartiles, strict=True)},
            "adalora/layers_at_zero": float((ranks == 0).sum()),
            "adalora/orthogonality": float(orthogonality(self.allocator.layers.values())),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        """Schedule, scores and ranks: primitives and tensors."""
        if self.allocator is None:
            return self._restored
        return {"total_step": self.allocator.schedule.total, "allocator": self.allocator.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them for the start of training."""
        self._restored = state_dict

    def _expected_steps(self, trainer: pl.Trainer) -> int:
        expected = self.config.total_step or trainer.estimated_stepping_batches
        if getattr(trainer, "fast_dev_run", False):  # which cuts a run short to see whether it works at all
            expected = max(expected, self.config.tinit + self.config.tfinal + 2)
        if math.isinf(expected) or expected < 1:
            raise ConfigError(
                "`AdaLoRA` shares its schedule out over the run, whose length is unknown: give the Trainer `max_steps` "
                "or `max_epochs`, or `AdaLoRA` `total_step`"
            )
        return int(expected)


def _gradients(allocator: RankAllocator) -> list[Tensor]:
    return [t.grad for triplets in allocator.layers.values() for t in triplets if t.grad is not None]


def _finite(gradients: list[Tensor]) -> bool:
    return bool(torch.stack([grad.abs().amax().float().cpu() for grad in gradients]).isfinite().all())
