# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters on sublayers of transformers of every build, where they read and what they add."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    Bottleneck,
    BottleneckConfig,
    NormTuningConfig,
    adapter_state_dict,
    apply_adapters,
    disable_adapters,
    load_adapter,
    save_adapter,
)
from lightning_lora.errors import AdapterMismatchError, CheckpointError, ConfigError, TargetError, UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.bottleneck import BottleneckSublayer
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_gpt2, tiny_llama
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


def test_named_modules_take_the_place_of_blocks(tmp_path: Path) -> None:
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


def earlier(folder: Path, seed: int = 1, **values: Any) -> Tensor:
    """Write an adapter; what a model with it gives."""
    model = tiny_llama().eval()
    apply_adapters(model, BottleneckConfig(**{"bottleneck_size": 3, "non_linearity": "tanh", "scaling": 2.0, **values}))
    random_adapters(model, seed=seed, std=0.3)
    save_adapter(model, folder)
    return output(model)


def test_it_stands_on_earlier_adapters(tmp_path: Path) -> None:
    base, first = output(tiny_llama()), earlier(tmp_path / "first")
    stack = [str(tmp_path / "first")]
    second = earlier(tmp_path / "second", seed=2, stack=stack, placement="houlsby", mode="parallel")
    assert not torch.allclose(second, first)
    model = tiny_llama().eval()
    config = BottleneckConfig(placement="houlsby", bottleneck_size=4, stack=[*stack, str(tmp_path / "second")])
    report = apply_adapters(model, config)
    assert torch.equal(output(model), second)
    assert not any(part.untrained() for part in parts(model).values() if len(part.below))
    assert report.trainable_params == sum(part.adapter.down.weight.numel() * 2 + 68 for part in parts(model).values())
    with disable_adapters(model):
        assert torch.equal(output(model), base)
    assert not any(".below." in name for name in adapter_state_dict(model))
    random_adapters(model, seed=4)
    save_adapter(model, tmp_path / "third")
    again = tiny_llama().eval()
    load_adapter(again, tmp_path / "third")
    assert torch.equal(output(again), output(model))


def test_a_run_over_a_stack_is_resumed_over_the_same_alone(tmp_path: Path) -> None:
    earlier(tmp_path / "first")

    def run(steps: int, ckpt: Path | None = None) -> LM:
        torch.manual_seed(0)
        module = LM(tiny_llama())
        kept = ModelCheckpoint(tmp_path / "run", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        callback = Bottleneck(bottleneck_size=4, stack=[str(tmp_path / "first")])
        make_trainer(tmp_path, [callback, kept], max_steps=steps).fit(module, loader(), ckpt_path=ckpt)
        return module

    whole = run(4)
    cut = run(4, tmp_path / "run" / "step=2.ckpt")
    assert all(torch.equal(t, adapter_state_dict(cut)[name]) for name, t in adapter_state_dict(whole).items())
    earlier(tmp_path / "first", seed=9)
    with pytest.raises(AdapterMismatchError, match="a folder of `stack` was changed since. Give it as it was"):
        run(4, tmp_path / "run" / "step=2.ckpt")


def test_stacks_that_cannot_be_are_refused(tmp_path: Path) -> None:
    earlier(tmp_path / "first", placement="houlsby")
    stack = [str(tmp_path / "first")]
    with pytest.raises(UnsupportedError, match="has an adapter on 'model.layers.0.self_attn', where this one has none"):
        apply_adapters(tiny_llama(), BottleneckConfig(stack=stack))
    earlier(tmp_path / "second", placement="houlsby", stack=stack)
    with pytest.raises(ConfigError, match="here it would stand over .*: list those folders before it"):
        apply_adapters(tiny_llama(), BottleneckConfig(placement="houlsby", stack=[str(tmp_path / "second")]))
    with pytest.raises(CheckpointError, match="is no adapter folder of this package that can be read"):
        apply_adapters(tiny_llama(), BottleneckConfig(stack=[str(tmp_path / "nowhere")]))
    earlier(tmp_path / "head", modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedError, match="of a module that was trained in full"):
        apply_adapters(tiny_llama(), BottleneckConfig(stack=[str(tmp_path / "head")]))
    model = tiny_llama()
    apply_adapters(model, NormTuningConfig())
    save_adapter(model, tmp_path / "norms")
    with pytest.raises(CheckpointError, match="is of 'LN_TUNING': only bottleneck adapters stand on one another"):
        apply_adapters(tiny_llama(), BottleneckConfig(stack=[str(tmp_path / "norms")]))
    with pytest.raises(ConfigError, match="`stack` must be a list of names or null"):
        BottleneckConfig(stack="a")
