# SPDX-License-Identifier: Apache-2.0
"""`IA3Linear` and its configuration against the paper's equations and PEFT, layer by layer and in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    IA3,
    IA3Config,
    apply_adapters,
    load_adapter,
    merge_to_disk,
    save_adapter,
    set_adapter_scale,
    validate_adapter,
)
from lightning_lora.config import AdapterRecord
from lightning_lora.errors import AdapterMismatchError, ConfigError, TargetError, UnsupportedError
from lightning_lora.nn.ia3 import IA3Linear
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_gpt2, tiny_llama
from tests.nn.layers import check_equation, make_base

IDS = torch.arange(24).view(2, 12) % 61
LAYOUTS = [("none", False), ("none", True), ("nf4", False), ("int8", True)]


def make(feedforward: bool, **base: Any) -> IA3Linear:
    layer = IA3Linear(make_base(**base), AdapterRecord(IA3Config()), feedforward)
    with torch.no_grad():
        layer.ia3_l.uniform_(0.5, 1.5)
    return layer


def equation(layer: IA3Linear, x: Tensor, factors: Tensor) -> Tensor:
    """The module's first lines, in float64."""
    weight = layer.base_weight(torch.float32).double()
    weight = weight.t() if layer.fan_in_fan_out else weight
    factors = 1 + layer.strength * (factors.flatten() - 1)
    y = (x * factors if layer.feedforward else x) @ weight.t()
    y = y if layer.bias is None else y + layer.bias.double()
    return y if layer.feedforward else y * factors


@pytest.mark.parametrize("feedforward", [True, False])
@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_gradients_and_merged_weights_are_the_equations(
    quantize: str, conv1d: bool, feedforward: bool, strength: float
) -> None:
    layer = make(feedforward, quantize=quantize, conv1d=conv1d)
    layer.strength = strength
    assert layer.merged_bias() is not None
    check_equation(layer, [layer.ia3_l], equation)


