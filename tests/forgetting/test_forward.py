# SPDX-License-Identifier: Apache-2.0
"""What computes logits: found by itself, or named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.forward import find_forward
from tests.forgetting import tiny

IDS = torch.tensor([[2, 3, 4]])


class Plain(nn.Module):
    """No transformers model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.net = nn.Embedding(10, 10)

    def score(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.part.net(input_ids))


def of_module(module: Plain, input_ids: Tensor) -> Tensor:
    return module.part.net(input_ids)


def test_the_one_transformers_model_is_found() -> None:
    student = tiny.Student(dropout=0.0).eval()
    assert torch.equal(find_forward(student, None)(IDS, 3), student.net(IDS).logits)


def test_the_head_is_spared_where_nothing_is_scored() -> None:
    model = tiny.llama().eval()
    kept = find_forward(model, None)(IDS, 2)
    assert kept.shape == (1, 2, 300)
    assert torch.allclose(kept, model(IDS).logits[:, -2:], atol=1e-6)


@pytest.mark.parametrize("name", ["part.net", "score", f"{__name__}.of_module", f"{__name__}:of_module"])
def test_forward_by_name(name: str) -> None:
    module = Plain()
    assert torch.equal(find_forward(module, name)(IDS, 3), module.part.net(IDS))


def test_forward_by_function_of_ids_or_of_module_and_ids() -> None:
    module = Plain()
    for function in (lambda ids: module.part.net(ids), of_module, module.part.net):
        assert torch.equal(find_forward(module, function)(IDS, 3), module.part.net(IDS))


def test_none_or_several_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="holds 0 transformers models.*Give `forward`"):
        find_forward(Plain(), None)
    with pytest.raises(ConfigError, match="holds 2 transformers models \\(0, 1\\).*Give `forward`"):
        find_forward(nn.ModuleList([tiny.llama(), tiny.gpt2()]), None)


def test_wrong_forward_is_named() -> None:
    with pytest.raises(ConfigError, match="`forward`='no.such' is neither a part of Plain"):
        find_forward(Plain(), "no.such")
    with pytest.raises(ConfigError, match="`forward`=3 is no function: got int"):
        find_forward(Plain(), 3)
    with pytest.raises(ConfigError, match="gave no logits but str"):
        find_forward(Plain(), lambda ids: "text")(IDS, 3)
