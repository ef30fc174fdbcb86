# SPDX-License-Identifier: Apache-2.0
"""`ResidualLoRALinear` as a layer: the base when off, its equation, strengths, merged weights, other starts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_lora.config import AdapterRecord, LoRAConfig, scaling
from lightning_lora.errors import AdapterMismatchError, Notice, UnsupportedError
from lightning_lora.nn.adapter import Held
from lightning_lora.nn.quantized import PackedLinear, PackedWeight
from lightning_lora.nn.residual import START_A, START_B, ResidualLoRALinear, residual_base
from tests.nn.layers import make_base, relative

CASES = [("pissa", "none"), ("olora", "none"), ("pissa", "nf4"), ("olora", "int8"), ("loftq", "nf4-dq")]


def make(
    init: str = "pissa", quantize: str = "none", *, conv1d: bool = False, zero: bool = False, **config: Any
) -> tuple[nn.Module, ResidualLoRALinear]:
    """The user's layer as it was, and the adapted one; with a random update unless ``zero``."""
    base = make_base(64, 48, conv1d=conv1d)
    words = LoRAConfig(r=4, lora_alpha=6.0, init_lora_weights=init, quantize=quantize, **config)
    before = copy.deepcopy(base)
    left, start = residual_base(base, words, 4, scaling(4, 6.0, words.use_rslora))
    layer = ResidualLoRALinear(left.requires_grad_(False), AdapterRecord(words), 4, 6.0, start)
    if not zero:
        with torch.no_grad():
            layer.lora_A.add_(0.1 * torch.randn(4, 64))
            layer.lora_B.add_(0.1 * torch.randn(48, 4))
    return before, layer


def of_base(layer: ResidualLoRALinear, before: nn.Module) -> Tensor:
    """The base that the layer stands for ``(out, in)``, in float64: the user's, or what packing made of it."""
    A0, B0 = (factor.double() for factor in layer.start)
    if isinstance(layer.base_layer, PackedLinear):
        return layer.base_layer.matrix(torch.float32).double() + layer.scaling * B0 @ A0
    weight = before.weight.detach().double()
    return weight.t() if layer.fan_in_fan_out else weight


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("init", "quantize"), CASES)
def test_at_the_start_and_switched_off_it_is_the_base(init: str, quantize: str, conv1d: bool) -> None:
    before, layer = make(init, quantize, conv1d=conv1d, zero=True)
    assert layer.untrained()
    x = torch.randn(3, 7, 64)
    want = x.double() @ of_base(layer, before).t() + layer.bias.double()
    assert relative(layer(x), want) < 1e-5
    _, layer = before, make(init, quantize, conv1d=conv1d)[1]
    before, layer = make(init, quantize, conv1d=conv1d)
    assert not layer.untrained()
    want = x.double() @ of_base(layer, before).t() + layer.bias.double()
    assert relative(layer(x), want) > 1e-2
    assert relative(layer.base_output(x), want) < 1e-5
    layer.enabled = False
    assert relative(layer(x), want) < 1e-5
    layer.enabled, layer.strength = True, 0.0
    assert relative(layer(x), want) < 1e-5
    if quantize == "none":
        assert relative(layer(x), before(x)) < 1e-5


