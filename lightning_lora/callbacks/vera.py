# SPDX-License-Identifier: Apache-2.0
"""`VeRA`: the callback that trains vectors between random matrices that all layers share."""

from __future__ import annotations

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import DTypeName, MasterDTypeName, QuantizeMode, VeRAConfig


class VeRA(AdapterCallback):
    """Quantizes the base, puts VeRA's vectors on the chosen linears and freezes the rest (Kopiczko et al. 2024).

    Everything else is as with `LoRA`; `VeRAConfig` and the page on VeRA say what is computed.

    Example::

        trainer = Trainer(callbacks=[VeRA(r=256, quantize="nf4")])
        trainer.fit(model, datamodule)

    Args:
        r: Rank of the shared matrices; far larger than LoRA's.
        d_initial: Where every ``vera_lambda_d`` begins; ``vera_lambda_b`` begins at zero.
        projection_prng_key: Seed of the shared matrices.
        save_projection: Whether folders and checkpoints hold the shared matrices, once.
        vera_dropout: Share of the adapter's input that is dropped in training, in [0, 1).
        target_modules: Which linears to adapt: "all-linear" (all but the output head), a list of name
            suffixes, or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt; all if null.
        layers_pattern: Name of the block list that `layers_to_transform` counts, e.g. "layers".
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the vectors and of the shared matrices, kept under every `precision`.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only. A checkpoint that
            is given to `fit` goes before it.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: The Trainer's strategy, precision plugin or callbacks do not go with it.
        GradientError, OptimizerError: Vectors are in the model but would not learn.
    """

    config: VeRAConfig

    def __init__(
        self,
        r: int = 256,
        d_initial: float = 0.1,
        projection_prng_key: int = 0,
        save_projection: bool = True,
        vera_dropout: float = 0.0,
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
        config = VeRAConfig(
            r=r,
            d_initial=d_initial,
            projection_prng_key=projection_prng_key,
            save_projection=save_projection,
            vera_dropout=vera_dropout,
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
