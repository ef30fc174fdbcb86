# SPDX-License-Identifier: Apache-2.0
"""`IA3`: the callback that trains rescalings of keys, values and feed-forwards instead of low-rank updates."""

from __future__ import annotations

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import DTypeName, IA3Config, MasterDTypeName, QuantizeMode


class IA3(AdapterCallback):
    """As `LoRA`, with one factor for each key, value and feed-forward unit (Liu et al. 2022).

    Example::

        trainer = Trainer(callbacks=[IA3()])
        trainer.fit(model, datamodule)

    Args:
        target_modules: Which linears to rescale: "auto" (keys, values and the last linear of each feed-forward, by
            their names in transformers' families), "all-linear", a list of name suffixes, or a regular expression
            that matches whole names.
        feedforward_modules: Which of those are rescaled at their inputs instead of their outputs: endings of names,
            or a regular expression. With "auto", those of the feed-forwards if null.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all if null.
        layers_pattern: Name of the block list that `layers_to_transform` counts, e.g. "layers".
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the factors, kept under every `precision`.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError, GradientError, OptimizerError: See `AdapterCallback`.
    """

    def __init__(
        self,
        target_modules: str | list[str] = "auto",
        feedforward_modules: str | list[str] | None = None,
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        modules_to_save: list[str] | None = None,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        init_from: str | None = None,
    ) -> None:
        config = IA3Config(
            target_modules=target_modules,
            feedforward_modules=feedforward_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=modules_to_save,
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
        )
        super().__init__(config, init_from)
