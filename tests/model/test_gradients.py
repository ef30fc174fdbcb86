# SPDX-License-Identifier: Apache-2.0
"""`GradientCheck`: adapters that would not learn are named, and so is why."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import GradientError, Notice
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.gradients import PATIENCE, GradientCheck
from tests.helpers import TinyNet, tiny_llama
from tests.model.nets import notices


class Net(nn.Module):
    """Two linears and a head; ``way`` says how the data go through."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        self.first, self.second, self.unused = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "checkpoint":
            x = checkpoint(self.first, x, use_reentrant=True)
        elif self.way == "detach":
            x = self.first(x).detach()
        else:
            x = self.first(x)
        return self.head(self.second(x).tanh())


def _net(way: str = "plain", **config: Any) -> Net:
    net = Net(way)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apply_lora(net, LoRAConfig(**{"r": 2, "target_modules": ["first", "second"], **config}))
    return net


def _ids(*modules: nn.Module) -> set[int]:
    return {id(p) for module in modules for p in module.parameters()}


def _step(net: Net, check: GradientCheck, scale: float = 1.0, ids: set[int] | None = None) -> None:
    net.zero_grad()
    (net(torch.randn(4, 8)).sum() * scale).backward()
    check.check(_ids(net) if ids is None else ids)


def _hooks(net: Net) -> int:
    return sum(len(m._forward_pre_hooks) for m in net.modules())


def test_a_model_that_learns_passes_in_silence_and_is_left_without_hooks() -> None:
    net = _net()
    check = GradientCheck(net)
    assert _hooks(net) == 2
    for step in range(PATIENCE):
        assert not check.done
        assert notices(lambda: _step(net, check)) == []
        assert _hooks(net) == 0, step
    assert check.done


NO_GRADIENT = (
    r"1 adapted layers were called but got no gradient at the first optimizer step, 'first' first. Causes seen: "
    r"reentrant activation checkpointing whose input needs no gradient \(use `gradient_checkpointing_enable\("
)


@pytest.mark.parametrize("way", ["checkpoint", "detach"])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_was_called_and_got_no_gradient(way: str, training: bool) -> None:
    net = _net(way).train(training or way == "checkpoint")  # models that were loaded may be left in evaluation
    with pytest.raises(GradientError, match=NO_GRADIENT):
        _step(net, GradientCheck(net))


def test_reentrant_checkpointing_of_a_transformers_model() -> None:
    def first_step(reentrant: bool, input_needs_grad: bool = True) -> None:
        model = tiny_llama()
        apply_lora(model, LoRAConfig(r=2))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if not input_needs_grad:
            model.disable_input_require_grads()
        model.train()
        check = GradientCheck(model)
        ids = torch.arange(16).view(2, 8)
        out = model(ids, labels=ids)
        if out.loss.requires_grad:
            out.loss.backward()
        check.check(_ids(model))

    first_step(reentrant=False)
    first_step(reentrant=True)  # transformers makes the embedding's output need a gradient
    with pytest.raises(GradientError, match="14 adapted layers were called but got no gradient"):
        first_step(reentrant=True, input_needs_grad=False)


def test_an_optimizer_step_before_any_backward() -> None:
    net = _net()
    check = GradientCheck(net)
    net(torch.randn(4, 8))
    with pytest.raises(GradientError, match="2 adapted layers .* an optimizer step before any backward"):
        check.check(_ids(net))


def test_layers_that_are_never_called_are_named_once() -> None:
    net = _net(target_modules=["first", "second", "unused"])
    check = GradientCheck(net)
    said = notices(lambda: [_step(net, check) for _ in range(PATIENCE)])
    assert len(said) == 1
    assert said[0].startswith(
        "1 adapted layers were not called before the first optimizer step, 'unused' first: unrout"
    )
    assert "name them in `exclude_modules` if that is lasting" in said[0]


def test_evaluation_without_gradient_is_no_call() -> None:
    net = _net()
    check = GradientCheck(net)
    with torch.no_grad():
        net.eval()(torch.randn(4, 8))
    said = notices(lambda: check.check(_ids(net)))
    assert said[0].startswith("2 adapted layers were not called")


def test_a_zero_head_is_a_notice_and_an_error_when_it_lasts() -> None:
    net = _net()
    nn.init.zeros_(net.head.weight)
    check = GradientCheck(net)
    said = notices(lambda: _step(net, check))
    assert said == [
        "2 adapted layers have an all-zero gradient at the first step, 'first' first; a zero-initialised head behind "
        "them does it. It is an error if it lasts 5 steps"
    ]
    for _ in range(PATIENCE - 2):
        assert notices(lambda: _step(net, check)) == []
    message = "2 adapted layers had an all-zero gradient for 5 steps, 'first' first: what comes behind them is zero or"
    with pytest.raises(GradientError, match=message):
        _step(net, check)


def test_a_zero_head_that_is_trained_is_no_error() -> None:
    net = _net()
    nn.init.zeros_(net.head.weight)
    check = GradientCheck(net)
    notices(lambda: _step(net, check))
    nn.init.normal_(net.head.weight)
    for _ in range(PATIENCE):
        _step(net, check)
    assert check.done


def test_gradients_that_are_not_finite_are_left_to_the_scaler_and_named_if_they_last() -> None:
    net = _net()
    check = GradientCheck(net)
    said = notices(lambda: [_step(net, check, scale=float("inf")) for _ in range(PATIENCE + 2)])
    assert said == [
        "the gradients of the adapters were not finite for 5 steps running: lower the learning rate, or train in bf16 "
        "instead of fp16"
    ]
    assert not check.done
    net.way = "detach"  # the first step that is really taken is still judged
    with pytest.raises(GradientError, match="got no gradient at the first optimizer step"):
        _step(net, check)


def test_optimizers_that_share_the_adapters_out_are_judged_each_at_its_own_first_step() -> None:
    net = _net("detach")
    check = GradientCheck(net)
    _step(net, check, ids=_ids(net.second))
    with pytest.raises(GradientError, match="'first' first"):
        _step(net, check, ids=_ids(net.first))
    _step(net, GradientCheck(net), ids=_ids(net.head))  # an optimizer that holds no adapter


def test_closing_takes_the_hooks_off() -> None:
    net = _net()
    GradientCheck(net).close()
    assert _hooks(net) == 0


def test_a_layer_that_is_first_called_late_is_judged_then() -> None:
    net = TinyNet()
    apply_lora(net, LoRAConfig(r=2, exclude_modules=["head"]))
    check = GradientCheck(net)
    held = {id(p) for p in net.parameters()}
    net.first(torch.randn(2, 64)).sum().backward()
    with pytest.warns(Notice, match="1 adapted layers were not called before the first optimizer step, 'second'"):
        check.check(held)
    net.second(torch.randn(2, 128)).detach()
    with pytest.raises(GradientError, match="1 adapted layers were called but got no gradient.*'second'"):
        check.check(held)
    assert not check.done
