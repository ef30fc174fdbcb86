# SPDX-License-Identifier: Apache-2.0
"""`PromptedDecoder`: a frozen decoder behind trained embeddings (prompt tuning, Lester et al. 2021).

P (n, width) is trained, E(x) (T, width) the embeddings of the input:

    h = decoder([P; E(x)])[n:]
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.nn.adapter import KeepsDType, torch_dtype
from lightning_lora.nn.virtual import VirtualTokens, lengthened, refuse_unknown, shortened


class PromptAdapter(KeepsDType):
    """The embeddings of the virtual tokens, master weights."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(start)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"embedding={tuple(self.embedding.shape)}, {self.embedding.dtype}"


class PromptedDecoder(VirtualTokens):
    """Runs ``decoder`` over virtual tokens and the input.

    Args:
        decoder: The user's, of transformers; frozen by the caller.
        record: Its config is a `PromptTuningConfig`.
    """

    title = "prompt tuning"

    def __init__(self, decoder: nn.Module, record: AdapterRecord) -> None:
        config: Any = record.config
        start = prompt_start(config, decoder.get_input_embeddings())  # type: ignore[operator]
        super().__init__(decoder, record, PromptAdapter(start.to(torch_dtype(config.adapter_dtype))))
        self.room = learned_positions(decoder)

    @property
    def embedding(self) -> nn.Parameter:
        """``(num_virtual_tokens, width)``."""
        return self.adapter.embedding  # type: ignore[return-value]

    @property
    def count(self) -> int:
        """See `VirtualTokens.count`."""
        return self.embedding.shape[0]

    def _first(self, given: dict[str, Any]) -> Any:
        refuse_unknown(self.title, given)
        x = self._embedded(given)
        batch, length, width = x.shape
        count = self.count
        self._check_room(count + length)
        given["inputs_embeds"] = torch.cat([self.embedding.to(x.dtype).expand(batch, count, width), x], dim=1)
        if given["attention_mask"] is not None:
            given["attention_mask"] = lengthened(given["attention_mask"], count)
        positions = given.get("position_ids")
        if positions is not None:
            own = torch.arange(count, dtype=positions.dtype, device=positions.device)
            own = own.expand(*positions.shape[:-1], count)
            given["position_ids"] = torch.cat([own, positions + count], dim=-1)
        return shortened(self.decoder(**given), batch, count)

    def _check_room(self, length: int) -> None:
        if self.room is not None and length > self.room:
            raise UnsupportedError(
                f"{length} tokens, the {self.count} virtual ones among them, are more than the {self.room} positions "
                "that the model has learned: shorten the input by as many"
            )


def learned_positions(decoder: nn.Module) -> int | None:
    """How many positions a decoder has an embedding for; None where positions are computed."""
    words = decoder.get_input_embeddings()  # type: ignore[operator]
    most = getattr(decoder.config, "max_position_embeddings", None)
    tables = [m.num_embeddings for m in decoder.modules() if isinstance(m, nn.Embedding) and m is not words]
    return most if isinstance(most, int) and any(number >= most for number in tables) else None


@torch.no_grad()
def prompt_start(config: Any, words: nn.Module) -> Tensor:
    """The embeddings that virtual tokens begin with, (num_virtual_tokens, width), in fp32.

    Args:
        config: A `PromptTuningConfig`.
        words: The embedding of the real tokens.

    Raises:
        UnsupportedError: They are to be words' and those have no values yet.
        ConfigError: The text has no tokens.
    """
    weight: Tensor = words.weight  # type: ignore[assignment]
    count = config.num_virtual_tokens
    if config.prompt_tuning_init == "random":
        device = weight.device
        return torch.empty(count, weight.shape[1], dtype=torch.float32, device=device).normal_()
    if weight.is_meta:
        raise UnsupportedError(
            f"`prompt_tuning_init={config.prompt_tuning_init!r}` begins with embeddings of words, which have no values "
            'yet (meta device): use "random", or load the base first'
        )
    sampled = config.prompt_tuning_init == "sample_vocab"
    ids = torch.randint(weight.shape[0], (count,)) if sampled else text_ids(config)
    return weight.detach()[ids.to(weight.device)].float().clone()


def text_ids(config: Any) -> Tensor:
    """The token ids of ``prompt_tuning_init_text``, repeated or cut to the number of virtual tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ConfigError(
            f"`prompt_tuning_init_text` {config.prompt_tuning_init_text!r} has no tokens: give a text that has some"
        )
    count = config.num_virtual_tokens
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])
