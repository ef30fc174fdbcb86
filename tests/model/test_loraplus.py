# SPDX-License-Identifier: Apache-2.0
"""LoRA+: B learns at a multiple of A's rate, whatever optimizer, groups and scheduler the user has."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from lightning_lora import LoRAConfig, apply_lora, loraplus_param_groups
from lightning_lora.errors import ConfigError, OptimizerError, UnsupportedError
from lightning_lora.model.loraplus import part_groups, schedulers_in
from lightning_lora.model.optimizers import check_optimizers, fitting_state
from lightning_lora.model.sharding import shard_model
from lightning_lora.nn.sharded import is_sharded
from tests.helpers import TinyNet, random_adapters, tiny_llama

A, B = ["first.adapter.lora_A", "second.adapter.lora_A"], ["first.adapter.lora_B", "second.adapter.lora_B"]
RATIO = 16.0


def _net(**config: Any) -> nn.Module:
    net = TinyNet()
    apply_lora(net, LoRAConfig(**{"r": 2, "target_modules": ["first", "second"], **config}))
    return net


def _held(optimizer: Optimizer, net: nn.Module) -> list[list[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def _trained(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.requires_grad]


def test_one_group_is_parted_in_two_of_the_same_settings() -> None:
    net = _net()
    optimizer = AdamW(_trained(net), lr=1e-3, betas=(0.8, 0.9), weight_decay=0.1)
    part_groups([optimizer], [], net, RATIO)
    assert _held(optimizer, net) == [A, B]
    assert _rates(optimizer) == [1e-3, 16e-3]
    first, second = ({k: v for k, v in g.items() if k not in ("params", "lr")} for g in optimizer.param_groups)
    assert second == {**first, "loraplus_lr_ratio": RATIO}
    part_groups([optimizer], [], net, RATIO)  # a module that keeps its optimizer gives it again at the next fit
    assert _rates(optimizer) == [1e-3, 16e-3]


def test_groups_keep_their_numbers_names_and_rates() -> None:
    net = _net(modules_to_save=["head"])
    optimizer = SGD(
        [
            {"params": [net.head.trained.weight], "lr": 0.5, "name": "head"},
            {"params": list(net.second.adapter.parameters()), "name": "second"},
            {"params": list(net.first.adapter.parameters()), "lr": 0.2, "momentum": 0.9, "name": "first"},
        ],
        lr=0.1,
    )
    part_groups([optimizer], [], net, 4)
    assert _held(optimizer, net) == [["head.trained.weight"], [A[1]], [A[0]], [B[1]], [B[0]]]
    assert _rates(optimizer) == [0.5, 0.1, 0.2, 0.4, 0.8]
    assert [g["momentum"] for g in optimizer.param_groups] == [0, 0, 0.9, 0, 0.9]
    assert [g["name"] for g in optimizer.param_groups] == ["head", "second", "first", "second_lora_B", "first_lora_B"]


def test_names_of_parameters_stay_in_step() -> None:
    net = _net()
    optimizer = AdamW([(name, p) for name, p in net.named_parameters() if p.requires_grad])
    part_groups([optimizer], [], net, RATIO)
    assert [g["param_names"] for g in optimizer.param_groups] == [A, B]


def test_a_rate_that_is_a_tensor_is_multiplied_into_another() -> None:
    net = _net()
    rate = torch.tensor(1e-3)
    optimizer = AdamW(_trained(net), lr=rate)
    part_groups([optimizer], [], net, RATIO)
    assert rate.item() == optimizer.param_groups[0]["lr"].item() == pytest.approx(1e-3)
    assert optimizer.param_groups[1]["lr"].item() == pytest.approx(16e-3)


def test_groups_for_any_optimizer_without_a_trainer() -> None:
    net = _net(modules_to_save=["head"], loraplus_lr_ratio=4)
    groups = loraplus_param_groups(net, lr=0.5)
    assert [(g["lr"], len(g["params"])) for g in groups] == [(0.5, 3), (2.0, 2)]
    assert [g["lr"] for g in loraplus_param_groups(net, 0.5, loraplus_lr_ratio=8)] == [0.5, 4.0]
    optimizer = SGD(groups)
    part_groups([optimizer], [], net, 4)  # the callback finds them made
    assert _rates(optimizer) == [0.5, 2.0]
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    net(torch.arange(8).view(1, 8)).sum().backward()
    optimizer.step()
    for old, group in zip(before, [0.5, 0.5, 0.5, 2.0, 2.0], strict=True):
        new = next(p for g in optimizer.param_groups for p in g["params"] if p.shape == old.shape)
        torch.testing.assert_close(new.detach(), old - group * new.grad)


def _plateau(optimizer: Optimizer) -> Any:
    return lrs.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, min_lr=1e-4)


def _warmup(optimizer: Optimizer) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 3, 12)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: lrs.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lrs.StepLR(o, 2, 0.5),
    "multistep": lambda o: lrs.MultiStepLR(o, [2, 5], 0.1),
    "constant": lambda o: lrs.ConstantLR(o, 0.1, 4),
    "linear": lambda o: lrs.LinearLR(o, 0.1, 1.0, 5),
    "exponential": lambda o: lrs.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lrs.PolynomialLR(o, 8, 2.0),
    "cosine": lambda o: lrs.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "sequential": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 3), lrs.CosineAnnealingLR(o, 8)], [3]),
    "chained": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]),
    "plateau": _plateau,
    "cyclic": lambda o: lrs.CyclicLR(o, 1e-3, 1e-2, step_size_up=3, cycle_momentum=False),
    "one cycle": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=12),
    "swa": lambda o: SWALR(o, swa_lr=1e-3, anneal_epochs=4),
    "transformers": _warmup,
}


def _advance(optimizer: Optimizer, scheduler: Any, step: int) -> None:
    optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, lrs.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_both_rates_in_proportion(name: str) -> None:
    nets, pairs = [_net(), _net()], []
    for net in nets:
        optimizer = SGD([{"params": net.first.adapter.parameters()}, {"params": net.second.adapter.parameters()}], 0.01)
        pairs.append((optimizer, SCHEDULERS[name](optimizer)))
    (plain, plain_scheduler), (optimizer, scheduler) = pairs
    part_groups([optimizer], schedulers_in({"optimizer": optimizer, "lr_scheduler": scheduler}), nets[1], RATIO)
    other = _net()
    resumed = SGD(other.first.adapter.parameters(), 0.01)
    seen = []
    for step in range(9):
        assert _rates(optimizer) == pytest.approx([*_rates(plain), *(RATIO * lr for lr in _rates(plain))], rel=1e-9)
        assert len(scheduler.get_last_lr()) == 4
        seen.append(_rates(optimizer)[0])
        _advance(plain, plain_scheduler, step)
        _advance(optimizer, scheduler, step)
        if step == 4:
            resumed = SGD([{"params": layer.adapter.parameters()} for layer in (other.first, other.second)], 0.01)
            again = SCHEDULERS[name](resumed)
            part_groups([resumed], schedulers_in([[resumed], [again]]), other, RATIO)
            resumed.load_state_dict(optimizer.state_dict())
            again.load_state_dict(scheduler.state_dict())
        if step > 4:
            _advance(resumed, again, step)
            assert _rates(resumed) == _rates(optimizer)
    assert len(set(seen)) > 1


def test_a_momentum_that_is_scheduled_is_the_same_for_both() -> None:
    net = _net()
    optimizer = SGD(_trained(net), 0.01, momentum=0.9)
    scheduler = lrs.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3, base_momentum=0.5, max_momentum=0.8)
    part_groups([optimizer], [scheduler], net, RATIO)
    for step in range(4):
        first, second = optimizer.param_groups
        assert first["momentum"] == second["momentum"]
        _advance(optimizer, scheduler, step)
    assert first["momentum"] < 0.8


class Wave(lrs.LRScheduler):
    """A scheduler of the user's; with a list that may be one of groups."""

    def __init__(self, optimizer: Optimizer, heights: list[float]) -> None:
        self.heights = heights
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        return [lr * self.heights[self.last_epoch % len(self.heights)] for lr in self.base_lrs]