@pytest.mark.parametrize("feedforward", [True, False])
def test_off_it_is_the_base_and_masters_keep_their_dtype(feedforward: bool) -> None:
    layer = make(feedforward).to(torch.bfloat16)
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert layer.ia3_l.dtype == torch.float32
    assert layer(x).dtype == torch.bfloat16
    base = layer.base_layer(x)
    assert not torch.equal(layer(x), base)
    layer.strength = 0.0
    assert torch.equal(layer(x), base)
    assert torch.equal(layer.merged_weight(torch.bfloat16), layer.base_layer.weight)
    assert layer.merged_bias() is layer.base_layer.bias
    layer.strength, layer.enabled = 1.0, False
    assert torch.equal(layer(x), base)
    layer.adapter.reset_parameters()
    assert layer.untrained()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_logits_and_gradients_are_pefts(build: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = build()
    apply_adapters(ours, IA3Config())
    random_adapters(ours, std=0.3)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(build(), tmp_path / "adapter", is_trainable=True)
    ours.eval()
    theirs.eval()
    a, b = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
    a.loss.backward()
    b.loss.backward()
    own = {n.replace(".adapter.ia3_l", ""): p.grad for n, p in ours.named_parameters() if p.requires_grad}
    their = {
        n.replace("base_model.model.", "").replace(".ia3_l.default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert own.keys() == their.keys()
    for name, grad in own.items():
        torch.testing.assert_close(grad, their[name], rtol=0, atol=1e-5)


def test_pefts_own_folder_and_its_words_for_feedforwards(tmp_path: Path) -> None:
    from peft import IA3Config as Theirs
    from peft import get_peft_model

    config = Theirs(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["v_proj", "down_proj"])
    theirs = get_peft_model(tiny_llama(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name:
                parameter.uniform_(0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama().eval()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)
    assert ours.model.layers[0].self_attn.v_proj.feedforward
    assert not ours.model.layers[0].self_attn.q_proj.feedforward


def test_feedforwards_that_only_whole_names_tell_apart(tmp_path: Path) -> None:
    from peft import PeftModel

    ours = tiny_gpt2().eval()
    apply_adapters(ours, IA3Config(target_modules=["c_proj"], feedforward_modules=["mlp.c_proj"]))
    random_adapters(ours, std=0.3)
    save_adapter(ours, tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "adapter").eval()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=1e-5)


def test_a_folder_holds_the_strength(tmp_path: Path) -> None:
    model = tiny_llama().eval()
    apply_adapters(model, IA3Config())
    random_adapters(model, std=0.3)
    set_adapter_scale(model, 0.5)
    save_adapter(model, tmp_path / "half")
    again = tiny_llama().eval()
    load_adapter(again, tmp_path / "half")
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6)


def test_what_auto_takes() -> None:
    report = apply_adapters(tiny_gpt2(), IA3Config())
    assert {name.split(".", 3)[3] for name in report.adapted} == {"attn.c_attn", "mlp.c_proj"}
    with pytest.raises(TargetError, match='`target_modules="auto"` knows no layer of this model by name'):
        apply_adapters(TinyNet(), IA3Config())
    net = TinyNet()
    apply_adapters(net, IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]))
    assert [module.feedforward for module in (net.first, net.second)] == [False, True]


def test_bad_arguments() -> None:
    with pytest.raises(ConfigError, match="`feedforward_modules` names 'fc2', which `target_modules`"):
        IA3Config(target_modules=["k_proj"], feedforward_modules=["fc2"])
    with pytest.raises(ConfigError, match="`feedforward_modules` must be a regular expression or a list of names"):
        IA3Config(feedforward_modules=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="IA3Config does not know .'r'."):
        IA3Config.from_dict({"method": "ia3", "r": 4})


def test_what_is_not_built_for_it_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    apply_adapters(model, IA3Config())
    random_adapters(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="is IA3, which is no low-rank update"):
        save_adapter(model, tmp_path / "portable", layout="portable")
    with pytest.raises(
        UnsupportedError, match="several adapters in one model are built for LoRA and DoRA, not for IA3"
    ):
        load_adapter(model, tmp_path / "adapter", name="second")
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(UnsupportedError, match="IA3 is not merged on disk: load it over the base and merge in memory"):
        merge_to_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert validate_adapter(tmp_path / "adapter", target="peft").ok
    for target in ("vllm", "sglang", "tgi", "llama.cpp"):
        report = validate_adapter(tmp_path / "adapter", target=target)
        assert not report.ok
        assert "IA3" in str(report)


def test_another_kind_of_folder_does_not_fit(tmp_path: Path) -> None:
    from lightning_lora import LoRAConfig, apply_lora

    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "lora")
    ours = tiny_llama()
    apply_adapters(ours, IA3Config())
    with pytest.raises((AdapterMismatchError, UnsupportedError)):
        load_adapter(ours, tmp_path / "lora")


@pytest.mark.parametrize("strategy", ["lora_fsdp", "lora_model_parallel"])
def test_sharding_is_refused_by_name(strategy: str, tmp_path: Path) -> None:
    from lightning_lora.model.unbuilt import refuse_unbuilt

    model = nn.ModuleDict({"net": tiny_llama()})
    apply_adapters(model, IA3Config())
    use: Any = {"lora_fsdp": "fsdp1", "lora_model_parallel": "fsdp2"}[strategy]
    with pytest.raises(UnsupportedError, match='IA3 is not built for it: use the strategy "lora_ddp"'):
        refuse_unbuilt(model, use, "it", {}, 'use the strategy "lora_ddp"')


def test_two_callbacks_that_adapt_are_refused(tmp_path: Path) -> None:
    from lightning_lora import LoRA

    trainer = make_trainer(tmp_path, [IA3(), LoRA()])
    with pytest.raises(UnsupportedError, match="the Trainer has 2 `IA3` and `LoRA` callbacks; one model takes one"):
        trainer.fit(LM(), loader())
