# SPDX-License-Identifier: Apache-2.0
"""What full fine-tuning and layer-norm tuning choose and train, and what they leave alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_lora import (
    FullTuningConfig,
    NormTuningConfig,
    adapter_state_dict,
    apply_adapters,
    disable_adapters,
    load_adapter,
    save_adapter,
)
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError
from lightning_lora.model.slots import adapter_modules
from tests.helpers import LM, TinyNet, random_adapters, tiny_gpt2, tiny_llama
from tests.model.nets import Normed

IDS = torch.arange(16).view(2, 8) % 47


def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def test_full_tuning_takes_the_outermost_modules() -> None:
    assert apply_adapters(LM(tiny_llama()), FullTuningConfig()).adapted == ["net.model", "net.lm_head"]
    assert apply_adapters(LM(TinyNet()), FullTuningConfig()).adapted == ["net"]
    decoder = tiny_llama().model
    assert apply_adapters(decoder, FullTuningConfig()).adapted == ["embed_tokens", "layers.0", "layers.1", "norm"]
    assert decoder(IDS).last_hidden_state.shape == (2, 8, 64)


def test_full_tuning_moves_what_plain_training_moves() -> None:
    found = []
    for convert in (False, True):
        model = tiny_gpt2()
        if convert:
            apply_adapters(model, FullTuningConfig())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model.train()(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        found.append(logits(model))
    assert torch.equal(*found)


def test_shared_weights_are_shared_by_the_copies() -> None:
    model = tiny_gpt2()
    report = apply_adapters(model, FullTuningConfig())
    assert report.trainable_params == sum(p.numel() for p in tiny_gpt2().parameters())
    assert model.lm_head.trained.weight is model.transformer.trained.wte.weight
    assert model.lm_head.original.weight is model.transformer.original.wte.weight
    state = adapter_state_dict(model)
    assert state["lm_head.trained.weight"].data_ptr() == state["transformer.trained.wte.weight"].data_ptr()


def test_what_was_frozen_stays_frozen() -> None:
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    report = apply_adapters(model, FullTuningConfig())
    assert "model.embed_tokens" not in report.adapted
    assert {"model.layers.0", "model.layers.1", "model.norm", "lm_head"} == set(report.adapted)
    with pytest.raises(TargetError, match="every parameter of the model is frozen: full fine-tuning has nothing"):
        apply_adapters(tiny_llama().requires_grad_(False), FullTuningConfig())


def test_a_parameter_without_a_module_of_its_own_is_refused() -> None:
    model = LM(TinyNet())
    model.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(UnsupportedError, match="'scale' is a parameter of the LM itself, which full fine-tun"):
        apply_adapters(model, FullTuningConfig())


def test_running_statistics_move_in_the_copy_alone() -> None:
    model = nn.Sequential(Normed())
    apply_adapters(model, FullTuningConfig())
    before = copy.deepcopy(model[0].original.batch.state_dict())
    for _ in range(2):
        model.train()(torch.randn(16, 8))
    assert all(torch.equal(t, model[0].original.batch.state_dict()[k]) for k, t in before.items())
    assert not torch.equal(model[0].trained.batch.running_mean, before["running_mean"])


def test_norms_are_found_and_batch_norms_are_not() -> None:
    assert apply_adapters(tiny_gpt2(), NormTuningConfig()).adapted == [
        *(f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)),
        "transformer.ln_f",
    ]
    with pytest.raises(TargetError, match="matches no norm"):
        apply_adapters(Normed(), NormTuningConfig())
    some = apply_adapters(tiny_llama(), NormTuningConfig(target_modules=["input_layernorm"], layers_to_transform=[1]))
    assert some.adapted == ["model.layers.1.input_layernorm"]
    rest = apply_adapters(tiny_llama(), NormTuningConfig(exclude_modules=["norm"], modules_to_save=["lm_head"]))
    assert (len(rest.adapted), rest.saved) == (4, ["lm_head"])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_norms_are_pefts(make: Any, tmp_path: Path) -> None:
    names = ["ln_1", "ln_2", "ln_f"] if make is tiny_gpt2 else ["input_layernorm", "post_attention_layernorm", "norm"]
    theirs = get_peft_model(make(), LNTuningConfig(target_modules=names, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ln_tuning_layers" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    load_adapter(model, tmp_path / "theirs")
    assert len(list(adapter_modules(model))) == 5
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    for each in (model, theirs):
        logits(each).square().sum().backward()
    mine = [p.grad for _, m in adapter_modules(model) for p in m.trained.parameters()]
    other = [p.grad for n, p in theirs.named_parameters() if "ln_tuning_layers" in n]
    for a, b in zip(mine, other, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
    random_adapters(model, seed=2)
    save_adapter(model, tmp_path / "ours")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(make()))


@pytest.mark.parametrize(
    ("kind", "values", "error", "text"),
    [
        (NormTuningConfig, {"target_modules": "all-linear"}, ConfigError, 'use "all-norms", or name norms'),
        (NormTuningConfig, {"adapter_dtype": "bf16"}, ConfigError, "has no `adapter_dtype`: a copy has the dtype"),
        (FullTuningConfig, {"target_modules": ["q_proj"]}, ConfigError, "full fine-tuning has no `target_modules`"),
        (FullTuningConfig, {"modules_to_save": ["lm_head"]}, ConfigError, "has no `modules_to_save`"),
        (FullTuningConfig, {"quantize": "int8"}, UnsupportedError, r"packed ones \(quantize='int8'\) cannot be"),
    ],
)
def test_bad_arguments(kind: Any, values: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        kind(**values)


def test_entries_that_are_no_norms_are_said() -> None:
    with pytest.raises(TargetError, match="names 'model.layers.0.self_attn.q_proj', a Linear: layer-norm tun"):
        apply_adapters(tiny_llama(), NormTuningConfig(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match="'input_layernrm' matches no norm; the nearest names are"):
        apply_adapters(tiny_llama(), NormTuningConfig(target_modules=["input_layernrm"]))
