# SPDX-License-Identifier: Apache-2.0
"""`VeRALinear` as a layer: its equation, gradients, what it keeps, bits at the start and when off, shared matrices."""

from __future__ import annotations

import copy

import pytest
import torch
from peft.tuners.vera.model import _kaiming_init
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora.config import AdapterRecord, LoRAConfig, VeRAConfig
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.vera import Projections, VeRALinear
from tests.nn.layers import (
    LAYOUTS,
    check_equation,
    check_it_changes_no_bit,
    check_low_precision,
    make_base,
    relative,
)


def make(
    inn: int = 64, out: int = 48, *, bias: bool = True, conv1d: bool = False, quantize: str = "none",
    zero: bool = False, dropout: float = 0.0, r: int = 8,
) -> VeRALinear:  # fmt: skip
    """A layer in training, with random vectors unless ``zero``; it has a part of larger shared matrices."""
    record = AdapterRecord(VeRAConfig(r=r, vera_dropout=dropout))
    layer = VeRALinear(make_base(inn, out, bias, conv1d, quantize), record, Projections(r, 80, 70, 3, torch.float32))
    if not zero:
        for vector in trained(layer):
            nn.init.normal_(vector)
    return layer


def trained(layer: VeRALinear) -> list[nn.Parameter]:
    return [layer.adapter.vera_lambda_b, layer.adapter.vera_lambda_d]


def equation(layer: VeRALinear, x: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """The paper's formula, in the dtype of its arguments."""
    weight = layer.base_weight(torch.float32)
    weight = (weight.t() if layer.fan_in_fan_out else weight).to(x)
    y = x @ weight.t() + layer.strength * b * ((d * (x @ layer.vera_A.to(x).t())) @ layer.vera_B.to(x).t())
    return y if layer.bias is None else y + layer.bias.to(x)


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fresh_off_or_at_strength_zero_it_changes_no_bit(quantize: str, conv1d: bool, dtype: torch.dtype) -> None:
    layer = make(quantize=quantize, conv1d=conv1d, zero=True, dropout=0.5)
    check_it_changes_no_bit(layer, layer.adapter.vera_lambda_b, dtype)


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_output_and_gradients_are_the_papers(quantize: str, conv1d: bool, strength: float) -> None:
    layer = make(quantize=quantize, conv1d=conv1d, bias=not conv1d or quantize == "none")
    layer.strength = strength
    check_equation(layer, trained(layer), equation)


def test_under_autocast_and_in_bf16_it_is_near() -> None:
    layer = make()
    check_low_precision(layer, trained, equation)
    assert layer.bfloat16().vera_A.dtype == torch.float32


def test_of_the_activations_only_the_inner_ones_are_kept() -> None:
    def kept(layer: nn.Module, x: Tensor) -> int:
        own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.numel() > 2:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        del y
        return sum(sizes.values())

    x = torch.randn(4, 32, 64, requires_grad=True) * 1  # not a leaf: as between layers
    lora = LoRALinear(make_base(), AdapterRecord(LoRAConfig(r=8)), 8, 8.0)
    assert kept(make(), x) == 4 * 4 * 32 * 8
    assert kept(make(dropout=0.3), x) == 4 * 4 * 32 * 8
    assert kept(lora, x) == 4 * 4 * 32 * (8 + 64)


def test_dropout_drops_and_keeps_the_mean() -> None:
    layer = make(dropout=0.25)
    x = torch.randn(5, 64, requires_grad=True)
    torch.manual_seed(0)
    first = layer(x)
    found = torch.autograd.grad(first.sum(), x)[0]
    torch.manual_seed(0)
    second = layer(x)
    assert torch.equal(first, second)
    assert not torch.equal(first, layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    layer.train()
    mean = torch.stack([layer(x).detach() for _ in range(1000)]).mean(0)
    assert relative(mean, layer.eval()(x)) < 0.05
    layer.train()
    torch.manual_seed(0)
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), x)[0]
    assert torch.equal(found, again)


def test_second_derivatives() -> None:
    layer = make()
    x = torch.randn(6, 64, requires_grad=True)
    leaves = [t.detach().double().requires_grad_() for t in (x, *trained(layer))]
    found, want = (
        torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        for y, tensors in ((layer(x), [x, *trained(layer)]), (equation(layer, *leaves), leaves))
    )
    second = torch.autograd.grad(sum(t.square().sum() for t in found), [x, *trained(layer)])
    wanted = torch.autograd.grad(sum(t.square().sum() for t in want), leaves)
    assert all(relative(a, b) < 1e-4 for a, b in zip(second, wanted, strict=True))


def test_compiled_without_a_break() -> None:
    layer = make()
    x = torch.randn(4, 64)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert relative(compiled(x), layer(x)) < 1e-6
    found = torch.autograd.grad(compiled(x).sum(), trained(layer))
    want = torch.autograd.grad(layer(x).sum(), trained(layer))
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, want, strict=True))


def test_a_forward_recomputed_at_another_strength_is_refused() -> None:
    layer = make()
    y = checkpoint(layer, torch.randn(6, 64, requires_grad=True), use_reentrant=False)
    layer.strength = 0.5
    with pytest.raises(UnsupportedError, match="ran a forward again"):
        y.sum().backward()


def test_hooks_and_a_base_of_its_own_way() -> None:
    layer = make()
    x = torch.randn(6, 64)
    want = layer(x)
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert relative(layer(x), want) < 1e-6
    assert torch.equal(seen[0], torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("key", [0, 5])
def test_the_shared_matrices_are_pefts_and_in_memory_once(key: int) -> None:
    generator = torch.Generator("cpu").manual_seed(key)
    want = [_kaiming_init(shape, generator) for shape in ((8, 64), (48, 8))]
    shared = Projections(8, 64, 48, key, torch.float32)
    assert torch.equal(shared.vera_A, want[0])
    assert torch.equal(shared.vera_B, want[1])
    record = AdapterRecord(VeRAConfig(r=8))
    model = nn.Sequential(*(VeRALinear(make_base(inn, 48), record, shared) for inn in (64, 40)))
    for module in (model, copy.deepcopy(model), copy.deepcopy(model).bfloat16()):
        first, second = (layer.vera_B for layer in module)
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert first.dtype == torch.float32
    assert not [name for name in model.state_dict() if "vera_A" in name or "vera_B" in name]
    assert [len(layer.trained_names()) for layer in model] == [4, 2]
    assert "A=(8, 64), B=(48, 8)" in repr(model)
    record.config = VeRAConfig(r=8, save_projection=False)
    assert [len(layer.trained_names()) for layer in model] == [2, 2]


def test_a_base_without_values_is_refused() -> None:
    shared = Projections(4, 8, 8, 0, torch.float32)
    with pytest.raises(UnsupportedError, match="VeRA over a base on the meta device"):
        VeRALinear(nn.Linear(8, 8, device="meta"), AdapterRecord(VeRAConfig(r=4)), shared)
