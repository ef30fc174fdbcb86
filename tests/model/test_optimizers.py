# SPDX-License-Identifier: Apache-2.0
"""Optimizers that were built before the adapters: every common form is put right, and it is said."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import OptimizerError
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.optimizers import Succession, check_optimizers, check_trained, repair_optimizers
from tests.helpers import TinyNet
from tests.model.nets import notices


def _convert(net: nn.Module, **config: Any) -> Succession:
    succession = Succession(net)
    apply_lora(net, LoRAConfig(**{"r": 2, **config}))
    succession.converted(net)
    return succession


def _held(optimizer: Optimizer, net: nn.Module) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names.get(id(p), "gone") for p in group["params"]] for group in optimizer.param_groups]


FIRST = ["first.adapter.lora_A", "first.adapter.lora_B"]
SECOND = ["second.adapter.lora_A", "second.adapter.lora_B"]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_take_the_place_of_their_weights(quantize: str) -> None:
    net = TinyNet()
    optimizer = AdamW(net.parameters(), lr=3e-3, weight_decay=0.1)  # as LightningCLI or a module's __init__ does it
    succession = _convert(net, quantize=quantize)
    with pytest.raises(
        OptimizerError, match="4 adapter parameters are in no optimizer and would never be trained, 'fi"
    ):
        check_optimizers([optimizer], net)
    said = notices(lambda: repair_optimizers([optimizer], net, succession))
    assert said == [
        "AdamW was built before the adapters were in the model: 4 adapter parameters took the place of the weights "
        "they adapt"
    ]
    assert _held(optimizer, net) == [FIRST + SECOND]
    assert optimizer.param_groups[0]["lr"] == 3e-3
    check_optimizers([optimizer], net)
    before = net.first.lora_B.detach().clone()
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(net.first.lora_B, before)


def test_groups_keep_their_settings_and_schedulers_their_rates() -> None:
    net = TinyNet()
    groups = [
        {"params": [net.second.weight, net.head.weight], "lr": 1e-2},
        {"params": [*net.first.parameters()], "lr": 1e-3, "weight_decay": 0.5},
        {"params": [net.embed.weight], "lr": 1e-4},
    ]
    optimizer = AdamW(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    repair_optimizers([optimizer], net, _convert(net))
    assert _held(optimizer, net) == [SECOND, FIRST, []]
    assert [g["initial_lr"] for g in optimizer.param_groups] == scheduler.base_lrs == [1e-2, 1e-3, 1e-4]
    assert optimizer.param_groups[1]["weight_decay"] == 0.5
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [5e-3, 5e-4, 5e-5]


def test_several_optimizers_keep_their_shares() -> None:
    net = TinyNet()
    one, two = AdamW(net.first.parameters()), SGD(net.second.parameters(), lr=0.1)
    repair_optimizers([one, two], net, _convert(net))
    assert (_held(one, net), _held(two, net)) == ([FIRST], [SECOND])


def test_saved_modules_pass_their_place_on_too() -> None:
    net = TinyNet()
    optimizer = SGD([{"params": net.first.parameters()}, {"params": net.head.parameters(), "lr": 0.5}], lr=0.1)
    succession = _convert(net, target_modules=["first"], modules_to_save=["head"])
    repair_optimizers([optimizer], net, succession)
    assert _held(optimizer, net) == [FIRST, ["head.trained.weight"]]


def test_what_no_group_held_joins_the_first_and_that_is_said() -> None:
    net = TinyNet()
    optimizer = AdamW([{"params": net.head.parameters()}, {"params": net.second.parameters()}])
    said = notices(lambda: repair_optimizers([optimizer], net, _convert(net)))
    assert said == [
        "AdamW was built before the adapters were in the model: 2 adapter parameters took the place of the weights "
        "they adapt, and 2 trainable parameters, 'first.adapter.lora_A' first, joined its first group"
    ]
    assert _held(optimizer, net) == [FIRST, SECOND]
    net = TinyNet()
    optimizer = AdamW(net.head.parameters())
    _convert(net)
    said = notices(lambda: repair_optimizers([optimizer], net))
    assert said == [
        "AdamW was built before the adapters were in the model: 4 trainable parameters, 'first.adapter.lora_A' first, "
        "joined its first group"
    ]


AFTER: list[Callable[[nn.Module], Any]] = [
    lambda net: net.parameters(),
    lambda net: [p for p in net.parameters() if p.requires_grad],
]


@pytest.mark.parametrize("choose", AFTER)
def test_an_optimizer_built_after_conversion_is_only_freed_of_the_frozen(choose: Callable[[nn.Module], Any]) -> None:
    net = TinyNet()
    succession = _convert(net)
    optimizer = AdamW(choose(net))
    assert notices(lambda: repair_optimizers([optimizer], net, succession)) == []
    assert _held(optimizer, net) == [FIRST + SECOND]
    assert notices(lambda: repair_optimizers([optimizer], net, succession)) == []
    assert _held(optimizer, net) == [FIRST + SECOND]


def test_names_of_parameters_stay_in_step() -> None:
    net = TinyNet()
    optimizer = AdamW([("mine." + name, p) for name, p in net.named_parameters()])
    repair_optimizers([optimizer], net, _convert(net))
    assert optimizer.param_groups[0]["param_names"] == FIRST + SECOND
    optimizer.load_state_dict(optimizer.state_dict())
    net = TinyNet()
    _convert(net)
    optimizer = AdamW([("mine." + name, p) for name, p in net.named_parameters()])
    repair_optimizers([optimizer], net)
    assert optimizer.param_groups[0]["param_names"] == [f"mine.{name}" for name in FIRST + SECOND]


def test_an_optimizer_that_has_taken_steps_is_refused() -> None:
    net = TinyNet()
    optimizer = AdamW(net.parameters())
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.step()
    succession = _convert(net)
    message = "AdamW has already taken steps on parameters that are frozen now: build the optimizer in `configure_opt"
    with pytest.raises(OptimizerError, match=message):
        repair_optimizers([optimizer], net, succession)
    assert notices(lambda: repair_optimizers([], net, succession)) == []


def test_packed_weights_are_freed_unless_an_optimizer_holds_them() -> None:
    net = TinyNet()
    weight = weakref.ref(net.first.weight)
    succession = _convert(net, quantize="nf4")
    gc.collect()
    assert weight() is None
    assert succession.heirs(nn.Parameter(torch.zeros(1))) == []


def test_an_optimizer_over_some_of_the_adapters_is_refused_by_name() -> None:
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=2))
    optimizer = torch.optim.SGD(model.second.parameters(), lr=0.1)
    message = r"leaves out 2 parameters, 'first.adapter.lora_A' first: give it all of `self.parameters\(\)`"
    with pytest.raises(OptimizerError, match=message):
        repair_optimizers([optimizer], model)


def test_a_base_that_is_unfrozen_is_refused_by_name() -> None:
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=2, modules_to_save=["head"]))
    check_trained(model)
    model.embed.requires_grad_(True)
    message = "1 parameters of the frozen base would be trained, 'embed.weight' first.*`modules_to_save`"
    with pytest.raises(OptimizerError, match=message):
        check_trained(model)
    with pytest.raises(OptimizerError, match=message):
        check_optimizers([torch.optim.SGD(model.parameters(), lr=0.1)], model)
