# SPDX-License-Identifier: Apache-2.0
"""Small configurations of whatever model class transformers has: by the words of its config, not by its name.

A number in a configuration is a width, a count of layers, heads or experts, or an id of a token, and nearly every
configuration says which by one of a few words. `RULES` gives each of them a small value; what still does not fit
together is tried again with the values of the next entry of `RECIPES`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

VOCAB = 128

#: (what the end of a name looks like, its value): the first rule that matches counts. Names in braces are a recipe's.
RULES: list[tuple[str, Any]] = [
    (r"vocab_size(_per_layer_input)?|n_words|text_vocab_size|local_vocab_size|codebook_size|.*group_vocab", VOCAB),
    (r"num_(kv_|key_value_|global_key_value_)heads|n_head_kv|num_kv_shared_layers_heads|kv_n_heads", "{kv}"),
    (r"(num|n)_key_value_heads|num_global_key_value_heads|swa_num_key_value_heads", "{kv}"),
    (r"(linear_num_key_heads|linear_num_value_heads)", 4),
    (r"mamba_num_heads|mamba_n_heads|mamba_nheads|n_mamba_heads|mamba_n_groups|mamba_ngroups|n_groups", "{mamba}"),
    (r".*heads|n_head|n_heads|num_heads|heads", "{heads}"),
    (r"qk_head_dim", "{qk}"),
    (r"qk_rope_head_dim|qk_nope_head_dim", "{half}"),
    (r"rotary_dim|qk_rope_dim|index_head_dim|pos_embedding_dim", 16),
    (r"mamba_head_dim|mamba_d_head|mamba_headdim", "{mamba_dim}"),
    (r".*head_dim|d_kv|head_size|kv_channels|attention_head_size|.*_head_size", 16),
    (r".*lora_rank|.*_rank|time_step_rank|mamba_dt_rank", 16),
    (r"(num|n)_(hidden_|decoder_|encoder_|global_|transformer_)?layers?|n_layers?|decoder_layers|encoder_layers"
     r"|num_blocks|depth|num_layers_.*|n_encoder_layers|n_decoder_layers|text_layers|num_mamba_layers", "{layers}"),
    (r"num_kv_shared_layers|first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|mtp_num_layers", 0),
    (r"num_experts_per_tok(en)?|moe_topk|top_k_experts|moe_top_k|num_selected_experts|moe_k|experts_per_token|topk", 2),
    (r".*num_(local_|routed_|total_)?experts|n_routed_experts|moe_num_experts|num_local_experts|zero_expert_num", 4),
    (r"n_group|topk_group|num_expert_groups?", 1),
    (r"n_shared_experts|num_shared_experts|num_shared_expert", 1),
    (r"moe_intermediate_size|.*expert.*intermediate_size|expert_ffn_hidden_size|expert_ffn_size|moe_.*_size", 32),
    (r".*intermediate_size.*|.*ffn_dim.*|n_inner|ffn_hidden_size|d_ff|d_inner|dff|feed_forward.*size|block_ff_dim"
     r"|intermediate_dim|ffn_size|.*mlp_dim|dim_ff", 128),
    (r"hidden_size_per_layer_input|laurel_rank|altup_.*dim|embedding_size|.*embed(ding)?_(dim|size)"
     r"|word_embed_proj_dim|lru_width|attention_hidden_size|.*hidden_size.*|d_model|n_embd|dim|emb_dim|hidden_dim"
     r"|dim_model|d_embed|.*_dim_model|backbone_hidden_size|cross_attention_dim", 64),
    (r"max_position_embeddings|n_positions|max_target_positions|max_source_positions|n_ctx|max_seq_len"
     r"|max_sequence_length|max_seq_length|seq_length|context_length", 256),
    (r"sliding_window|attention_window_size|.*chunk_size|window_size|local_attention|block_size", 16),
    (r"image_size", 32),
    (r"patch_size", 16),
    (r"num_mel_bins", 8),
    (r".*conv_channels|.*_channels", "{same}"),
]  # fmt: skip

#: What the braces in `RULES` stand for; "layers" null leaves the layers as many as they are, "fill" gives numbers to
#: some entries that are null.
RECIPES: list[dict[str, Any]] = [
    {"layers": 2, "heads": 4, "kv": 2, "mamba": 2, "mamba_dim": 64, "half": 16, "qk": 32},
    {"layers": 2, "heads": 4, "kv": 4, "mamba": 8, "mamba_dim": 16, "half": 8, "qk": 16, "fill": True},
    {"layers": 4, "heads": 8, "kv": 8, "mamba": 8, "mamba_dim": 16, "half": 16, "qk": 32},
    {"layers": None, "heads": 4, "kv": 2, "mamba": 8, "mamba_dim": 16, "half": 16, "qk": 32},
    {"layers": None, "heads": 4, "kv": 4, "mamba": 2, "mamba_dim": 64, "half": 16, "qk": 32, "fill": True},
]

FILL: dict[str, Any] = {
    "head_dim": "{head_dim}",
    "num_key_value_heads": "{kv}",
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_shared_experts": 1,
    "topk_group": 1,
    "layer_types": "{layer_types}",
    "default_language": "{default_language}",
}


def small_configs(config_class: type) -> Iterator[Callable[[], Any]]:
    """What makes small configurations of a class, in the order in which they are worth a try; any may fail."""
    values = config_class().to_dict()
    subs = {key: value for key, value in getattr(config_class, "sub_configs", {}).items() if values.get(key)}
    for recipe in RECIPES:
        for trim in (False, True):
            yield partial(_made, config_class, _shrunk(values, recipe, trim, subs), tuple(subs))


def _made(config_class: type, values: dict[str, Any], subs: tuple[str, ...]) -> Any:
    config = config_class(**copy.deepcopy(values))
    for part in (config, *(getattr(config, name, None) for name in subs)):
        if getattr(part, "use_cache", None):
            part.use_cache = False
    return config


def _shrunk(values: dict[str, Any], recipe: dict[str, Any], trim: bool, subs: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    layers = next((v for k, v in values.items() if re.fullmatch(r"(num_hidden|num|n)_layers?", k)), None)
    count = recipe["layers"] or layers
    if recipe.get("fill"):
        known = {
            "head_dim": 16,
            "kv": recipe["kv"],
            "layer_types": ["full_attention"] * (count or 0),
            "default_language": next(iter(values.get("languages") or []), None),
        }
        for key, value in FILL.items():
            if key in values and values[key] is None:
                found[key] = known[value.strip("{}")] if isinstance(value, str) else value
    for key, value in values.items():
        if key in subs and isinstance(value, dict):
            found[key] = _shrunk(value, recipe, trim, {}) | {"model_type": value.get("model_type", "")}
        elif isinstance(value, list) and layers and len(value) == layers and trim:
            found[key] = value[:count]
        elif key == "is_decoder":
            found[key] = True
        elif (small := _small(key, value, recipe)) is not None:
            found[key] = small
    return found


def _small(key: str, value: Any, recipe: dict[str, Any]) -> Any:
    """The small value of one entry, None to leave it as it is."""
    if re.fullmatch(r".*(token_id|token_index|_token_ids|_index|token_idx|_id)", key):
        if isinstance(value, list):
            return [v % (VOCAB - 1) for v in value if isinstance(v, int)]
        return value % (VOCAB - 1) if isinstance(value, int) and value >= VOCAB else None
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    for pattern, small in RULES:
        if re.fullmatch(pattern, key):
            chosen = recipe.get(small.strip("{}")) if isinstance(small, str) else small
            return None if chosen is None or chosen >= value else chosen
    return None
