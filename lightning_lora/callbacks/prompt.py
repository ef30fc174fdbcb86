# SPDX-License-Identifier: Apache-2.0
"""`PromptTuning`: the callback that makes a causal model train embeddings of virtual tokens before its input."""

from __future__ import annotations

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import DTypeName, MasterDTypeName, PromptInit, PromptTuningConfig, QuantizeMode


class PromptTuning(AdapterCallback):
    """Trains virtual tokens before the input of a causal model (Lester et al. 2021); all else is frozen.

    Example::

        trainer = Trainer(callbacks=[PromptTuning(num_virtual_tokens=20)])
        trainer.fit(model, datamodule)

    Args:
        num_virtual_tokens: How many.
        prompt_tuning_init: What they begin as: "random", "text" (the words of a text) or "sample_vocab" (words
            drawn from the vocabulary).
        prompt_tuning_init_text: The text, for "text".
        tokenizer_name_or_path: What `AutoTokenizer` reads the text's tokenizer from, for "text".
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in, where narrower than the activations; "auto" is theirs.
        adapter_dtype: Dtype of the master embeddings, kept under every `precision`.
        init_from: Adapter folder, or a checkpoint of an earlier run, to start from: weights only.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: The model is no causal decoder of transformers behind a head, or the Trainer's strategy,
            precision plugin or callbacks do not go with it.
    """

    config: PromptTuningConfig

    def __init__(
        self,
        num_virtual_tokens: int = 20,
        prompt_tuning_init: PromptInit = "random",
        prompt_tuning_init_text: str | None = None,
        tokenizer_name_or_path: str | None = None,
        quantize: QuantizeMode = "none",
        compute_dtype: DTypeName = "auto",
        adapter_dtype: MasterDTypeName = "fp32",
        init_from: str | None = None,
    ) -> None:
        config = PromptTuningConfig(
            num_virtual_tokens=num_virtual_tokens,
            prompt_tuning_init=prompt_tuning_init,
            prompt_tuning_init_text=prompt_tuning_init_text,
            tokenizer_name_or_path=tokenizer_name_or_path,
            quantize=quantize,
            compute_dtype=compute_dtype,
            adapter_dtype=adapter_dtype,
        )
        super().__init__(config, init_from)
