# SPDX-License-Identifier: Apache-2.0
"""`SavedModule`: a trained copy beside its frozen original."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.nn.saved import SavedModule

RECORD = AdapterRecord(LoRAConfig())


def _changed(original: nn.Module) -> SavedModule:
    saved = SavedModule(original, RECORD)
    with torch.no_grad():
        for p in saved.trained.parameters():
            p.add_(torch.randn_like(p))
    return saved


def test_it_starts_as_its_original_and_trains_the_copy_alone() -> None:
    saved = SavedModule(nn.Linear(4, 3), RECORD)
    x = torch.randn(2, 4)
    assert saved.untrained()
    assert torch.equal(saved(x), saved.original(x))
    saved(x).sum().backward()
    assert saved.original.weight.grad is None
    assert saved.trained.weight.grad is not None
    assert saved.trained_names() == ["trained.weight", "trained.bias"]


def test_off_is_the_original_and_strength_goes_between() -> None:
    saved = _changed(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    off, on = saved.original(x), saved.trained(x)
    assert not saved.untrained()
    assert torch.equal(saved(x), on)
    saved.strength = 0.25
    assert torch.allclose(saved(x), off + 0.25 * (on - off), atol=1e-6)
    saved.strength = 0.0
    assert torch.equal(saved(x), off)
    saved.strength, saved.enabled = 1.0, False
    assert torch.equal(saved(x), off)


def test_its_attributes_are_those_of_the_module_in_use() -> None:
    saved = _changed(nn.Embedding(5, 4, padding_idx=2))
    assert saved.padding_idx == 2
    assert saved.weight is saved.trained.weight
    saved.enabled = False
    assert saved.weight is saved.original.weight


def test_statistics_of_the_copy_move_and_those_of_the_original_never() -> None:
    saved = SavedModule(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), RECORD).train()
    before = {name: value.clone() for name, value in saved.original.state_dict().items()}
    for enabled in (True, False):
        saved.enabled = enabled
        saved(torch.randn(16, 4))
    assert all(torch.equal(value, before[name]) for name, value in saved.original.state_dict().items())
    assert not torch.equal(saved.trained[1].running_mean, before["1.running_mean"])
    assert "trained.1.running_mean" in saved.trained_names()


def test_between_zero_and_one_training_moves_the_statistics_of_the_copy() -> None:
    saved = SavedModule(nn.BatchNorm1d(4), RECORD).train()
    saved.strength = 0.5
    saved(torch.randn(16, 4))
    assert saved.trained.running_mean.any()
    assert int(saved.trained.num_batches_tracked) == 1


class Twins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_tied_parameters_inside_stay_tied() -> None:
    saved = _changed(Twins())
    assert saved.trained.a.weight is saved.trained.b.weight
    x = torch.randn(2, 4)
    on, saved.strength = saved(x), 1.0 - 1e-7
    assert torch.allclose(saved(x), on, atol=1e-4)


def test_a_value_at_a_strength_is_the_one_that_is_computed_with() -> None:
    saved = _changed(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    saved.trained.train()(torch.randn(8, 4))
    x, plain = torch.randn(2, 4), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    for strength in (0.0, 0.3, 1.0):
        saved.eval().strength = strength
        plain.load_state_dict({name: saved.value(name, strength) for name in plain.state_dict()})
        assert torch.equal(saved(x), plain(x)), strength
