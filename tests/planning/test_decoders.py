# SPDX-License-Identifier: Apache-2.0
"""Decoders that are known without transformers: to the byte what transformers' own code gives, or left to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from lightning_lora import LoRAConfig
from lightning_lora.planning.activations import activations
from lightning_lora.planning.architecture import architecture, read_any, read_config
from lightning_lora.planning.decoders import DecoderConfig, known_decoder
from lightning_lora.planning.plan import plan

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
KNOWN: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama, whole heads": {"model_type": "llama", **SIZES, "num_key_value_heads": 4, "attention_bias": True},
    "llama, tied, wide heads": {"model_type": "llama", **SIZES, "tie_word_embeddings": True, "head_dim": 48},
    "llama 3.1": {
        "model_type": "llama", **SIZES, "rope_theta": 5e5, "torch_dtype": "bfloat16", "mlp_bias": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SIZES, "use_sliding_window": False, "sliding_window": 32768},
    "qwen2, tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 64, "layer_types": ["full_attention"] * 6},
    "two blocks": {"model_type": "llama", **SIZES, "num_hidden_layers": 2},
    "one block": {"model_type": "qwen3", **SIZES, "head_dim": 32, "num_hidden_layers": 1},
}  # fmt: skip
LORAS = {
    "full": None,
    "all": LoRAConfig(r=7, quantize="nf4"),
    "some": LoRAConfig(r=3, target_modules=["q_proj", "down_proj"]),
}
LEFT: dict[str, dict[str, Any]] = {
    "another family": {"model_type": "gemma", **SIZES},
    "an unknown key": {"model_type": "llama", **SIZES, "logit_cap": 30.0},
    "a quantized base": {"model_type": "llama", **SIZES, "quantization_config": {"quant_method": "gptq"}},
    "another activation": {"model_type": "llama", **SIZES, "hidden_act": "gelu"},
    "dropout": {"model_type": "llama", **SIZES, "attention_dropout": 0.1},
    "biases inside": {"model_type": "llama", **SIZES, "mlp_bias": True},
    "another class": {"model_type": "llama", **SIZES, "architectures": ["LlamaForSequenceClassification"]},
    "a window": {"model_type": "mistral", **SIZES, "sliding_window": 64},
    "a window by default": {"model_type": "mistral", **SIZES},
    "windows in some blocks": {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 64},
    "mixed blocks": {"model_type": "qwen3", **SIZES, "head_dim": 32, "layer_types": ["sliding_attention"] * 6},
    "no width of a head": {"model_type": "qwen3", **SIZES},
    "no sizes": {"model_type": "llama"},
    "text for a number": {"model_type": "llama", **SIZES, "hidden_size": "128"},
    "other rotations": {"model_type": "llama", **SIZES, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "heads that do not divide": {"model_type": "llama", **SIZES, "num_attention_heads": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_sizes_are_those_of_the_real_class(name: str) -> None:
    values = KNOWN[name]
    own, theirs = known_decoder(values), read_config(values)
    assert isinstance(own, DecoderConfig)
    for lora in (LORAS["all"], LORAS["some"]):
        assert lora is not None
        for dtype in (torch.float32, torch.bfloat16):
            a, b = (
                {k: v for k, v in vars(architecture(c, lora, dtype)).items() if k != "config"} for c in (own, theirs)
            )
            assert a == b


@pytest.mark.parametrize("method", LORAS)
@pytest.mark.parametrize(
    "name",
    [name if name in ("llama", "qwen2", "qwen3") else pytest.param(name, marks=pytest.mark.slow) for name in KNOWN],
)
def test_what_a_forward_keeps_is_what_the_real_code_keeps(name: str, method: str) -> None:
    own, theirs = known_decoder(KNOWN[name]), read_config(KNOWN[name])
    for dtype in (torch.float32, torch.bfloat16):
        assert activations(own, LORAS[method], 2, 40, dtype) == activations(theirs, LORAS[method], 2, 40, dtype)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_known_for_sure_is_left_to_transformers(name: str) -> None:
    assert known_decoder(LEFT[name]) is None


@pytest.mark.parametrize("name", KNOWN)
def test_a_file_that_transformers_writes_is_read_alike(name: str, tmp_path: Path) -> None:
    """Its files hold other keys than those on the hub, defaults left out."""
    config = AutoConfig.for_model(**{"model_type": "", **KNOWN[name]})
    config.save_pretrained(tmp_path)
    found = read_any(tmp_path)
    if isinstance(found, DecoderConfig):
        assert plan(tmp_path).to_dict() == plan(config).to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == KNOWN[name]["model_type"]


def test_a_plan_of_an_8b_model_imports_no_transformers(tmp_path: Path) -> None:
    values = {**KNOWN["llama 3.1"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    values |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (tmp_path / "config.json").write_text(json.dumps(values))
    code = """
import sys
sys.argv[0] = "lightning-lora"
from lightning_lora.cli.main import main
code = main(sys.argv[1:])
print([m for m in ("transformers", "lightning") if m in sys.modules])
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(tmp_path), "--gpu=24GB", "--gradient_checkpointing"],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "LlamaForCausalLM: 8,030,261,248 parameters" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
