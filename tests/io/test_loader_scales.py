# SPDX-License-Identifier: Apache-2.0
"""Each loader's scale, written down once more from its own arithmetic, over the raw files of adapter folders.

Nothing of the package's table of loaders is used to compute an update here: the portable layout must give the live one
by each rule, and of the native layout exactly those loaders must be flagged that would give another.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.io.adapter import save_adapter
from lightning_lora.io.loaders import validate_adapter
from lightning_lora.io.names import named_adapters
from lightning_lora.model.apply import apply_lora, set_adapter_scale
from tests.helpers import random_adapters, tiny_llama

Rule = Callable[[dict[str, Any], str, Tensor], float]


def peft(config: dict[str, Any], name: str, B: Tensor) -> float:
    """By module: the pattern tables, and the square root with `use_rslora`."""

    def value(table: str, default: str) -> float:
        found = (v for k, v in (config[table] or {}).items() if re.match(rf"(.*\.)?({k})$", name))
        return next(found, config[default])

    r, alpha = value("rank_pattern", "r"), value("alpha_pattern", "lora_alpha")
    return alpha / math.sqrt(r) if config["use_rslora"] else alpha / r


def vllm(config: dict[str, Any], name: str, B: Tensor) -> float:
    """One scale from the file's `r` and `lora_alpha`; rank stabilisation is read."""
    r = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    return config["lora_alpha"] / r


def sglang(config: dict[str, Any], name: str, B: Tensor) -> float:
    """One scale, whatever `use_rslora` says."""
    return config["lora_alpha"] / config["r"]


def tgi(config: dict[str, Any], name: str, B: Tensor) -> float:
    """As vLLM."""
    return vllm(config, name, B)


def llama_cpp(config: dict[str, Any], name: str, B: Tensor) -> float:
    """`lora_alpha` over the rank of the tensor at hand."""
    return config["lora_alpha"] / B.shape[1]


RULES: dict[str, Rule] = {"peft": peft, "vllm": vllm, "sglang": sglang, "tgi": tgi, "llama.cpp": llama_cpp}

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 16}},
    "alphas": {"alpha_pattern": {"v_proj": 3}},
    "ranks and alphas that agree": {"rank_pattern": {"o_proj": 16}, "alpha_pattern": {"o_proj": 26}},
    "rslora and ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "at a strength": {"use_rslora": True, "strength": 0.4},
}


def adapted(case: str) -> nn.Module:
    config = dict(CASES[case])
    strength = config.pop("strength", 1.0)
    model = tiny_llama()
    apply_lora(model, LoRAConfig(**{"r": 8, "lora_alpha": 13, **config}))
    random_adapters(model, std=0.2)
    set_adapter_scale(model, strength)
    return model


def errors(model: nn.Module, folder: Path, rule: Rule) -> dict[str, float]:
    """By module, how far the update that a rule gives is from the live one; every tensor of the file is used."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    live = {name: module.delta_weight() for name, module in named_adapters(model)}  # type: ignore[attr-defined]
    found = {}
    for key in [key for key in tensors if key.endswith(".lora_B.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        B, A = tensors[key], tensors[key.replace("lora_B", "lora_A")]
        delta = rule(config, name, B) * (B @ A)
        found[name] = float((delta - live[name]).norm() / live[name].norm())
    assert found.keys() == live.keys()
    return found


@pytest.mark.parametrize("loader", RULES)
@pytest.mark.parametrize("case", CASES)
def test_the_portable_layout_gives_the_live_update_by_each_rule(case: str, loader: str, tmp_path: Path) -> None:
    model = adapted(case)
    save_adapter(model, tmp_path / "a", layout="portable")
    assert max(errors(model, tmp_path / "a", RULES[loader]).values()) < 1e-6


@pytest.mark.parametrize("loader", RULES)
@pytest.mark.parametrize("case", CASES)
def test_of_the_native_layout_those_are_flagged_that_would_give_another(case: str, loader: str, tmp_path: Path) -> None:
    model = adapted(case)
    save_adapter(model, tmp_path / "a")
    wrong = [name for name, error in errors(model, tmp_path / "a", RULES[loader]).items() if error > 1e-6]
    problems = {p.rule: p for p in validate_adapter(tmp_path / "a", loader).loaders[loader]}
    assert ("scale" in problems) is bool(wrong)
    if wrong:
        assert f"{len(wrong)} of 14 modules scaled wrongly" in problems["scale"].reason
