# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of the architectures that people tune, each from its config, with inputs to call it with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

IDS = torch.arange(24).view(2, 12) * 5 % 61 + 3
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**WIDTH, **ENDS, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}


@dataclass(frozen=True)
class Architecture:
    """How one architecture is built small and called.

    Args:
        auto: Name of the auto class.
        model_type: What the configuration is registered as.
        config: Its values.
        inputs: Keyword arguments of a call.
        task: PEFT's task type.
        lora: What an adapter needs besides rank and scale.
        pefts: The same for an adapter that PEFT makes, where it needs other words.
        prompt: Those of `inputs` that generation starts from; None where transformers does not generate.
    """

    auto: str
    model_type: str
    config: dict[str, Any]
    inputs: dict[str, Tensor] = field(default_factory=lambda: {"input_ids": IDS})
    task: str | None = "CAUSAL_LM"
    lora: dict[str, Any] = field(default_factory=dict)
    pefts: dict[str, Any] = field(default_factory=dict)
    prompt: tuple[str, ...] | None = ("input_ids",)

    def config_object(self) -> Any:
        """The configuration."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.config)

    @property
    def model_class(self) -> Any:
        """The auto class."""
        import transformers

        return getattr(transformers, self.auto)

    def build(self) -> nn.Module:
        """A random model, the same at each call, in evaluation."""
        torch.manual_seed(0)
        return self.model_class.from_config(self.config_object()).eval()

    def outputs(self, model: nn.Module) -> Tensor:
        """The logits of one call."""
        with torch.no_grad():
            return model.eval()(**self.inputs).logits

    def generated(self, model: Any) -> Tensor:
        """Greedy tokens."""
        prompt = {name: self.inputs[name] for name in self.prompt or ()}
        with torch.no_grad():
            return model.eval().generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)


def causal(model_type: str, **config: Any) -> Architecture:
    """A decoder with the usual words in its configuration."""
    return Architecture("AutoModelForCausalLM", model_type, {**DECODER, **config})


def pictures() -> Tensor:
    """Two random pictures ``(2, 3, 16, 16)``."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def spectrograms() -> Tensor:
    """Two random spectrograms ``(2, 8, 24)``."""
    return torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0))


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": causal("llama"),
    "Mistral": causal("mistral", sliding_window=8),
    "Qwen2": causal("qwen2", tie_word_embeddings=True),
    "Qwen3": causal("qwen3", head_dim=8),
    "Gemma": causal("gemma", head_dim=8),
    "Phi-3": causal("phi3"),
    "GPT-2": Architecture(
        "AutoModelForCausalLM",
        "gpt2",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **ENDS},
    ),
    "GPT-NeoX": causal("gpt_neox"),
    "OPT": causal("opt", ffn_dim=48, word_embed_proj_dim=32),
    "Falcon": causal("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "Mixtral": replace(
        causal("mixtral", num_local_experts=4, num_experts_per_tok=2),
        # PEFT reads "all-linear" as the fused experts too, which are no linear layers
        pefts={"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    ),
    "Qwen-MoE": causal(
        "qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "BERT": Architecture(
        "AutoModelForSequenceClassification",
        "bert",
        {**WIDTH, "vocab_size": 64, "max_position_embeddings": 64, "num_labels": 3, "pad_token_id": 0},
        task="SEQ_CLS",
        lora={"modules_to_save": ["classifier"]},
        prompt=None,
    ),
    "T5": Architecture(
        "AutoModelForSeq2SeqLM",
        "t5",
        {
            "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
            "vocab_size": 64, "decoder_start_token_id": 0,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
        task="SEQ_2_SEQ_LM",
    ),
    "ViT": Architecture(
        "AutoModelForImageClassification",
        "vit",
        {**WIDTH, "image_size": 16, "patch_size": 8, "num_labels": 3},
        {"pixel_values": pictures()},
        task=None,
        lora={"modules_to_save": ["classifier"]},
        prompt=None,
    ),
    "Whisper": Architecture(
        "AutoModelForSpeechSeq2Seq",
        "whisper",
        {
            "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
            "max_source_positions": 12, "max_target_positions": 32, "vocab_size": 64, "decoder_start_token_id": 3,
            "suppress_tokens": None, "begin_suppress_tokens": None, **ENDS,
        },
        {"input_features": spectrograms(), "decoder_input_ids": IDS[:, :5]},
        task=None,
        prompt=("input_features",),
    ),
}  # fmt: skip
