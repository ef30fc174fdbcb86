# SPDX-License-Identifier: Apache-2.0
"""`LoRA`: the callback that makes an ordinary LightningModule train low-rank adapters on a frozen base."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.callbacks.adapting import AdapterCallback, optimizers_in
from lightning_lora.callbacks.first_batches import FirstBatches
from lightning_lora.config import DTypeName, LoRAConfig, MasterDTypeName, QuantizeMode
from lightning_lora.model.eva import eva_start
from lightning_lora.model.loraplus import part_groups, schedulers_in
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear


class LoRA(AdapterCallback):
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
        init_lora_weights: Start of the factors: with B zero "kaiming", "gaussian" or "eva" (by the run's own first
            batches); taken out of the base "pissa", "pissa_niter_N", "olora" or "loftq".
        loftq_iter: Rounds of "loftq".
        eva_batches: How many batches "eva" looks at, before the first step.
        freeze_lora_A: Train B alone (LoRA-FA): the layers' inputs are not kept for backward.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the master adapters, kept under every `precision`.
        target_parameters: Fused experts to adapt beside `target_modules`: names of parameters, or their ends, such as
            ``["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]``.
        trainable_token_indices: Ids of tokens whose rows of the input embedding are trained, or a table of them by
            name of an embedding or a head; a head that is tied to the embedding follows.
        loraplus_lr_ratio: LoRA+: the learning rate of B as a multiple of that of A, such as 16. Each group of the
            optimizers that holds both is parted in two, and schedulers follow; null leaves the groups alone.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only. A checkpoint that
            is given to `fit` goes before it.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it.
        GradientError, OptimizerError: Adapters are in the model but would not learn.
    """

    config: LoRAConfig

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
        init_lora_weights: str = "kaiming",
        loftq_iter: int = 1,
        eva_batches: int = 8,
        freeze_lora_A: bool = False,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        target_parameters: list[str] | None = None,
        trainable_token_indices: list[int] | dict[str, list[int]] | None = None,
        loraplus_lr_ratio: float | None = None,
        init_from: str | None = None,
    ) -> None:
        config = LoRAConfig(
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
            loftq_iter=loftq_iter,
            eva_batches=eva_batches,
            freeze_lora_A=freeze_lora_A,
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
            target_parameters=target_parameters,
            trainable_token_indices=trainable_token_indices,
            loraplus_lr_ratio=loraplus_lr_ratio,
        )
        super().__init__(config, init_from)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """EVA looks at the first batches; not in a run that goes on, or that began with weights."""
        fresh = trainer.global_step == 0 and trainer.ckpt_path is None and self.init_from is None
        if self.config.init_lora_weights == "eva" and fresh and _are_untrained(pl_module):
            first = FirstBatches(trainer, pl_module, self.config.eva_batches)
            shares = eva_start(pl_module, first, first.run)
            mean = sum(shares.values()) / max(len(shares), 1)
            rank_zero_info(
                f"LoRA: {len(shares)} layers begin by EVA over {first.count} batches; their A holds {mean:.0%} of "
                "their inputs' variance, on average"
            )
        super().on_train_start(trainer, pl_module)

    def adjust_optimizers(self, result: Any, pl_module: pl.LightningModule) -> None:
        """LoRA+: part each group that holds A and B in two."""
        if self.config.loraplus_lr_ratio is not None:
            part_groups(optimizers_in(result), schedulers_in(result), pl_module, self.config.loraplus_lr_ratio)


def _are_untrained(model: nn.Module) -> bool:
    return all(module.untrained() for _, module in adapter_modules(model) if isinstance(module, LoRALinear))
