# SPDX-License-Identifier: Apache-2.0
"""`add_tokens`: new words for a tokenizer and rows for them in a model, before its conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.model.inner import hf_models
from lightning_lora.model.slots import is_adapted


@torch.no_grad()
def add_tokens(model: nn.Module, tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    """Add ``tokens`` to ``tokenizer`` and rows for them to ``model``, in place.

    The rows, in the input embedding and in a head that is not tied to it, begin as the mean of those before: the same
    in every process and every time, so that an adapter that was trained over them finds its base again. Rows that the
    model has in reserve are used first, as they are; it is never made smaller.

    Args:
        model: A transformers model, or a LightningModule around one, not yet converted.
        tokenizer: Of transformers.
        tokens: The words. Those that the tokenizer knows already keep their ids, and the model its rows for them.

    Returns:
        The ids of all of them, for ``trainable_token_indices``.

    Raises:
        ConfigError: ``tokens`` is no list of words, or the model carries adapters already.
        UnsupportedError: There is no one transformers model with an input embedding that has values.
    """
    if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise ConfigError(f'`tokens` must be a list of words, such as ["<call>", "</call>"], got {tokens!r}')
    if is_adapted(model):
        raise ConfigError("the model carries adapters already: add tokens before they are put in")
    found = hf_models(model)
    if len(found) != 1:
        raise UnsupportedError(
            f"`add_tokens` resizes one transformers model, and there are {len(found)}: give the model itself"
        )
    hf: Any = found[0][1]
    tokenizer.add_tokens(list(tokens))
    ids = list(dict.fromkeys(int(index) for index in tokenizer.convert_tokens_to_ids(list(tokens))))
    rows = hf.get_input_embeddings().weight.shape[0]
    if hf.get_input_embeddings().weight.is_meta:
        raise UnsupportedError("`add_tokens`: new rows begin as the mean of the others, which have no values yet")
    if max(ids) >= rows:
        hf.resize_token_embeddings(max(len(tokenizer), max(ids) + 1), mean_resizing=False)
        for weight in _weights(hf):
            weight[rows:] = weight[:rows].mean(0, dtype=torch.float32).to(weight.dtype)
    return ids


def _weights(hf: Any) -> list[Tensor]:
    """Of the input embedding and, where it has one of its own, of the head."""
    head = hf.get_output_embeddings()
    found = [hf.get_input_embeddings().weight, *([] if head is None else [head.weight])]
    return found[:1] if found[-1] is found[0] else found
