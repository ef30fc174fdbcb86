# SPDX-License-Identifier: Apache-2.0
"""What the function asks for and what it is handed: the weight, once each way, and gradients of any layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.nn.functional import lora_linear
from tests.nn.layers import BASES, grads_of, make_layer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("needs_input", [True, False])
def test_the_weight_is_asked_for_once_each_way(dropout: float, needs_input: bool) -> None:
    """A packed weight is dequantized in the forward, and in the backward only for the gradient of the input."""
    W, asked = torch.randn(48, 64), []

    def weight(dtype: torch.dtype) -> Tensor:
        asked.append(dtype)
        return W.to(dtype)

    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=needs_input)
    y = lora_linear(x, weight, None, A, B, 0.5, dropout)
    assert asked == [torch.bfloat16]
    y.sum().backward()
    assert asked == [torch.bfloat16] * (2 if needs_input else 1)


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_gradients_of_the_output_of_any_layout(quantize: str, layout: str) -> None:
    layer = make_layer(quantize=quantize)
    x = torch.randn(3, 5, 64, requires_grad=True)
    upstream = {
        "expanded": torch.randn(48).expand(3, 5, 48),  # as `sum` and `mean` give it
        "transposed": torch.randn(48, 5, 3).movedim(0, -1).transpose(0, 1),
        "strided": torch.randn(3, 5, 96)[..., ::2],
    }[layout]
    assert not upstream.is_contiguous()
    found = []
    for gradient in (upstream, upstream.contiguous()):
        x.grad = None
        layer(x).backward(gradient)
        found.append([x.grad.clone(), *grads_of(layer)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_read_one_tensor_keep_it_once(dropout: float) -> None:
    layers = nn.ModuleList(make_layer(r=4, lora_dropout=dropout) for _ in range(3))
    x = torch.randn(32, 64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = [layer(x) for layer in layers]
    assert all(y.requires_grad for y in outputs)
    own = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    wide = [size for address, size in kept.items() if address not in own and size >= 32 * 64 * 4]
    assert wide == [32 * 64 * 4]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_empty_batch_has_gradients_of_zero(quantize: str) -> None:
    layer = make_layer(quantize=quantize, lora_dropout=0.3)
    x = torch.randn(0, 5, 64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, 5, 64)
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads_of(layer))
