# SPDX-License-Identifier: Apache-2.0
"""The chunked loss is the plain one, in value and gradient, and never holds more logits than a chunk's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora.causal_lm.encoding import IGNORED
from lightning_lora.causal_lm.loss import check_head, chunked_loss, head_of, next_token_loss
from lightning_lora.errors import UnsupportedError
from tests.causal_lm.test_packing import tiny


def labels_of(rows: int, tokens: int, words: int, share: float = 0.5) -> Tensor:
    labels = torch.randint(words, (rows, tokens))
    return labels.masked_fill(torch.rand(rows, tokens) > share, IGNORED)


@given(st.integers(1, 3), st.integers(2, 9), st.integers(1, 12), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_value_and_gradients_are_those_of_the_plain_loss(
    rows: int, tokens: int, chunk: int, share: float, trained: bool
) -> None:
    torch.manual_seed(rows * tokens)
    head = nn.Linear(5, 11).double().requires_grad_(trained)
    labels = labels_of(rows, tokens, 11, share)
    results = []
    for chunked in (False, True):
        hidden = torch.randn(rows, tokens, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1))
        hidden.requires_grad_(True)
        head.zero_grad()
        parameters = [p for p in head.parameters() if p.requires_grad]
        loss = (
            chunked_loss(hidden, labels, head, parameters, chunk) if chunked else next_token_loss(head(hidden), labels)
        )
        (2 * loss).backward()
        results.append([loss, hidden.grad, *(p.grad for p in parameters)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, check_dtype=False, rtol=1e-5, atol=1e-6)


class Watched(nn.Linear):
    most = 0

    def forward(self, input: Tensor) -> Tensor:
        self.most = max(self.most, input.shape[:-1].numel())
        return super().forward(input)


def test_no_more_logits_than_a_chunks() -> None:
    head = Watched(4, 7)
    chunked_loss(torch.randn(4, 50, 4, requires_grad=True), labels_of(4, 50, 7), head, chunk=8).backward()
    assert head.most == 8


def test_without_gradients_and_twice() -> None:
    head, labels = nn.Linear(4, 7), labels_of(2, 8, 7)
    hidden = torch.randn(2, 8, 4, requires_grad=True)
    with torch.no_grad():
        value = chunked_loss(hidden, labels, head)
    assert not value.requires_grad
    torch.testing.assert_close(value, next_token_loss(head(hidden), labels).detach())
    loss = (3 * hidden.sum()) * chunked_loss(hidden, labels, head)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_trained_head_under_autocast() -> None:
    torch.manual_seed(0)
    head, labels, hidden = nn.Linear(16, 32), labels_of(2, 20, 32), torch.randn(2, 20, 16)
    grads = []
    for chunked in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (
                chunked_loss(hidden, labels, head, list(head.parameters()), 7)
                if chunked
                else next_token_loss(head(hidden), labels)
            )
        loss.backward()
        grads.append(head.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=0.02, atol=2e-3)


HEADS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "llama, tied": {"tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_families(name: str) -> None:
    model: Any = tiny(name.split(",")[0], **HEADS[name])
    ids = torch.randint(64, (2, 9))
    hidden = model.base_model(input_ids=ids)[0]
    logits = model(input_ids=ids).logits
    check_head(model, head_of(model), hidden, logits[:, -1:])
    labels = labels_of(2, 9, 64)
    torch.testing.assert_close(chunked_loss(hidden, labels, head_of(model)), next_token_loss(logits, labels))


def test_family_whose_logits_are_not_known_is_refused() -> None:
    model: Any = tiny("llama")
    ids = torch.randint(64, (2, 9))
    with pytest.raises(UnsupportedError, match=r'LlamaForCausalLM does something.*`loss="plain"`'):
        check_head(model, head_of(model), model.base_model(input_ids=ids)[0], 2 * model(input_ids=ids).logits[:, -1:])
