# SPDX-License-Identifier: Apache-2.0
"""`decoder_targets`: the decoder inside a causal model of transformers, for methods that stand at it as a whole."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lightning_lora.config import AdapterConfig
from lightning_lora.errors import UnsupportedError
from lightning_lora.model.inner import hf_models
from lightning_lora.model.targets import Targets, packed_linears

# What a decoder has to take for virtual tokens to be put before its input.
_NEEDED = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")


def decoder_targets(model: nn.Module, config: AdapterConfig) -> Targets:
    """The decoder, and the linears that are packed when the base is quantized.

    Raises:
        UnsupportedError: There is none, or the model is of another kind.
    """
    name = find_decoder(model, config.title)
    return Targets([name], packed_linears(model, config, [], []), [])


def find_decoder(model: nn.Module, title: str) -> str:
    """The name of the decoder in a causal model.

    Args:
        model: A transformers model, or a module around one.
        title: What the method is called in texts.

    Raises:
        UnsupportedError: See `decoder_targets`.
    """
    found = hf_models(model)
    if len(found) != 1:
        raise UnsupportedError(
            f"{title} is built for one causal model of transformers, {type(model).__name__} holds {len(found)}: use "
            "LoRA"
        )
    prefix, hf = found[0]
    kind, settings = type(hf).__name__, _config_of(hf)
    if settings.is_encoder_decoder:
        raise UnsupportedError(f"{title} is not built for encoder-decoders such as {kind}: use LoRA")
    if settings.get_text_config() is not settings:
        raise UnsupportedError(
            f"{title} is not built for {kind}, in which text is one of several inputs: give its language model, or use "
            "LoRA"
        )
    own = getattr(hf, "base_model_prefix", "")
    decoder = getattr(hf, own, None) if own else None
    if not isinstance(decoder, nn.Module):
        raise UnsupportedError(
            f"{kind} is a bare decoder: {title} stands between a decoder and what uses it. Give the model with its "
            "head (AutoModelForCausalLM)"
        )
    takes = inspect.signature(type(decoder).forward).parameters
    missing = [argument for argument in _NEEDED if argument not in takes]
    if missing or not hf.can_generate():  # type: ignore[operator]
        why = f"whose decoder takes no `{missing[0]}`" if missing else "which generates no text"
        raise UnsupportedError(f"{title} is built for causal language models, not for {kind}, {why}: use LoRA")
    return f"{prefix}.{own}" if prefix else own


def _config_of(model: nn.Module) -> Any:
    return model.config
