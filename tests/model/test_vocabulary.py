# SPDX-License-Identifier: Apache-2.0
"""`add_tokens`: a real tokenizer and model grow by the same words, and rows begin as the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.fingerprint import fingerprint
from lightning_lora.model.vocabulary import add_tokens
from small_base.data import load_tokenizer
from tests.helpers import LM, tiny_llama

WORDS = ["<call>", "</call>", "<call>"]


@pytest.mark.parametrize("tied", [False, True])
def test_model_and_tokenizer_grow_by_the_same_rows_every_time(tied: bool) -> None:
    tokenizer = load_tokenizer()
    size = len(tokenizer)

    def grown(words: object = tokenizer) -> nn.Module:
        model = tiny_llama(vocab=size, tie_word_embeddings=tied)
        assert add_tokens(LM(model), words, WORDS) == [size, size + 1]
        return model

    model = grown()
    assert tokenizer.encode("a<call>b", add_special_tokens=False).count(size) == 1
    assert model.config.vocab_size == size + 2
    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert torch.allclose(weight[size:], weight[:size].mean(0), atol=1e-7)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    assert fingerprint(model) == fingerprint(grown())  # the tokenizer knows the words by now
    assert fingerprint(model) == fingerprint(grown(load_tokenizer()))


def test_rows_in_reserve_are_used_and_known_words_left_alone() -> None:
    tokenizer = load_tokenizer()
    model = tiny_llama(vocab=len(tokenizer) + 8)
    before = model.get_input_embeddings().weight.detach().clone()
    known = tokenizer.convert_ids_to_tokens([40])
    assert add_tokens(model, tokenizer, [*known, "<call>"]) == [40, len(tokenizer) - 1]
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_what_cannot_be_done_is_said() -> None:
    tokenizer = load_tokenizer()
    for wrong in ("<call>", [], [3]):
        with pytest.raises(ConfigError, match="`tokens` must be a list of words"):
            add_tokens(tiny_llama(), tokenizer, wrong)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="one transformers model, and there are 0"):
        add_tokens(nn.Linear(2, 2), tokenizer, WORDS)
    model = tiny_llama(vocab=len(tokenizer))
    apply_lora(model, LoRAConfig(r=2))
    with pytest.raises(ConfigError, match="add tokens before they are put in"):
        add_tokens(model, tokenizer, WORDS)
    assert len(tokenizer) == len(load_tokenizer())  # nothing was added
