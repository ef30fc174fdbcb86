# SPDX-License-Identifier: Apache-2.0
"""`PromptTuningConfig`: embeddings of virtual tokens before the input (Lester et al. 2021); words as in PEFT."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from lightning_lora.config.base import AdapterConfig, check_choice, check_rank, refuse_fields
from lightning_lora.errors import ConfigError

PromptInit = Literal["random", "text", "sample_vocab"]

#: Fields that choose modules, of which methods at the decoder as a whole have no use.
CHOOSING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(AdapterConfig):
    """How many virtual tokens a causal model sees before its input, and what they begin as.

    Args:
        num_virtual_tokens: How many.
        prompt_tuning_init: What they begin as: "random" (normal), "text" (the words of a text) or "sample_vocab"
            (words drawn from the vocabulary).
        prompt_tuning_init_text: The text, for "text"; repeated or cut to the number of virtual tokens.
        tokenizer_name_or_path: What `AutoTokenizer` reads the text's tokenizer from, for "text".
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq", "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in.
        adapter_dtype: Dtype of the master embeddings.

    Raises:
        ConfigError: An argument is out of its range, or of no use to the method.
    """

    method: ClassVar[str] = "prompt_tuning"
    title: ClassVar[str] = "prompt tuning"
    mergeable: ClassVar[bool] = False
    free_fields: ClassVar[tuple[str, ...]] = (
        *("compute_dtype", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
    )

    num_virtual_tokens: int = 20
    prompt_tuning_init: PromptInit = "random"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_fields(self, CHOOSING, "it stands before the decoder as a whole")
        check_rank("num_virtual_tokens", self.num_virtual_tokens)
        check_choice("prompt_tuning_init", self.prompt_tuning_init, PromptInit)
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            value: Any = getattr(self, name)
            wanted = self.prompt_tuning_init == "text"
            if wanted and (not isinstance(value, str) or not value):
                raise ConfigError(f'`prompt_tuning_init="text"` needs `{name}`, got {value!r}')
            if not wanted and value is not None:
                raise ConfigError(
                    f'`{name}` is of use with `prompt_tuning_init="text"` alone, which is '
                    f"{self.prompt_tuning_init!r}: leave it out"
                )

    def stored(self) -> Self:
        """See `AdapterConfig.stored`: what the embeddings began as is over."""
        return dataclasses.replace(
            self, prompt_tuning_init="random", prompt_tuning_init_text=None, tokenizer_name_or_path=None
        )
