# SPDX-License-Identifier: Apache-2.0
"""`DoRALinear` as a layer: its equation, gradients, bits at the start and when off, dtypes, compiled, derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.dora import MAGNITUDE, DoRALinear
from tests.nn.layers import LAYOUTS, check_equation, check_off_it_is_the_base, make_base, relative

SHAPES = [(64, 48), (64, 64)]  # the output kept for backward, and made anew


def make(
    inn: int = 64, out: int = 48, *, bias: bool = True, conv1d: bool = False, quantize: str = "none",
    zero: bool = False, dropout: float = 0.0,
) -> DoRALinear:  # fmt: skip
    """A layer in training, with a random update and magnitudes unless ``zero``."""
    config = LoRAConfig(r=4, lora_alpha=8.0, use_dora=True, lora_dropout=dropout)
    layer = DoRALinear(make_base(inn, out, bias, conv1d, quantize), AdapterRecord(config), 4, 8.0)
    if not zero:
        nn.init.normal_(layer.lora_B, std=0.3)
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(torch.empty(out).uniform_(0.6, 1.3) * torch.randn(out).sign())
    return layer


def trained(layer: DoRALinear) -> list[nn.Parameter]:
    return [layer.lora_A, layer.lora_B, layer.lora_magnitude_vector]


def equation(layer: DoRALinear, x: Tensor, A: Tensor, B: Tensor, m: Tensor, base: Tensor | None = None) -> Tensor:
    """The paper's formula, the norm a constant, in the dtype of its arguments."""
    weight = layer.base_weight(torch.float32) if base is None else base
    weight = (weight.t() if layer.fan_in_fan_out else weight).to(x)
    start = weight.norm(dim=1)
    direction = weight + layer.strength * layer.scaling * B @ A
    m = start + layer.strength * (m - start)
    y = x @ (direction * (m / direction.detach().norm(dim=1)).unsqueeze(1)).t()
    return y if layer.bias is None else y + layer.bias.to(x)


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_changes_no_bit(quantize: str, conv1d: bool, dtype: torch.dtype) -> None:
    for inn, out in SHAPES:
        layer = make(inn, out, quantize=quantize, conv1d=conv1d, zero=True, dropout=0.5).to(dtype)
        x = torch.randn(3, 7, inn).to(dtype)
        assert layer.untrained()
        assert torch.equal(layer(x), layer.base_layer(x))  # with dropout
        assert torch.equal(layer.eval()(x), layer.base_layer(x))


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_or_at_strength_zero_it_is_the_base(quantize: str, conv1d: bool, dtype: torch.dtype) -> None:
    layer = make(quantize=quantize, conv1d=conv1d).to(dtype)
    check_off_it_is_the_base(layer, torch.randn(3, 7, 64).to(dtype))


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_and_gradients_are_the_papers(quantize: str, conv1d: bool, strength: float) -> None:
    for (inn, out), bias in zip(SHAPES * 2, (True, True, conv1d, conv1d), strict=True):
        layer = make(inn, out, quantize=quantize, conv1d=conv1d, bias=bias)
        layer.strength = strength
        check_equation(layer, trained(layer), equation)


@pytest.mark.parametrize(("inn", "out"), SHAPES)
def test_under_autocast_and_in_bf16_it_is_near(inn: int, out: int) -> None:
    layer = make(inn, out)
    x = torch.randn(64, inn)
    leaves = [t.detach().double().requires_grad_() for t in (x, *trained(layer))]
    g = torch.randn(64, out)
    wants = torch.autograd.grad(equation(layer, *leaves), leaves[1:], g.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    for module, value in ((layer, y), (low := copy.deepcopy(layer).bfloat16(), low(x.bfloat16()))):
        founds = torch.autograd.grad(value, trained(module), g.bfloat16())
        assert relative(value, equation(layer, *leaves)) < 1e-2
        assert {t.dtype for t in (*founds, *trained(module))} == {torch.float32}
        assert all(relative(found, want) < 2e-2 for found, want in zip(founds, wants, strict=True))


def test_dropout_is_pefts() -> None:
    layer = make(dropout=0.4)
    x = torch.randn(5, 64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.4)
    direction = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    c = (layer.lora_magnitude_vector / direction.norm(dim=1)).detach()
    low = layer.scaling * dropped @ layer.lora_A.t() @ layer.lora_B.t()
    assert relative(y, layer.base_layer(x) + (c - 1) * (dropped @ layer.weight.t()) + c * low) < 1e-6
    found = torch.autograd.grad(y.sum(), trained(layer))
    assert all(bool(gradient.any()) for gradient in found)


@pytest.mark.parametrize(("inn", "out"), SHAPES)
def test_compiled_without_a_break_and_for_a_new_strength_without_compiling_anew(inn: int, out: int) -> None:
    layer = make(inn, out)
    x = torch.randn(4, inn)
    torch.compiler.reset()
    count = CompileCounter()
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for strength in (0.5, 1.0):
        layer.strength = strength
        assert relative(compiled(x), layer(x)) < 1e-6
    found = torch.autograd.grad(compiled(x).sum(), trained(layer))
    want = torch.autograd.grad(layer(x).sum(), trained(layer))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, want, strict=True))
    frames = count.frame_count
    layer.strength = 0.0
    assert relative(compiled(x), layer.base_layer(x)) < 1e-6
    assert frames <= 2


