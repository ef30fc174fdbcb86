# SPDX-License-Identifier: Apache-2.0
"""`PrefixTuning`: the callback that makes a causal model train keys and values before those of its input."""

from __future__ import annotations

from typing import Literal

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import DTypeName, MasterDTypeName, PrefixTuningConfig, QuantizeMode


class PrefixTuning(AdapterCallback):
    """Trains keys and values that every attention of a causal model sees first (Li & Liang 2021); all else is frozen.

    Example::

        trainer = Trainer(callbacks=[PrefixTuning(num_virtual_tokens=20, prefix_projection=True)])
        trainer.fit(model, datamodule)

    Args:
        num_virtual_tokens: How many, in every layer.
        prefix_projection: Make them by an MLP of smaller embeddings; folders hold what it gives.
        encoder_hidden_size: Inner width of the MLP; the width of a layer's keys if null.
        init_weights: "zero" to begin with zeros; normal if null.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the master parameters, kept under every `precision`.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: The model is no causal decoder of transformers behind a head, or recomputes activations
            (gradient checkpointing), or the Trainer's strategy, precision plugin or callbacks do not go with it.
    """

    config: PrefixTuningConfig

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        init_weights: Literal["zero"] | None = None,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        init_from: str | None = None,
    ) -> None:
        config = PrefixTuningConfig(
            num_virtual_tokens=num_virtual_tokens,
            prefix_projection=prefix_projection,
            encoder_hidden_size=encoder_hidden_size,
            init_weights=init_weights,
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
        )
        super().__init__(config, init_from)
