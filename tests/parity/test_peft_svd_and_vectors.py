# SPDX-License-Identifier: Apache-2.0
"""PEFT as the oracle of VeRA's and AdaLoRA's layers and folders: logits and gradients in fp32, both ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora.config import AdaLoRAConfig, AdapterConfig, VeRAConfig
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.model.apply import apply_adapters
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import random_adapters, tiny_gpt2, tiny_llama

IDS = torch.arange(32).view(2, 16) % 64
LLAMA = ["q_proj", "v_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
ADALORA = {"init_r": 6, "target_r": 3, "lora_alpha": 8, "tinit": 2, "tfinal": 3, "total_step": 20}
VERA = {"r": 16, "projection_prng_key": 7}


def configs(method: str, targets: list[str]) -> tuple[AdapterConfig, peft.PeftConfig]:
    fan = {"target_modules": targets, "fan_in_fan_out": targets is GPT2}
    if method == "adalora":
        return AdaLoRAConfig(target_modules=targets, **ADALORA), peft.AdaLoraConfig(**fan, **ADALORA)
    saved = {"save_projection": method == "vera"}
    return VeRAConfig(target_modules=targets, **VERA, **saved), peft.VeraConfig(**fan, **VERA, **saved)


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by the last two names: a layer's place and what it is of."""
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    logits.square().mean().backward()
    return logits.detach(), {
        n.replace("base_model.model.", "").replace(".default", "").replace("adapter.", ""): p.grad
        for n, p in model.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("method", ["adalora", "vera", "vera-drawn"])
@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)])
@pytest.mark.filterwarnings("ignore:Specified to not")
def test_folders_go_both_ways_with_the_same_logits_and_gradients(
    method: str, make: Callable[[], nn.Module], targets: list[str], tmp_path: Path
) -> None:
    own_config, their_config = configs(method, targets)
    mine = make()
    apply_adapters(mine, own_config)
    drawn = {n: t.clone() for n, t in mine.named_buffers() if "vera_" in n}
    random_adapters(mine, std=0.2)
    if method == "vera":  # the matrices are the file's, not the seed's
        assert drawn
        assert not any(torch.equal(t, drawn[n]) for n, t in mine.named_buffers() if n in drawn)
    save_adapter(mine, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours", is_trainable=True)
    (logits, grads), (other_logits, other_grads) = gradients(mine.eval()), gradients(theirs.eval())
    assert (logits - other_logits).norm() < 1e-5 * other_logits.norm()
    assert set(grads) == set(other_grads)
    for name, grad in grads.items():
        assert (grad - other_grads[name]).norm() < 1e-5 * other_grads[name].norm() + 1e-9, name
    theirs.save_pretrained(tmp_path / "theirs")
    again = make()
    load_adapter(again, tmp_path / "theirs")
    assert torch.equal(again.eval()(input_ids=IDS).logits, logits)
    assert {type(m) for _, m in adapter_modules(again)} == {type(m) for _, m in adapter_modules(mine)}
    files = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    assert files[0]["peft_type"] == files[1]["peft_type"] == method.partition("-")[0].upper()
    fresh = peft.get_peft_model(make(), their_config)
    random_peft(fresh)
    fresh.save_pretrained(tmp_path / "fresh")
    loaded = make()
    load_adapter(loaded, tmp_path / "fresh")
    (logits, grads), (other_logits, other_grads) = gradients(loaded.eval()), gradients(fresh.eval())
    assert (logits - other_logits).norm() < 1e-5 * other_logits.norm()
    assert all((g - other_grads[n]).norm() < 1e-5 * other_grads[n].norm() + 1e-9 for n, g in grads.items())


def random_peft(model: nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)


def test_a_pruned_folder_is_pefts_and_comes_back(tmp_path: Path) -> None:
    mine = tiny_llama()
    apply_adapters(mine, AdaLoRAConfig(target_modules=LLAMA, **ADALORA))
    random_adapters(mine, std=0.2)
    left = {f"{name}.lora_E": i % 7 for i, (name, _) in enumerate(adapter_modules(mine))}  # one layer has nothing left
    with torch.no_grad():
        for count, (_, module) in zip(left.values(), adapter_modules(mine), strict=True):
            module.adapter.lora_E[count:] = 0
    want = mine.eval()(input_ids=IDS).logits
    save_adapter(mine, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    pattern = config["rank_pattern"]
    assert pattern == {name: [rank < count for rank in range(6)] for name, count in left.items()}
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    got = theirs.eval()(input_ids=IDS).logits
    assert (got - want).norm() < 1e-5 * want.norm()
    theirs.save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        again = tiny_llama()
        load_adapter(again, tmp_path / folder)
        assert torch.equal(again.eval()(input_ids=IDS).logits, want), folder
        save_adapter(again, tmp_path / f"{folder}-again")
        written = json.loads((tmp_path / f"{folder}-again" / "adapter_config.json").read_text())
        assert written["rank_pattern"] == pattern
    live = tiny_llama()
    apply_adapters(live, AdaLoRAConfig(target_modules=LLAMA, **ADALORA))
    load_adapter(live, tmp_path / "a")  # in place
    assert torch.equal(live.eval()(input_ids=IDS).logits, want)
    assert all(t.isfinite().all() for t in adapter_state_dict(live).values())