def test_a_scheduler_of_the_users_follows_or_is_refused_before_anything_changes() -> None:
    net = _net()
    optimizer = SGD(_trained(net), 0.01)
    scheduler = Wave(optimizer, [1.0, 0.5, 0.25])
    part_groups([optimizer], schedulers_in(([optimizer], [{"scheduler": scheduler, "interval": "step"}])), net, RATIO)
    _advance(optimizer, scheduler, 0)
    assert _rates(optimizer) == [0.005, 0.08]
    optimizer = SGD(_trained(net), 0.01)
    scheduler = Wave(optimizer, [0.5])
    message = (
        "`Wave.heights` may have a value for each of the optimizer's groups (1), which `loraplus_lr_ratio` would part: "
        "make the optimizer over `loraplus_param_groups(self, lr)` in `configure_optimizers`, before the scheduler"
    )
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        part_groups([optimizer], [scheduler], net, RATIO)
    assert (_rates(optimizer), scheduler.base_lrs) == ([0.005], [0.01])
    optimizer = SGD(loraplus_param_groups(net, 0.01, RATIO))
    scheduler = Wave(optimizer, [0.5])
    part_groups([optimizer], [scheduler], net, RATIO)
    _advance(optimizer, scheduler, 0)
    assert _rates(optimizer) == [0.005, 0.08]


def test_schedulers_are_found_in_every_form_that_configure_optimizers_may_have() -> None:
    net = _net()
    one, two = SGD(net.first.adapter.parameters(), 0.1), SGD(net.second.adapter.parameters(), 0.1)
    step, plateau = lrs.StepLR(one, 1), _plateau(two)
    inner = lrs.LinearLR(one)
    chain = lrs.ChainedScheduler([inner])
    for result, found in (
        (one, []),
        (None, []),
        ([one, two], []),
        ({"optimizer": one, "lr_scheduler": step}, [step]),
        ({"optimizer": two, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}, [plateau]),
        (([one, two], [step, {"scheduler": plateau}]), [step, plateau]),
        ([{"optimizer": one, "lr_scheduler": step}, {"optimizer": two}], [step]),
        (([one], [chain]), [chain, inner]),
    ):
        assert schedulers_in(result) == found


