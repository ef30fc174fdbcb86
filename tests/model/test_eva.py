# SPDX-License-Identifier: Apache-2.0
"""EVA: A spans the directions in which inputs vary most, as PEFT's does, and nothing else of the model changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.errors import ConfigError, Notice, UnsupportedError
from lightning_lora.model.eva import Seen, eva_start
from lightning_lora.model.slots import adapter_modules
from tests.helpers import random_adapters, tiny_llama
from tests.model.nets import Normed

R = 6


def varied(count: int, width: int = 40, scale: float = 1.0) -> Tensor:
    """Inputs that vary most in a few directions, around a mean that is none of them."""
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(5)))[0]
    spread = torch.cat([torch.linspace(4.0, 2.0, R), torch.linspace(0.5, 0.1, width - R)])
    return scale * torch.randn(count, width) * spread @ turn + 3.0


def leading(inputs: Tensor, r: int = R) -> Tensor:
    return torch.linalg.svd(inputs - inputs.mean(0), full_matrices=False)[2][:r]


def same_space(first: Tensor, second: Tensor) -> float:
    """The smallest cosine of the principal angles between the spans of two sets of orthonormal rows."""
    return float(torch.linalg.svdvals(first.double() @ second.double().t()).min())


def test_batches_joined_one_by_one_are_the_decomposition_of_all() -> None:
    batches = [varied(50 + 20 * i, scale=1 + i) + i for i in range(4)]
    seen = Seen.of(batches[0], 40)
    for batch in batches[1:]:
        seen = seen.joined(Seen.of(batch, 40), 40)
    whole = torch.cat(batches)
    assert seen.count == len(whole)
    torch.testing.assert_close(seen.mean, whole.double().mean(0), rtol=1e-5, atol=1e-5)
    directions, share = seen.directions(R)
    assert same_space(directions, leading(whole)) > 1 - 1e-6
    values = torch.linalg.svdvals(whole - whole.mean(0)).double().square()
    assert share == pytest.approx(float(values[:R].sum() / values.sum()), rel=1e-5)
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_wide_inputs_go_by_the_randomized_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(700, 4, generator=generator) * torch.tensor([9.0, 7.0, 5.0, 3.0])
    inputs = low @ torch.linalg.qr(torch.randn(600, 4, generator=generator))[0].t()
    inputs = inputs + 0.01 * torch.randn(700, 600, generator=generator)
    directions, share = Seen.of(inputs, 36).directions(4)
    assert same_space(directions, leading(inputs, 4)) > 1 - 1e-4
    assert share > 0.99


def test_subspaces_are_those_of_pefts_initialisation() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))
    peft = get_peft_model(
        copy.deepcopy(net),
        LoraConfig(r=R, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, tau=0.999)),
        low_cpu_mem_usage=True,
    )
    batches = [varied(300), varied(300)]
    forward: Any = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None}
    initialize_lora_eva_weights(peft, batches, prepare_layer_inputs_fn=None, show_progress_bar=False, **forward)
    apply_lora(net, LoRAConfig(r=R, target_modules=["0"], init_lora_weights="eva"))
    eva_start(net, batches)
    theirs = peft.base_model.model[0].lora_A["default"].weight.detach()
    assert same_space(net[0].lora_A.detach(), theirs) > 0.999
    assert same_space(net[0].lora_A.detach(), leading(torch.cat(batches))) > 1 - 1e-6


def test_every_layer_of_a_language_model_gets_its_inputs_and_padding_does_not_count() -> None:
    model = tiny_llama().train()
    apply_lora(model, LoRAConfig(r=4, init_lora_weights="eva", rank_pattern={"o_proj": 2}))
    ids = torch.randint(64, (4, 12))
    mask = torch.ones_like(ids)
    mask[:, 8:] = 0
    seen: dict[str, list[Tensor]] = {}
    layers = dict(adapter_modules(model))
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        model.eval()(input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    before = {name: layer.lora_A.clone() for name, layer in layers.items()}
    shares = eva_start(model.train(), [{"input_ids": ids, "attention_mask": mask}])
    assert model.training
    assert list(shares) == list(layers)
    assert all(0 < share < 1.001 for share in shares.values())
    for name, layer in layers.items():
        counted = seen[name][0][:, :8].reshape(-1, layer.in_features)
        assert layer.lora_A.shape[0] == (2 if name.endswith("o_proj") else 4)
        assert same_space(layer.lora_A.detach(), leading(counted, len(layer.lora_A))) > 1 - 1e-5
        assert not torch.equal(layer.lora_A, before[name])
        assert layer.untrained()


def test_random_states_statistics_buffers_and_modes_stay() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = Normed(), nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, *args: Any) -> Any:
            self.calls += 1
            torch.rand(3)
            return self.drop(self.net(*args))

    model = Counting().train()
    apply_lora(model, LoRAConfig(r=2, init_lora_weights="eva"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    others = {n: p.clone() for n, p in model.named_parameters() if not n.endswith("lora_A")}
    modes = [m.training for m in model.modules()]
    batches = [torch.randn(8, 8), torch.randn(8, 8)]
    state = torch.get_rng_state()
    eva_start(model, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in model.modules()]
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in others.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_directions_that_were_not_seen_begin_at_random_with_a_notice() -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    apply_lora(net, LoRAConfig(r=4, init_lora_weights="eva"))
    before = net[0].lora_A.detach().clone()
    inputs = torch.randn(20, 2) @ torch.randn(2, 16)
    with pytest.warns(Notice, match="fewer directions than the rank in 2 of 2 layers, '0' first"):
        eva_start(net, [(inputs,)])
    assert same_space(net[0].lora_A[:2].detach(), leading(inputs, 2)) > 1 - 1e-6
    assert torch.equal(net[0].lora_A[2:], before[2:])


def test_what_cannot_begin_so_is_named() -> None:
    def net(**config: Any) -> nn.Module:
        model = nn.Sequential(nn.Linear(16, 16))
        apply_lora(model, LoRAConfig(r=2, **config))
        return model

    with pytest.raises(ConfigError, match="no adapted linears"):
        eva_start(nn.Linear(4, 4), [torch.randn(3, 4)])
    with pytest.raises(ConfigError, match="`batches` is empty"):
        eva_start(net(), [])
    with pytest.raises(ConfigError, match="has been trained already"):
        eva_start(random_adapters(net()), [torch.randn(3, 16)])
    with pytest.raises(ConfigError, match="the inputs of '0' are not finite"):
        eva_start(net(), [torch.full((3, 16), torch.nan)])
    with pytest.raises(UnsupportedError, match="EVA is a start of its own"):
        eva_start(net(init_lora_weights="pissa"), [torch.randn(3, 16)])
