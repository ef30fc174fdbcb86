# SPDX-License-Identifier: Apache-2.0
"""The fingerprint: the same for the same base wherever it sits, another after any step of training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.fingerprint import digest, fingerprint, same_base
from tests.helpers import LM, TinyNet, tiny_gpt2, tiny_llama


def test_the_same_base_has_the_same_value_alone_copied_reloaded_and_in_a_module(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = tiny_llama()
    value = fingerprint(model)
    assert set(value) == {"version", "base", "digest", "tensors", "packed", "without", "outside"}
    assert (value["version"], value["base"]) == (2, "LlamaForCausalLM")
    assert len(value["digest"]) == 64
    assert value == fingerprint(model)
    assert value == fingerprint(copy.deepcopy(model))
    assert value == fingerprint(LM(model))
    model.save_pretrained(tmp_path)
    reloaded = fingerprint(LlamaForCausalLM.from_pretrained(tmp_path))
    assert same_base(value, reloaded)
    assert reloaded["base"] == f"LlamaForCausalLM {str(tmp_path)!r}"
    bf16 = fingerprint(model.bfloat16())
    model.save_pretrained(tmp_path / "bf16")
    assert same_base(bf16, fingerprint(LlamaForCausalLM.from_pretrained(tmp_path / "bf16", dtype="bfloat16")))
    net = TinyNet()
    assert same_base(fingerprint(net), fingerprint(LM(net)))


def test_it_is_taken_before_packing_and_does_not_depend_on_the_adapters() -> None:
    value = fingerprint(tiny_llama())
    for config in (LoRAConfig(r=4), LoRAConfig(r=8, quantize="nf4", exclude_modules=["up_proj"])):
        assert apply_lora(tiny_llama(), config).fingerprint == value


def test_what_is_trained_in_full_is_left_out() -> None:
    config = LoRAConfig(r=4, modules_to_save=["lm_head"])
    values = []
    for _ in range(2):
        model = tiny_llama()
        nn.init.normal_(model.lm_head.weight)
        values.append(apply_lora(model, config).fingerprint)
    assert values[0] == values[1]
    assert values[0]["without"] == ["lm_head"]
    inside = LM(tiny_llama())
    assert fingerprint(inside, ["net.lm_head"]) == values[0]
    assert same_base(values[0], fingerprint(tiny_llama())) is None


def test_what_lies_beside_the_transformers_model_has_its_own_digest() -> None:
    module = LM(tiny_llama())
    value = fingerprint(module)
    module.beside = nn.Linear(4, 4)
    first = fingerprint(module)
    nn.init.normal_(module.beside.weight)
    second = fingerprint(module)
    assert value["outside"] is None
    assert first["digest"] == second["digest"] == value["digest"]
    assert len({value["outside"], first["outside"], second["outside"]}) == 3
    assert fingerprint(module, ["beside"]) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_any_single_tensor_changes_it(dtype: torch.dtype) -> None:
    model = tiny_gpt2().to(dtype)
    before = fingerprint(model)
    digests = {before["digest"]}
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        optimizer = torch.optim.Adam([parameter], lr=1e-3)
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        digest = fingerprint(model)["digest"]
        if parameter.dim() == 1 and torch.equal(parameter, kept):
            continue  # a step that bf16 rounds away
        assert digest not in digests, name
        digests.add(digest)
        parameter.data = kept
    assert fingerprint(model) == before


def test_small_bf16_steps_change_it_though_most_values_round_back() -> None:
    """At a learning rate of 1e-5 some 10 % of a bf16 matrix moves: missed with a probability of 2e-12."""
    model = tiny_gpt2().bfloat16()
    digests = {fingerprint(model)["digest"]}
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() == 2]
    for name, parameter in matrices:
        kept = parameter.detach().clone()
        parameter.grad = torch.randn_like(parameter)
        torch.optim.Adam([parameter], lr=1e-5).step()
        moved = float((parameter != kept).float().mean())
        assert 0.05 < moved < 0.5, name
        digests.add(fingerprint(model)["digest"])
        parameter.data = kept
    assert len(digests) == 1 + len(matrices)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 511, 1000])
def test_256_values_of_every_tensor_or_all_it_has_are_looked_at(size: int) -> None:
    tensor = torch.zeros(size)
    before = digest([tensor])
    seen = 0
    for place in range(size):
        tensor[place] = 1.0
        seen += digest([tensor]) != before
        tensor[place] = 0.0
    assert seen == min(size, 256)


def test_places_are_spread_over_the_whole_tensor() -> None:
    tensor = torch.zeros(100_003)
    before = digest([tensor])
    for stretch in tensor.tensor_split(128):  # each holds one of the 256 stretches in full
        stretch += 1
        assert digest([tensor]) != before
        stretch -= 1


def test_dtype_shape_and_buffers_count() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    value = fingerprint(net)
    assert value["tensors"] == 7
    net[1].running_mean += 1
    assert fingerprint(net) != value
    assert fingerprint(copy.deepcopy(net).bfloat16()) != fingerprint(net)
    assert fingerprint(tiny_llama(tie_word_embeddings=True)) != fingerprint(tiny_llama())


def test_on_meta_there_is_none() -> None:
    assert fingerprint(TinyNet().to("meta")) is None


def test_a_base_that_arrives_packed_does_not_compare_with_one_in_full_precision() -> None:
    dense = fingerprint(nn.Linear(8, 8))
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    packed = fingerprint(layer)
    assert (dense["packed"], packed["packed"]) == (False, True)
    assert same_base(dense, packed) is None
    assert same_base(dense, None) is None
    assert same_base(dense, dense) is True
    assert same_base(dense, fingerprint(nn.Linear(8, 8))) is False
