# SPDX-License-Identifier: Apache-2.0
"""The models that the benchmarks compare: frozen, full, ours and PEFT's, each from one saved base."""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from lightning_lora import AdaLoRAConfig, AdapterConfig, LoRAConfig, VeRAConfig, apply_adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Llama, 34.1 M parameters; "tiny" is for a quick look at whether a script runs.
SHAPES: dict[str, dict[str, Any]] = {
    "34m": {
        "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 8192, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip


@dataclass
class Variant:
    """A model and what of it is trained; the frozen model trains nothing."""

    model: nn.Module
    trained: list[nn.Parameter]


def saved_base(shape: dict[str, Any]) -> str:
    """A folder with a random Llama of ``shape`` in fp32, as `save_pretrained` writes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tempfile.mkdtemp(prefix="lora-bench-")
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    return folder


def load_base(folder: str, dtype: torch.dtype, **kwargs: Any) -> nn.Module:
    """The saved base in ``dtype``, in training mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).train()


def build(name: str, folder: str, dtype: torch.dtype, r: int = 16) -> Variant:
    """One of frozen, full, ours[-nf4][-drop], peft[-nf4][-same][-drop] ("same": adapters in the base's dtype).

    "-dora" behind any of ours and PEFT's makes it DoRA, "-adalora" AdaLoRA, "-vera" VeRA of rank 256, "-fa" behind
    ours LoRA-FA.
    """
    kind, *options = name.split("-")
    dropout, dora = 0.05 if "drop" in options else 0.0, "dora" in options
    if kind in ("frozen", "full"):
        model = load_base(folder, dtype).requires_grad_(kind == "full")
    elif kind == "ours":
        model = load_base(folder, dtype)
        quantize: Any = "nf4" if "nf4" in options else "none"
        config: AdapterConfig
        if "adalora" in options:
            config = AdaLoRAConfig(init_r=r, lora_alpha=2 * r, lora_dropout=dropout, quantize=quantize)
        elif "vera" in options:
            config = VeRAConfig(vera_dropout=dropout, quantize=quantize)
        else:
            config = LoRAConfig(
                r=r, lora_alpha=2 * r, lora_dropout=dropout, quantize=quantize, use_dora=dora,
                freeze_lora_A="fa" in options,
            )  # fmt: skip
        apply_adapters(model, config)
    elif kind == "peft":
        model = _peft(folder, dtype, r, dropout, options)
    else:
        raise ValueError(f"unknown variant {name!r}")
    return Variant(model.train(), [p for p in model.parameters() if p.requires_grad])


def _peft(folder: str, dtype: torch.dtype, r: int, dropout: float, options: list[str]) -> nn.Module:
    from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    quantized = {}
    if "nf4" in options:
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        quantized = {"quantization_config": bits, "device_map": {"": 0 if torch.cuda.is_available() else "cpu"}}
    shared: dict[str, Any] = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    config: Any
    if "adalora" in options:
        config = AdaLoraConfig(init_r=r, lora_alpha=2 * r, lora_dropout=dropout, total_step=1000, **shared)
    elif "vera" in options:
        config = VeraConfig(vera_dropout=dropout, **shared)
    else:
        config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, use_dora="dora" in options, **shared)
    autocast = "same" not in options
    return get_peft_model(load_base(folder, dtype, **quantized), config, autocast_adapter_dtype=autocast)


def gradient_norm(variant: Variant) -> float:
    """Norm of all gradients of trained parameters: zero or nan means the timing is worth nothing."""
    return float(torch.stack([p.grad.float().norm() for p in variant.trained if p.grad is not None]).norm())


def environment(*packages: str) -> str:
    """Versions and machine, for the record."""
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", *packages))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{versions}; python {platform.python_version()}; {device}, {torch.get_num_threads()} threads"


def arguments(description: str, add: Callable[[argparse.ArgumentParser], None]) -> argparse.Namespace:
    """The command line of a benchmark script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a very small model: does the script run?")
    parser.add_argument("--threads", type=int, default=2, help="torch's CPU threads")
    add(parser)
    return parser.parse_args()