@pytest.mark.parametrize("strength", [1.0, 0.4, -0.5])
@pytest.mark.parametrize(("init", "quantize"), CASES)
def test_output_and_gradients_are_those_of_the_equation(init: str, quantize: str, strength: float) -> None:
    before, layer = make(init, quantize, use_rslora=True)
    layer.strength = strength
    assert layer.scaling == 3.0
    W, (A0, B0) = of_base(layer, before), (factor.double() for factor in layer.start)
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    x = torch.randn(2, 9, 64)
    wide, own = x.double().requires_grad_(), x.clone().requires_grad_()
    want = wide @ (W + strength * 3.0 * (B @ A - B0 @ A0)).t() + layer.bias.double()
    got = layer(own)
    assert relative(got, want) < 1e-5
    g = torch.randn_like(got)
    wanted = torch.autograd.grad(want, [wide, A, B], g.double())
    for mine, theirs in zip(torch.autograd.grad(got, [own, layer.lora_A, layer.lora_B], g), wanted, strict=True):
        assert relative(mine, theirs) < 1e-5


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize(("init", "quantize"), CASES)
def test_weights_and_factors_say_what_is_computed(init: str, quantize: str, conv1d: bool) -> None:
    before, layer = make(init, quantize, conv1d=conv1d)
    base, x = of_base(layer, before), torch.randn(5, 64)

    def turned(weight: Tensor) -> Tensor:
        return weight.t() if conv1d else weight

    for strength in (1.0, 0.3, 0.0):
        layer.strength = strength
        merged = turned(layer.merged_weight(torch.float32))
        assert relative(x @ merged.t() + layer.bias, layer(x)) < 1e-5
        assert relative(turned(layer.base_weight(torch.float32)), base) < 1e-5
        assert relative(merged, base + turned(layer.delta_weight())) < 1e-5
    layer.strength = 0.3
    A, B = layer.update_factors()
    assert (layer.update_rank, tuple(A.shape), tuple(B.shape)) == (8, (8, 64), (48, 8))
    assert scaling(8, layer.update_alpha, layer.use_rslora) == pytest.approx(layer.scaling, rel=1e-12)
    assert relative(0.3 * layer.scaling * B @ A, turned(layer.delta_weight())) < 1e-6
    assert relative(turned(layer.base_weight(torch.bfloat16)), base) < 4e-3


def test_a_weight_that_is_tied_to_another_module_stays_there() -> None:
    base = make_base(64, 48)
    tied, values = base.weight, base.weight.clone()
    left, start = residual_base(base, LoRAConfig(init_lora_weights="pissa"), 4, 1.0)
    assert torch.equal(tied, values)
    assert not torch.equal(left.weight, values)
    assert relative(left.weight + start.B @ start.A, values) < 1e-6


def test_compiled_code_computes_the_same_and_another_strength_compiles_once() -> None:
    torch._dynamo.reset()
    before, layer = make()
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 64)
    assert relative(compiled(x), layer(x)) < 1e-6
    counts = []
    for strength in (0.3, 0.7, 0.0, 2.0):
        layer.strength = strength
        assert relative(compiled(x), layer(x)) < 1e-5
        counts.append(counter.frame_count)
    assert counts == [2] * 4
    layer.enabled = False
    assert relative(compiled(x), before(x)) < 1e-5


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_start_of_another_run_makes_the_dense_base_anew(init: str) -> None:
    before, layer = make(init)
    A0, B0 = layer.start
    turn = torch.linalg.qr(torch.randn(4, 4))[0]
    values = {START_A: turn @ A0 * 1.1, START_B: B0 @ turn.t()}
    assert layer.restoring({START_A: A0.clone(), START_B: B0.clone()}) is None
    action = layer.restoring(values)
    assert action is not None
    with torch.no_grad():
        action()
        A0.copy_(values[START_A])
        B0.copy_(values[START_B])
    x = torch.randn(5, 64)
    assert relative(layer.base_output(x), before(x)) < 1e-5


def test_the_start_of_another_run_is_refused_over_a_packed_base_unless_rounding_explains_it() -> None:
    _, layer = make("pissa", "nf4")
    A0, B0 = layer.start
    with pytest.warns(Notice, match="the packed base is the same but for single codes"):
        assert layer.restoring({START_A: -A0, START_B: -B0 * (1 + 1e-7)}) is None
    with pytest.raises(AdapterMismatchError, match="the start of 'pissa' comes out by 1.0e-03 .* another here"):
        layer.restoring({START_A: A0, START_B: B0 * 1.001})


def test_no_other_adapter_takes_its_place() -> None:
    _, layer = make()
    with pytest.raises(UnsupportedError, match="others do not fit what is left of the base"):
        layer.hold(None)
    with pytest.raises(UnsupportedError, match="others do not fit what is left of the base"):
        layer.exchange(Held({"adapter.lora_A": torch.zeros(2, 64), "adapter.lora_B": torch.zeros(48, 2)}), [])


def test_layers_that_nothing_can_be_taken_from_are_refused() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    config = LoRAConfig(init_lora_weights="pissa")
    for layer in (Own(8, 8), PackedLinear(PackedWeight(torch.randn(8, 64), "nf4"), None)):
        with pytest.raises(UnsupportedError, match="is packed already, or has a forward or hooks of its own"):
            residual_base(layer.requires_grad_(False), config, 2, 1.0)
