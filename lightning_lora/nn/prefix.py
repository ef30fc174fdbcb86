# SPDX-License-Identifier: Apache-2.0
"""`PrefixedDecoder`: a frozen decoder whose attention sees trained keys and values (prefix tuning, Li & Liang 2021).

P (n, layers, 2, heads, head width) is trained, or made by an MLP of smaller embeddings. In each layer

    attention(q, [P_k; k], [P_v; v])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.adapter import KeepsDType, torch_dtype
from lightning_lora.nn.virtual import VirtualTokens

# What a configuration says of layers whose keys and values are not (heads, tokens, head width), alike in all layers.
_OTHER_SHAPES = ("per_layer_config", "global_head_dim", "num_kv_shared_layers", "kv_lora_rank")
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")


class PrefixAdapter(KeepsDType):
    """Keys and values of the virtual tokens, master weights; or what they are made of.

    Args:
        count: Virtual tokens.
        width: Of one layer's keys: heads times head width.
        layers: How many.
        hidden: Inner width of the MLP that makes them; None for none.
        zero: Whether all begin at zero.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        count: int,
        width: int,
        layers: int,
        hidden: int | None,
        zero: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        total = layers * 2 * width
        self.embedding = nn.Parameter(
            torch.empty(count, total if hidden is None else width, device=device, dtype=dtype)
        )
        nn.init.normal_(self.embedding)
        self.transform: nn.Sequential | None = None
        if hidden is not None:
            self.transform = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, total))
            self.transform.to(device, dtype)
        if zero:
            for parameter in [self.embedding] if self.transform is None else self.transform[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self) -> Tensor:
        """``(count, layers * 2 * width)``."""
        return self.embedding if self.transform is None else self.transform(self.embedding)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"embedding={tuple(self.embedding.shape)}, {self.embedding.dtype}"


class PrefixedDecoder(VirtualTokens):
    """Runs ``decoder`` over a cache that begins with trained keys and values.

    Args:
        decoder: The user's, of transformers; frozen by the caller.
        record: Its config is a `PrefixTuningConfig`.

    Raises:
        UnsupportedError: The decoder has layers without keys and values of one shape.
    """

    title = "prefix tuning"

    def __init__(self, decoder: nn.Module, record: AdapterRecord) -> None:
        config: Any = record.config
        self.layers, self.heads, self.head_width = cache_shape(decoder)
        width = self.heads * self.head_width
        hidden = (config.encoder_hidden_size or width) if config.prefix_projection else None
        device = decoder.get_input_embeddings().weight.device  # type: ignore[operator]
        dtype = torch_dtype(config.adapter_dtype)
        adapter = PrefixAdapter(
            config.num_virtual_tokens, width, self.layers, hidden, config.init_weights == "zero", device, dtype
        )
        super().__init__(decoder, record, adapter)

    @property
    def count(self) -> int:
        """See `VirtualTokens.count`."""
        embedding: Tensor = self.adapter.embedding  # type: ignore[assignment]
        return embedding.shape[0]

    def prefix(self) -> Tensor:
        """All keys and values as one matrix, (num_virtual_tokens, layers * 2 * heads * head width)."""
        return self.adapter()

    def _first(self, given: dict[str, Any]) -> Any:
        self._refuse_recomputing()
        own = given.get("inputs_embeds")
        batch = (given["input_ids"] if own is None else own).shape[0]
        keeps = given.get("past_key_values") is not None or given.get("use_cache") is not False
        given["past_key_values"] = self._filled(given.get("past_key_values"), batch)
        output = self._later(given)
        if not keeps:
            output["past_key_values"] = None
        return output

    def _filled(self, cache: Any, batch: int) -> Any:
        """A cache that holds the prefix."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.decoder.config) if cache is None else cache
        dtype = self.decoder.get_input_embeddings().weight.dtype  # type: ignore[operator]
        # (count, layers, 2, heads, width) -> layers, 2, batch, heads, count, width
        values = self.prefix().to(dtype).view(self.count, self.layers, 2, self.heads, self.head_width)
        values = values.permute(1, 2, 3, 0, 4)[:, :, None].expand(-1, -1, batch, -1, -1, -1)
        for number, (keys, own) in enumerate(values):
            cache.update(keys, own, number)
        return cache

    def _refuse_recomputing(self) -> None:
        if self.training and any(
            getattr(m, "gradient_checkpointing", False) and m.training for m in self.decoder.modules()
        ):
            raise UnsupportedError(
                "prefix tuning does not go with gradient checkpointing: transformers leaves the cache out, in which "
                "the prefix is, where it recomputes. Switch it off, or use prompt tuning"
            )


def cache_shape(decoder: nn.Module) -> tuple[int, int, int]:
    """Layers, heads of keys and values, and their width, of a decoder.

    Raises:
        UnsupportedError: Its layers are not alike in this.
    """
    config: Any = decoder.config
    said = config.to_dict()
    kinds = [kind for kind in said.get("layer_types") or () if kind not in _ATTENTION]
    other = kinds or [name for name in _OTHER_SHAPES if said.get(name)]
    if other:
        raise UnsupportedError(
            f"prefix tuning needs keys and values of one shape in every layer, {type(decoder).__name__} has "
            f"{other[0]!r}: use prompt tuning"
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width
