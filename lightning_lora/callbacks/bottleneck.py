# SPDX-License-Identifier: Apache-2.0
"""`Bottleneck`: the callback that makes a transformer train small networks after its sublayers."""

from __future__ import annotations

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import (
    BottleneckConfig,
    BottleneckMode,
    DTypeName,
    MasterDTypeName,
    NonLinearity,
    Placement,
    QuantizeMode,
)


class Bottleneck(AdapterCallback):
    """Trains bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021; He et al. 2022); all else is frozen.

    Example::

        trainer = Trainer(callbacks=[Bottleneck(placement="houlsby", reduction_factor=16)])
        trainer.fit(model, datamodule)

    Args:
        placement: "houlsby": after attention and after feed-forward sublayers; "pfeiffer": after feed-forward alone.
        mode: Whether the adapter reads the sublayer's output ("sequential") or its input ("parallel").
        reduction_factor: Width of the hidden states over the size of the bottleneck.
        bottleneck_size: The size itself, instead of `reduction_factor`.
        non_linearity: Between down and up: "relu", "gelu", "silu", "tanh", "identity".
        scaling: Factor of what is added.
        stack: Folders of earlier bottleneck adapters that stay frozen below this one, the lowest first.
        target_modules: "blocks": the sublayers of transformer blocks that `placement` names, found by structure;
            else name suffixes, or a regular expression, of modules that give hidden states, whatever the placement.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all if null.
        layers_pattern: Name of the block list that `layers_to_transform` counts, e.g. "layers".
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the master adapters, kept under every `precision`.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only.

    Raises:
        ConfigError: An argument is out of its range.
        TargetError: No blocks were found, or names match nothing.
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it.
    """

    config: BottleneckConfig

    def __init__(
        self,
        placement: Placement = "pfeiffer",
        mode: BottleneckMode = "sequential",
        reduction_factor: float = 16.0,
        bottleneck_size: int | None = None,
        non_linearity: NonLinearity = "relu",
        scaling: float = 1.0,
        stack: list[str] | None = None,
        target_modules: str | list[str] = "blocks",
        exclude_modules: str | list[str] | None = None,
        layers_to_transform: int | list[int] | None = None,
        layers_pattern: str | None = None,
        modules_to_save: list[str] | None = None,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        init_from: str | None = None,
    ) -> None:
        config = BottleneckConfig(
            placement=placement,
            mode=mode,
            reduction_factor=reduction_factor,
            bottleneck_size=bottleneck_size,
            non_linearity=non_linearity,
            scaling=scaling,
            stack=stack,
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