def test_an_optimizer_that_holds_other_parameters_is_left_alone() -> None:
    net, other = _net(), nn.Linear(2, 2)
    optimizer = SGD(other.parameters(), 0.1)
    scheduler = Wave(optimizer, [0.5])
    part_groups([optimizer], [scheduler], net, RATIO)
    assert _rates(optimizer) == [0.05]


def test_messages() -> None:
    net = _net()
    factors = [[net.first.lora_A, net.second.lora_A], [net.first.lora_B, net.second.lora_B]]
    apart = AdamW([{"params": factors[0]}, {"params": factors[1], "lr": 1.0}])
    message = (
        "group 1 of AdamW holds factors B without their A, at a learning rate of its own: put both into one group, or "
        "leave `loraplus_lr_ratio` out"
    )
    with pytest.raises(OptimizerError, match=re.escape(message)):
        part_groups([apart], [], net, RATIO)
    made = AdamW(loraplus_param_groups(net, 0.1, 8))
    message = "the groups of AdamW were made for `loraplus_lr_ratio` 8, the configuration says 16.0: give both the same"
    with pytest.raises(OptimizerError, match=re.escape(message)):
        part_groups([made], [], net, RATIO)
    message = (
        "the checkpoint's optimizer was made with `loraplus_lr_ratio` 8, this run's with null: resume with the same, "
        "or start anew from its weights with `init_from`"
    )
    with pytest.raises(OptimizerError, match=re.escape(message)):
        fitting_state(made.state_dict(), AdamW(_trained(net)))
    with pytest.raises(OptimizerError, match="with `loraplus_lr_ratio` null, this run's with 8: resume with"):
        fitting_state(AdamW(_trained(net)).state_dict(), made)
    relative = AdamW(_trained(net))
    relative.param_groups[0]["lr"] = None  # as Adafactor has it that finds its own
    with pytest.raises(OptimizerError, match="group 0 of AdamW has `lr` None, which `loraplus_lr_ratio` cannot multip"):
        part_groups([relative], [], net, RATIO)
    with pytest.raises(ConfigError, match="the model has no adapters; call `apply_lora`"):
        loraplus_param_groups(TinyNet(), 0.1, 16)
    with pytest.raises(ConfigError, match="`loraplus_lr_ratio` is neither given nor in the model's `LoRAConfig`; try"):
        loraplus_param_groups(net, 0.1)
    with pytest.raises(ConfigError, match="`loraplus_lr_ratio` must be a positive number, such as 16, or null, got 0"):
        loraplus_param_groups(net, 0.1, 0)


def test_sharded_factors_are_parted_and_not_given_to_bitsandbytes() -> None:
    from bitsandbytes.optim import AdamW8bit

    net = _net()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_model(net, init_device_mesh("cpu", (1,)))
        optimizer = AdamW(_trained(net), lr=1e-3)
        part_groups([optimizer], [], net, RATIO)
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2]
        assert all(is_sharded(p) for g in optimizer.param_groups for p in g["params"])
        check_optimizers([optimizer], net)
        net(torch.arange(8).view(1, 8)).sum().backward()
        optimizer.step()
        message = r"bitsandbytes' AdamW8bit cannot step parameters that are sharded \(FSDP 2, tensor parallelism\): use"
        with pytest.raises(UnsupportedError, match=message):
            check_optimizers([AdamW8bit(_trained(net))], net)
    finally:
        dist.destroy_process_group()


def test_as_pefts_optimizer() -> None:
    """The same factors at the same rates, and after some steps the same weights."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    ours = random_adapters(_llama())
    theirs = get_peft_model(
        tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.copy_(ours.get_parameter(_our_name(name)))
    made = create_loraplus_optimizer(theirs, AdamW, lr=1e-3, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1)
    optimizer = AdamW(_trained(ours), lr=1e-3, weight_decay=0.1)
    part_groups([optimizer], [], ours, RATIO)
    assert _by_rate(optimizer, ours, str) == _by_rate(made, theirs, _our_name)
    ids = torch.arange(16).view(2, 8)
    for model, stepped in ((ours, optimizer), (theirs, made)):
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
            stepped.step()
            stepped.zero_grad()
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours.get_parameter(_our_name(name)), p, rtol=1e-4, atol=1e-6)


def _llama() -> nn.Module:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    return model


def _our_name(theirs: str) -> str:
    return re.sub(r"^base_model\.model\.|\.default\.weight", "", theirs).replace(".lora_", ".adapter.lora_")


def _by_rate(optimizer: Optimizer, model: nn.Module, renamed: Callable[[str], str]) -> dict[float, set[str]]:
    names = {id(p): renamed(name) for name, p in model.named_parameters()}
    return {g["lr"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups if g["params"]}
