# SPDX-License-Identifier: Apache-2.0
"""Decoders whose sizes are known without transformers: Llama, Mistral, Qwen 2 and Qwen 3, dense and without windows.

Importing transformers' code for one model takes longer than the whole plan. These families differ in a few switches, so
one module stands for them: the same names, shapes and operations, without values. Whatever a configuration says that is
not known here, by key or by value, is left to transformers; a test compares both, to the byte.

    x = x + o(attention(rope(q(n)), rope(k(n)), v(n))),   n = rms(x)
    x = x + down(silu(gate(n)) * up(n)),                  n = rms(x)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

#: By ``model_type``: class of the model, whether q, k and v have biases always, whether q and k are normalized, and the
#: context where a configuration names none.
_FAMILIES = {
    "llama": ("LlamaForCausalLM", False, False, 2_048),
    "mistral": ("MistralForCausalLM", False, False, 131_072),
    "qwen2": ("Qwen2ForCausalLM", True, False, 32_768),
    "qwen3": ("Qwen3ForCausalLM", False, True, 32_768),
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
#: Keys that change neither a shape nor what a forward keeps.
_IDLE = {
    *("architectures", "model_type", "_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "rms_norm_eps", "rope_theta", "use_cache"),
    *("max_position_embeddings", "pretraining_tp", "max_window_layers", "auto_map", "bos_token", "eos_token"),
}
#: Keys with the values at which a model is as it is here; null and absent are among them.
_AT = {
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "mlp_bias": (False,),
}
#: Rotations whose frequencies are as many as without one.
_ROPES = ("default", "linear", "llama3")


@dataclass
class DecoderConfig:
    """What sets one decoder apart from another.

    Args:
        name: Of its class in transformers.
        vocab_size: Words.
        hidden_size: Width.
        intermediate_size: Width inside the MLP.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads of the queries.
        num_key_value_heads: Heads of keys and values.
        head_dim: Width of a head.
        tied: Whether the head is the embedding.
        bias: Whether q, k and v have biases.
        output_bias: Whether the attention's output has one.
        head_norm: Whether the heads of q and k are normalized.
        context: Tokens that it was made for.
    """

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tied: bool
    bias: bool
    output_bias: bool
    head_norm: bool
    context: int

    def get_text_config(self) -> DecoderConfig:
        """Itself: these models know text alone."""
        return self


def known_decoder(values: Mapping[str, Any]) -> DecoderConfig | None:
    """The decoder of a ``config.json``; None for one that transformers must be asked about.

    Args:
        values: The file's contents.
    """
    family = _FAMILIES.get(str(values.get("model_type")))
    sizes = [values.get(key) for key in _SIZES]
    if family is None or not all(type(size) is int and size > 0 for size in sizes):
        return None
    name, always_bias, head_norm, usual = family
    positions = values.get("max_position_embeddings") or usual
    vocab, hidden, inner, layers, heads = (int(size) for size in sizes if size is not None)
    # Classes have other defaults for these, save Llama.
    kv_heads = values.get("num_key_value_heads", heads if name.startswith("Llama") else None)
    head_dim = values.get("head_dim", None if head_norm else hidden // heads) or (0 if head_norm else hidden // heads)
    flags = [values.get(key, False) for key in ("tie_word_embeddings", "attention_bias")]
    given = {key: value for key, value in values.items() if key not in _IDLE and value is not None}
    own = {*_SIZES, "num_key_value_heads", "head_dim", "tie_word_embeddings", "attention_bias"}
    if (
        type(kv_heads) is not int
        or type(head_dim) is not int
        or type(positions) is not int
        or kv_heads < 1
        or head_dim < 2
        or head_dim % 2
        or hidden % heads
        or heads % kv_heads
        or not all(type(flag) is bool for flag in flags)
        or values.get("architectures") not in (None, [name])
        or any(key not in own and not _as_here(key, value, layers, values) for key, value in given.items())
        or (name.startswith(("Mistral", "Qwen2")) and "attention_bias" in given)
        or (name.startswith("Mistral") and "sliding_window" not in values)  # its class has one unless null is said
    ):
        return None
    return DecoderConfig(
        name, vocab, hidden, inner, layers, heads, kv_heads, head_dim, flags[0], always_bias or flags[1], flags[1],
        head_norm, context_length(positions, values.get("rope_parameters") or values.get("rope_scaling")),
    )  # fmt: skip


def context_length(positions: int, rope: Any) -> int:
    """Tokens that a model with rotary positions was made for.

    Args:
        positions: ``max_position_embeddings``: with an extension of the rotation in some files, without in others.
        rope: How the rotation is scaled, as the configuration has it.
    """
    scaling = rope if isinstance(rope, Mapping) else {}
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if not isinstance(factor, int | float) or not isinstance(original, int | float):
        return positions
    return max(positions, int(factor * original))


def _as_here(key: str, value: Any, layers: int, values: Mapping[str, Any]) -> bool:
    """Whether a key has a value at which the model is as it is here."""
    if key in ("rope_scaling", "rope_parameters"):
        kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, Mapping) else None
        return kind in _ROPES and "partial_rotary_factor" not in value
    if key == "layer_types":
        return value == ["full_attention"] * layers
    if key == "sliding_window":  # Qwen's files have one that is not used
        return str(values["model_type"]).startswith("qwen") and values.get("use_sliding_window", False) is False
    return key in _AT and type(value) in map(type, _AT[key]) and value in _AT[key]


class _Linear(nn.Linear):
    """Without random values: on the meta device there are none to draw."""

    def reset_parameters(self) -> None:
        pass


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        pass


class Decoder(nn.Module):
    """The model of a `DecoderConfig`, for the meta device.

    Args:
        config: Its sizes.
        dtype: Of its weights.
    """

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = _Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.model.layers = nn.ModuleList(_Block(config, dtype) for _ in range(config.num_hidden_layers))
        self.model.norm = _Norm(config.hidden_size, dtype)
        self.model.rotary_emb = _Rotation(config.head_dim)
        self.lm_head = _Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype)
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models."""
        return self.model.embed_tokens  # type: ignore[return-value]

    def forward(self, inputs_embeds: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Logits (rows, tokens, words) of embedded tokens (rows, tokens, width)."""
        x, inner = inputs_embeds, self.model
        turns = inner.rotary_emb(x)  # type: ignore[operator]
        for block in inner.layers:  # type: ignore[union-attr]
            x = block(x, turns)
        return SimpleNamespace(logits=self.lm_head(inner.norm(x)))  # type: ignore[operator]

    def loss_function(self, logits: Tensor, labels: Tensor, vocab_size: int) -> Tensor:
        """Mean cross entropy of the next tokens, in fp32."""
        following = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        return nn.functional.cross_entropy(logits.float().view(-1, vocab_size), following.view(-1), ignore_index=-100)


class _Block(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = _Attention(config, dtype)
        self.mlp = _MLP(config, dtype)
        self.input_layernorm = _Norm(config.hidden_size, dtype)
        self.post_attention_layernorm = _Norm(config.hidden_size, dtype)

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turns)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = _Linear(config.hidden_size, queries, config.bias, dtype=dtype)
        self.k_proj = _Linear(config.hidden_size, keys, config.bias, dtype=dtype)
        self.v_proj = _Linear(config.hidden_size, keys, config.bias, dtype=dtype)
        self.o_proj = _Linear(queries, config.hidden_size, config.output_bias, dtype=dtype)
        self.q_norm = _Norm(config.head_dim, dtype) if config.head_norm else None
        self.k_norm = _Norm(config.head_dim, dtype) if config.head_norm else None

    def forward(self, x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (_turned(t.transpose(1, 2), *turns) for t in (q, k))
        mixed: Tensor = _Attend.apply(q, k.clone(), v.transpose(1, 2).clone())
        return self.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:-1], -1))


class _MLP(nn.Module):
    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = _Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype)
        self.up_proj = _Linear(config.hidden_size, config.intermediate_size, bias=False, dtype=dtype)
        self.down_proj = _Linear(config.intermediate_size, config.hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Norm(nn.Module):
    """Root mean square, computed in fp32."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * scaled.to(x.dtype)


class _Rotation(nn.Module):
    """Cosines and sines; the frequencies are kept twice, as transformers does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("inv_freq", "original_inv_freq"):
            self.register_buffer(name, torch.ones(width // 2, dtype=torch.float32), persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)[None, :, None]
        frequencies: Any = self.inv_freq
        angles = torch.cat((places * frequencies,) * 2, dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + swapped * sin.unsqueeze(1)


class _Attend(torch.autograd.Function):
    """What the CPU's fused kernel keeps: q, k, v, the output, and one fp32 number a query; nothing is computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, mixed, q.new_empty(q.shape[:3], dtype=torch.float32))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("a model without values is not trained")