@pytest.mark.parametrize(("inn", "out"), SHAPES)
def test_second_derivatives(inn: int, out: int) -> None:
    layer = make(inn, out)
    x = torch.randn(6, inn, requires_grad=True)
    leaves = [t.detach().double().requires_grad_() for t in (x, *trained(layer))]
    found, want = (
        torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        for y, tensors in ((layer(x), [x, *trained(layer)]), (equation(layer, *leaves), leaves))
    )
    # The norm has no gradient by definition, and in the second derivative neither.
    second = torch.autograd.grad(sum(t.square().sum() for t in found), [x, layer.lora_magnitude_vector])
    wanted = torch.autograd.grad(sum(t.square().sum() for t in want), [leaves[0], leaves[3]])
    assert all(relative(a, b) < 1e-4 for a, b in zip(second, wanted, strict=True))


def test_checkpointed_activations_give_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    for inn, out in SHAPES:
        layer = make(inn, out)
        x = torch.randn(6, inn, requires_grad=True)
        plain = torch.autograd.grad(layer(x).square().sum(), [x, *trained(layer)])
        again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), [x, *trained(layer)])
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_an_output_that_is_overwritten_is_named() -> None:
    y = make(64, 48)(torch.randn(6, 64))
    loss = torch.relu_(y).sum()
    with pytest.raises(UnsupportedError, match=r"was changed in place.*inplace=False"):
        loss.backward()
    y = make(64, 64)(torch.randn(6, 64))
    torch.relu_(y).sum().backward()  # made anew there


def test_a_row_of_zeros_in_the_base_begins_and_trains() -> None:
    base = make_base(64, 48)
    base.weight[3] = 0
    layer = DoRALinear(base, AdapterRecord(LoRAConfig(use_dora=True)), 4, 8.0)
    x = torch.randn(6, 64)
    assert torch.equal(layer(x), base(x))
    layer(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in trained(layer))


def test_hooks_and_a_base_of_its_own_way() -> None:
    layer = make()
    x = torch.randn(6, 64)
    want = layer(x)
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    assert relative(layer(x), want) < 1e-6
    assert torch.equal(seen[0], torch.nn.functional.linear(x, layer.weight, layer.bias))


def test_master_magnitudes_keep_their_dtype_and_copies_their_values() -> None:
    layer = make().half()
    assert layer.lora_magnitude_vector.dtype == layer.adapter.base_norm.dtype == torch.float32
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.lora_magnitude_vector, layer.lora_magnitude_vector)
    assert MAGNITUDE in layer.trained_names()
    assert "adapter.base_norm" not in layer.state_dict()
    assert "m=(48,)" in repr(layer)


def test_parts_are_exchanged_with_their_magnitudes() -> None:
    layer = make()
    x = torch.randn(6, 64)
    first, own = layer(x), layer.held().detached()
    empty = layer.exchange(None, [])
    assert layer.vacant
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(empty.tensors[MAGNITUDE], own.tensors[MAGNITUDE])
    layer.exchange(empty, [])
    assert torch.equal(layer(x), first)


def test_a_base_without_values_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="have no values on the meta device"):
        DoRALinear(nn.Linear(8, 8, device="meta"), AdapterRecord(LoRAConfig(use_dora=True)), 4, 8.0)
