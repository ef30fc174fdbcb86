# SPDX-License-Identifier: Apache-2.0
"""`NormTuning`: the callback that makes an ordinary LightningModule train its norms alone."""

from __future__ import annotations

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import DTypeName, NormTuningConfig, QuantizeMode


class NormTuning(AdapterCallback):
    """Trains weights and biases of norms, each beside its frozen original; all else is frozen (PEFT's LN_TUNING).

    Example::

        trainer = Trainer(callbacks=[NormTuning(quantize="nf4")])
        trainer.fit(model, datamodule)

    Args:
        target_modules: "all-norms" (every LayerNorm, RMSNorm and GroupNorm with a weight), a list of name suffixes,
            or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of norms to leave alone.
        layers_to_transform: Indices of the blocks whose norms are trained; all if null.
        layers_pattern: Name of the block list that `layers_to_transform` counts, e.g. "layers".
        modules_to_save: Name suffixes of other modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only.

    Raises:
        ConfigError: An argument is out of its range.
        TargetError: No norm matched, or something that is none.
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it.
    """

    config: NormTuningConfig

    def __init__(
        self,
        target_modules: str | list[str] = "all-norms",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        modules_to_save: list[str] | None = None,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        init_from: str | None = None,
    ) -> None:
        config = NormTuningConfig(
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            layers_to_transform=layers_to_transform,
            layers_pattern=layers_pattern,
            modules_to_save=modules_to_save,
            quantize=quantize,
            compute_dtype=compute_dtype,
        )
        super().__init__(config, init_from)
