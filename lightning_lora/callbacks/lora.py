# SPDX-License-Identifier: Apache-2.0
"""`LoRA`: the callback that makes an ordinary LightningModule train low-rank adapters on a frozen base."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_lora.callbacks.adapting import AdapterCallback, optimizers_in
from lightning_lora.config import DTypeName, InitMode, LoRAConfig, MasterDTypeName, QuantizeMode
from lightning_lora.model.loraplus import part_groups, schedulers_in


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
        init_lora_weights: InitMode = "kaiming",
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
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
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
            loraplus_lr_ratio=loraplus_lr_ratio,
        )
        super().__init__(config, init_from)

    def adjust_optimizers(self, result: Any, pl_module: pl.LightningModule) -> None:
        """LoRA+: part each group that holds A and B in two."""
        if self.config.loraplus_lr_ratio is not None:
            part_groups(optimizers_in(result), schedulers_in(result), pl_module, self.config.loraplus_lr_ratio)
