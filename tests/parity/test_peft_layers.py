# SPDX-License-Identifier: Apache-2.0
"""PEFT as the oracle: the same factors give the same logits and the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.slots import adapter_modules
from tests.helpers import random_adapters, tiny_gpt2, tiny_llama

IDS = torch.arange(32).view(2, 16) % 64

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {r"0\..*": 2, "mlp.c_fc": 3, "up_proj": 6},
        "alpha_pattern": {"mlp.c_proj": 5, "down_proj": 5},
    },
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _ours(model: nn.Module, **config: Any) -> nn.Module:
    apply_lora(model, LoRAConfig(**config))
    return random_adapters(model).train()


def _theirs(model: nn.Module, targets: list[str], ours: nn.Module, **config: Any) -> nn.Module:
    """The same model under PEFT, with the factors of ``ours``."""
    fan_in_fan_out = "c_attn" in targets
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=targets, fan_in_fan_out=fan_in_fan_out, **config)
    )
    for name, module in adapter_modules(ours):
        twin = wrapped.base_model.model.get_submodule(name)
        assert twin.scaling["default"] == module.scaling
        twin.lora_A["default"].weight.data.copy_(module.lora_A)
        twin.lora_B["default"].weight.data.copy_(module.lora_B)
    return wrapped.train()


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


def _compare(ours: nn.Module, theirs: nn.Module, bound: float = 1e-5) -> None:
    logits = [model(input_ids=IDS).logits for model in (ours, theirs)]
    assert _relative(*logits) < bound
    for out in logits:
        torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    compared = 0
    for name, module in adapter_modules(ours):
        twin = theirs.base_model.model.get_submodule(name)
        for own, other in ((module.lora_A, twin.lora_A), (module.lora_B, twin.lora_B)):
            assert _relative(own.grad, other["default"].weight.grad) < bound, name
            compared += 1
    assert compared >= 16


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (tiny_llama, LLAMA),
    "gpt2": (tiny_gpt2, ["c_attn", "c_proj", "c_fc"]),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_dense(model: str, config: str) -> None:
    make, targets = MODELS[model]
    values = dict(CONFIGS[config])
    if config == "patterns":
        known = {"llama": ("up_proj", "down_proj"), "gpt2": ("mlp.c_fc", "mlp.c_proj")}[model]
        rank, alpha = values["rank_pattern"], values["alpha_pattern"]
        values["rank_pattern"] = {k: v for k, v in rank.items() if k in (r"0\..*", *known)}
        values["alpha_pattern"] = {k: v for k, v in alpha.items() if k in known}
    ours = _ours(make(), **values)
    _compare(ours, _theirs(make(), targets, ours, **values))


@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("model", MODELS)
def test_packed_against_peft_over_the_dequantized_base(quantize: str, model: str) -> None:
    make, targets = MODELS[model]
    ours = _ours(make(), quantize=quantize, **CONFIGS["plain"])
    dense = make()
    for name, module in adapter_modules(ours):
        dense.get_submodule(name).weight.data = module.base_weight()
    _compare(ours, _theirs(dense, targets, ours, **CONFIGS["plain"]))


@pytest.mark.parametrize(("quantize", "nested"), [("nf4", False), ("nf4-dq", True), ("fp4", False)])
def test_packed_against_peft_over_bitsandbytes_own_layers(quantize: str, nested: bool) -> None:
    ours = _ours(tiny_llama(), quantize=quantize, **CONFIGS["plain"])
    base = tiny_llama()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
                compress_statistics=nested, quant_type=quantize[:3],
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=nested, quant_type=quantize[:3]
            )
            layer.support_avx512bf16_for_cpu = False  # it would repack itself in evaluation
            base.set_submodule(name, layer.to("cpu"))
    base.is_loaded_in_4bit = True
    theirs = _theirs(base, LLAMA, ours, **CONFIGS["plain"])
    for name, module in adapter_modules(ours):
        codes = theirs.base_model.model.get_submodule(name).base_layer.weight
        assert codes.dtype == torch.uint8
        assert torch.equal(codes.view(-1), module.base_layer.packed.codes)
    _compare(ours, theirs)


def test_bfloat16_base_with_full_precision_adapters() -> None:
    ours = _ours(tiny_llama().bfloat16(), **CONFIGS["plain"])
    theirs = _theirs(tiny_llama().bfloat16(), LLAMA, ours, **CONFIGS["plain"])
    exact = copy.deepcopy(theirs).double()
    logits = [model(input_ids=IDS).logits.double() for model in (ours, theirs, exact)]
    # Both round; neither may be further from the exact logits than rounding makes the other, with some slack.
    assert _relative(logits[0], logits[2]) < 1.3 * _relative(logits[1], logits[2])
