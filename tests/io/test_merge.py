# SPDX-License-Identifier: Apache-2.0
"""Merging in memory, and as tensors: the live model's function, and the live model unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, MergeError
from lightning_lora.io.merge import merge_adapters, merged_tensors
from lightning_lora.model.apply import apply_lora, set_adapter_scale
from lightning_lora.model.slots import is_adapted
from lightning_lora.nn.layers import is_conv1d
from tests.helpers import LM, TinyNet, named_tensors, random_adapters, tiny_gpt2, tiny_llama

IDS = torch.arange(32).view(2, 16) % 61


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return out.logits if hasattr(out, "logits") else out


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def adapted(base: nn.Module, **config: object) -> nn.Module:
    apply_lora(base, LoRAConfig(**{"r": 4, **config}))
    return random_adapters(base)


BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2, "plain": TinyNet, "module": lambda: LM(tiny_llama())}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("kind", BASES)
def test_merged_in_memory_computes_what_the_live_model_computed(kind: str, quantize: str) -> None:
    base = BASES[kind]()
    names = list(dict(base.named_parameters()))
    model = adapted(base, quantize=quantize, exclude_modules=["mlp"])
    live = logits(model)
    report = merge_adapters(model, IDS)
    assert error(logits(model), live) < 1e-5
    assert report.logit_error is not None
    assert report.logit_error < 1e-5
    assert sorted(dict(model.named_parameters())) == sorted(names)  # the plain model's names again
    assert not is_adapted(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in BASES[kind]().modules()}
    assert not any(p.requires_grad for p in model.parameters())


def test_merged_conv1d_keeps_its_layout() -> None:
    model = adapted(tiny_gpt2(), quantize="nf4")
    merge_adapters(model)
    shapes = {n: p.shape for n, p in tiny_gpt2().named_parameters()}
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    assert any(is_conv1d(m) for m in model.modules())


def test_saved_modules_become_their_trained_copy() -> None:
    model = adapted(tiny_llama(), modules_to_save=["lm_head"])
    trained = model.lm_head.trained.weight.clone()
    live = logits(model)
    merge_adapters(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, trained)
    assert error(logits(model), live) < 1e-5


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}, {}])
def test_tied_embeddings_that_came_apart_are_saved_and_loaded_apart(config: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=True), **config)
    live = logits(model)
    merge_adapters(model)
    assert model.config.tie_word_embeddings is (config == {})
    model.save_pretrained(tmp_path / "m")
    loaded, info = type(model).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()), info
    assert error(logits(loaded), live) < 1e-5


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_the_strength_is_merged_too(lam: float) -> None:
    model = adapted(tiny_llama(), modules_to_save=["lm_head"])
    set_adapter_scale(model, lam)
    live = logits(model)
    written = dict(merged_tensors(model))
    merge_adapters(model)
    assert error(logits(model), live) < 1e-5
    assert torch.equal(written["lm_head.weight"], model.lm_head.weight)


def test_bf16_is_summed_in_fp32_and_rounded_once() -> None:
    model = adapted(tiny_llama().bfloat16())
    layer = model.model.layers[0].self_attn.q_proj
    expected = (layer.base_weight(torch.float32) + layer.delta_weight()).bfloat16()
    report = merge_adapters(model, IDS)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, expected)
    assert report.dtype == "bfloat16"
    assert 0 < report.worst[1] < 2**-8
    assert 0 < report.worst_lost[1] < 0.2
    assert "layers merged in bfloat16" in str(report)


def test_an_update_too_small_for_bf16_is_reported_as_lost() -> None:
    model = tiny_llama().bfloat16()
    apply_lora(model, LoRAConfig(r=4))
    random_adapters(model, std=1e-5)
    report = merge_adapters(model)
    assert report.worst_lost[1] > 0.9
    assert "of an update lost to rounding" in str(report)


def test_merging_past_the_limit_is_an_error() -> None:
    class Grows(TinyNet):
        calls = 0

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(ids) * self.calls

    model = adapted(Grows())
    with pytest.raises(MergeError, match=r"outputs differ from the live model's by 1\.0.*limit for float32 is 1e-04"):
        merge_adapters(model, IDS)


def test_merging_a_plain_model_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no adapters to merge"):
        merge_adapters(tiny_llama())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_merged_tensors_are_the_plain_models_and_nothing_moves(kind: str, quantize: str) -> None:
    torch.manual_seed(3)
    plain = BASES[kind]()
    model = adapted(copy.deepcopy(plain), quantize=quantize)
    before = {n: t.clone() for n, t in named_tensors(model)}
    tensors = dict(merged_tensors(model))
    assert sorted(tensors) == sorted(plain.state_dict())
    plain.load_state_dict(tensors)
    assert error(logits(plain), logits(model)) < 1e-5
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(model))


def test_merged_tensors_of_a_tied_model_stay_tied() -> None:
    tensors = dict(merged_tensors(adapted(tiny_gpt2())))
    assert tensors["lm_head.weight"] is tensors["transformer.wte.weight"]


def test_merged_tensors_are_cast_as_asked() -> None:
    model = adapted(tiny_llama(), quantize="nf4")
    assert {t.dtype for _, t in merged_tensors(model, "bf16")} == {torch.bfloat16}
    half = adapted(tiny_llama().bfloat16(), quantize="nf4")
    assert {t.dtype for _, t in merged_tensors(half)} == {torch.bfloat16}


def test_a_packed_layer_takes_the_dtype_that_the_rest_was_cast_to() -> None:
    model = adapted(tiny_llama(), quantize="nf4").to(torch.bfloat16)
    live = logits(model)
    assert {t.dtype for _, t in merged_tensors(model)} == {torch.bfloat16}
    merge_adapters(model, IDS)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert error(logits(model).float(), live.float()) < 5e-2
