# SPDX-License-Identifier: Apache-2.0
"""PEFT as the oracle of AdaLoRA's allocator: the same gradients give the same triplets, step by step."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lightning_lora.model.orthogonality import add_orthogonality_gradient, orthogonality
from lightning_lora.model.rank_allocator import BudgetSchedule, RankAllocator
from lightning_lora.nn.adalora import Triplets
from tests.helpers import tiny_llama

IDS = torch.arange(32).view(2, 16) % 64


def theirs(**config: object) -> nn.Module:
    words = {"init_r": 6, "target_r": 2, "lora_alpha": 8, "total_step": 14, "tinit": 2, "tfinal": 3, "deltaT": 2}
    torch.manual_seed(0)
    return peft.get_peft_model(
        tiny_llama(),
        peft.AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "up_proj"], **{**words, **config}
        ),
    ).train()


def triplets_of(model: nn.Module) -> dict[str, Triplets]:
    return {
        name: Triplets(m.lora_A["default"], m.lora_E["default"], m.lora_B["default"])
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.adalora.AdaLoraLayer)
    }


@pytest.mark.parametrize("config", [{}, {"deltaT": 1, "tinit": 0, "tfinal": 0}, {"beta1": 0.5, "beta2": 0.9}])
def test_the_same_gradients_give_the_same_masks(config: dict[str, object]) -> None:
    model = theirs(**config)
    words = model.peft_config["default"]
    oracle = triplets_of(model)
    ours = {name: Triplets(*(t.detach().clone().requires_grad_() for t in ts)) for name, ts in oracle.items()}
    schedule = BudgetSchedule(
        init=6 * len(ours), target=2 * len(ours), tinit=words.tinit, tfinal=words.tfinal, total=14, every=words.deltaT
    )
    allocator = RankAllocator(ours, schedule, words.beta1, words.beta2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    budgets, sizes = [], []
    for step in range(1, 15):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        for own, other in zip(ours.values(), oracle.values(), strict=True):
            for mine, their in zip(own, other, strict=True):
                mine.data.copy_(their.data)
                mine.grad = their.grad.clone()
        model.base_model.update_and_allocate(step)
        allocator.update(step)
        for name, own in ours.items():
            assert torch.equal(own.E, oracle[name].E), (step, name)
        pattern = words.rank_pattern or {}
        assert {n: m.tolist() for n, m in allocator.kept.items()} == {
            f"base_model.model.{n.removesuffix('.lora_E.default')}": mask for n, mask in pattern.items()
        }
        budgets.append(schedule.budget(step))
        sizes.append(sum(allocator.ranks().values()))
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0] == 36, sizes[-1]) == (words.tinit > 0, 12)
    assert len(set(allocator.ranks().values())) > 1


def test_the_orthogonality_term_and_its_gradient_are_pefts() -> None:
    model = theirs(orth_reg_weight=0.3)
    layers = triplets_of(model)
    labelled = model(input_ids=IDS, labels=IDS).loss
    labelled.backward()
    want = {name: [t.grad.clone() for t in ts] for name, ts in layers.items()}
    model.peft_config["default"].orth_reg_weight = 0.0
    model.zero_grad()
    plain = model(input_ids=IDS, labels=IDS).loss
    plain.backward()
    held = {id(t) for ts in layers.values() for t in ts}
    add_orthogonality_gradient(layers.values(), 0.3, held)
    assert (labelled - plain).item() == pytest.approx(0.3 * float(orthogonality(layers.values())), rel=1e-5)
    for name, ts in layers.items():
        for tensor, other in zip(ts, want[name], strict=True):
            assert torch.allclose(tensor.grad, other, rtol=1e-5, atol=1e-7)


def test_orthonormal_factors_have_no_term_and_other_optimizers_parameters_are_left_alone() -> None:
    eye = torch.eye(4, 8)
    layer = Triplets(*(t.requires_grad_() for t in (eye.clone(), torch.ones(4, 1), eye.t().clone())))
    assert float(orthogonality([layer])) == 0.0
    add_orthogonality_gradient([layer], 1.0, {id(layer.A)})
    assert not layer.A.grad.any()
    assert layer.B.grad is None
