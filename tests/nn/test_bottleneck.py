# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters on sublayers of transformers of every build, where they read and what they add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import BottleneckConfig, apply_adapters, disable_adapters, load_adapter, save_adapter
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError
from lightning_lora.model.apply import adapter_modules
from lightning_lora.nn.bottleneck import BottleneckSublayer
from tests.helpers import TinyNet, random_adapters, tiny_gpt2, tiny_llama
from tests.model.nets import tiny_bert
from tests.model.test_blocks import build

IDS = torch.arange(16).view(2, 8) % 47


def parts(model: nn.Module) -> dict[str, BottleneckSublayer]:
    return {name: m for name, m in adapter_modules(model) if isinstance(m, BottleneckSublayer)}


def output(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if "T5" in type(model).__name__ else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more).logits


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_the_equation(mode: str) -> None:
    model = tiny_llama().eval()
    apply_adapters(model, BottleneckConfig(mode=mode, bottleneck_size=5, non_linearity="tanh", scaling=3.0))
    random_adapters(model, std=0.3)
    part = parts(model)["model.layers.0.mlp"]
    x = torch.randn(2, 4, 64)
    h = part.base_layer(x)
    down, up = part.adapter.down, part.adapter.up
    read = x if mode == "parallel" else h
    expected = h + 3.0 * (torch.tanh(read @ down.weight.T + down.bias) @ up.weight.T + up.bias)
    assert torch.allclose(part(x), expected, atol=1e-6)
    part.strength = 0.5
    assert torch.allclose(part(x), (h + expected) / 2, atol=1e-6)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize(
    ("make", "attention", "feed_forward"),
    [
        (tiny_llama, 2, 2),
        (tiny_gpt2, 2, 2),
        (tiny_bert, 1, 1),
        (lambda: build("T5"), 3, 2),
        (lambda: build("Mixtral"), 2, 2),
        (lambda: build("OPT"), 2, 2),
    ],
)
def test_in_every_build_it_begins_as_the_base_and_learns(
    make: Callable[[], nn.Module], attention: int, feed_forward: int, placement: str
) -> None:
    torch.manual_seed(0)
    model = make()
    before = output(model)
    report = apply_adapters(model, BottleneckConfig(placement=placement, bottleneck_size=4, modules_to_save=[]))
    assert len(report.adapted) == feed_forward + attention * (placement == "houlsby")
    assert torch.equal(output(model), before)
    more = {"decoder_input_ids": IDS} if "T5" in type(model).__name__ else {}
    model.train()(input_ids=IDS, **more).logits.square().mean().backward()
    assert all(part.adapter.up.weight.grad.any() for part in parts(model).values())
    random_adapters(model)
    assert not torch.allclose(output(model), before)
    with disable_adapters(model):
        assert torch.equal(output(model), before)


def test_over_a_packed_base_its_linears_are_packed_too() -> None:
    model = tiny_llama()
    plain = apply_adapters(tiny_llama(), BottleneckConfig()).base_bytes
    report = apply_adapters(model, BottleneckConfig(placement="houlsby", quantize="nf4"))
    assert report.packed_bytes < 0.4 * plain
    from lightning_lora.nn.quantized import PackedLinear

    packed = [name for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 14
    assert "model.layers.0.mlp.base_layer.gate_proj" in packed
    bert = tiny_bert()
    apply_adapters(bert, BottleneckConfig(quantize="nf4"))
    assert output(bert).isfinite().all()


def test_named_modules_take_the_place_of_blocks(tmp_path: Any) -> None:
    model = tiny_llama()
    report = apply_adapters(model, BottleneckConfig(target_modules=["o_proj"], layers_to_transform=[1]))
    assert report.adapted == ["model.layers.1.self_attn.o_proj"]
    random_adapters(model)
    save_adapter(model, tmp_path / "a")
    again = tiny_llama()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(output(again), output(model))
    model = tiny_llama()
    apply_adapters(model, BottleneckConfig(exclude_modules=["layers.0.mlp"]))
    assert list(parts(model)) == ["model.layers.1.mlp"]
    net = TinyNet()
    apply_adapters(net, BottleneckConfig(target_modules=["second"]))
    assert net(IDS).shape == (2, 8, 64)


@pytest.mark.parametrize(
    ("make", "values", "text"),
    [
        (TinyNet, {}, "TinyNet has no transformer blocks whose sublayers are known: name modules"),
        (tiny_llama, {"target_modules": ["mpl"]}, "`target_modules` entry 'mpl' matches no module; the nearest"),
        (tiny_llama, {"target_modules": ["mlp", "down_proj"]}, "names 'model.layers.0.mlp.down_proj' and a module ar"),
        (tiny_llama, {"exclude_modules": ["mlp"]}, "leave no sublayer to adapt"),
    ],
)
def test_what_matches_nothing_is_said(make: Callable[[], nn.Module], values: dict[str, Any], text: str) -> None:
    with pytest.raises(TargetError, match=text):
        apply_adapters(make(), BottleneckConfig(**values))


def test_the_end_of_a_sublayer_cannot_be_parallel() -> None:
    with pytest.raises(UnsupportedError, match=r"layer.0.output.dense' is only the end of one: use `mode="):
        apply_adapters(tiny_bert(), BottleneckConfig(mode="parallel"))
    with pytest.raises(TargetError, match="a LlamaRMSNorm has no weight that tells the width of its hidden states"):
        apply_adapters(tiny_llama(), BottleneckConfig(target_modules=["input_layernorm"]))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"placement": "both"}, "`placement` must be one of"),
        ({"mode": "serial"}, "`mode` must be one of"),
        ({"non_linearity": "swish"}, "`non_linearity` must be one of"),
        ({"reduction_factor": 0}, "`reduction_factor` must be a positive number, got 0"),
        ({"bottleneck_size": 0}, "`bottleneck_size` must be an integer of at least 1, got 0"),
        ({"scaling": -1}, "`scaling` must be a positive number, got -1"),
        ({"target_modules": "all-linear"}, 'use "blocks", or name modules that give hidden states'),
    ],
)
def test_bad_arguments(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BottleneckConfig(**values)
