# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear` as a module: zero update, switches, layouts, dtypes, and bases that compute in their own way."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.nn.linear import LoRALinear
from tests.nn.layers import BASES, LAYOUTS, check_off_it_is_the_base, make_base, make_layer, relative


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fresh_adapter_changes_no_bit(quantize: str, conv1d: bool, dtype: torch.dtype) -> None:
    layer = make_layer(64, 48, quantize=quantize, conv1d=conv1d, zero=True).to(dtype)
    x = torch.randn(3, 7, 64).to(dtype)
    assert layer.untrained()
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_switched_off_or_at_strength_zero_it_is_the_base(quantize: str, conv1d: bool, dtype: torch.dtype) -> None:
    layer = make_layer(64, 48, quantize=quantize, conv1d=conv1d, lora_dropout=0.5).to(dtype)
    check_off_it_is_the_base(layer, torch.randn(3, 7, 64).to(dtype))


@pytest.mark.parametrize(("quantize", "conv1d"), LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_base_weight_and_delta_weight_lie_as_the_base_layer_stores_them(
    quantize: str, conv1d: bool, strength: float
) -> None:
    layer = make_layer(64, 48, quantize=quantize, conv1d=conv1d, bias=conv1d, lora_alpha=12.0)
    layer.strength = strength
    shape = (64, 48) if conv1d else (48, 64)
    assert layer.base_weight().shape == layer.delta_weight().shape == layer.weight.shape == shape
    assert layer.delta_weight().dtype == torch.float32
    assert layer.delta_weight(torch.bfloat16).dtype == torch.bfloat16
    assert not layer.base_weight().requires_grad
    assert not layer.delta_weight().requires_grad
    x = torch.randn(5, 64)
    merged = layer.base_weight() + layer.delta_weight()
    y = x @ (merged if conv1d else merged.t()) + (0 if layer.bias is None else layer.bias)
    assert relative(layer(x), y) < 1e-6


def test_base_weight_has_the_dtype_that_it_had_or_the_one_asked_for() -> None:
    for quantize in BASES:
        base = make_base().to(torch.bfloat16)
        layer = make_layer(quantize=quantize)
        if quantize == "none":
            layer.base_layer = base
        assert layer.base_weight(torch.float64).dtype == torch.float64
        assert layer.base_weight().dtype == (torch.bfloat16 if quantize == "none" else torch.float32)


def test_scaling_is_alpha_over_r_or_over_its_root() -> None:
    assert make_layer(r=4, lora_alpha=8.0).scaling == 2.0
    assert make_layer(r=4, lora_alpha=8.0, use_rslora=True).scaling == 4.0


def test_start_of_the_factors() -> None:
    torch.manual_seed(0)
    kaiming = make_layer(400, 100, r=50, zero=True)
    assert kaiming.lora_A.abs().max() <= 1 / math.sqrt(400)
    assert abs(float(kaiming.lora_A.std()) * math.sqrt(3 * 400) - 1) < 0.02
    gaussian = make_layer(400, 100, r=50, zero=True, init_lora_weights="gaussian")
    assert abs(float(gaussian.lora_A.std()) * 50 - 1) < 0.02
    for layer in (kaiming, gaussian):
        assert layer.lora_A.shape == (50, 400)
        assert layer.lora_B.shape == (100, 50)
        assert not layer.lora_B.any()


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_master_adapters_keep_their_dtype_whatever_the_model_is_cast_to(name: str, dtype: torch.dtype) -> None:
    layer = make_layer(adapter_dtype=name)
    A = layer.lora_A.detach().clone()
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float):
        cast(layer)
        assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
        assert torch.equal(layer.lora_A, A)
    layer.to(torch.bfloat16)
    assert layer.base_layer.weight.dtype == torch.bfloat16
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert layer.lora_A.grad.dtype == dtype
    layer.to(torch.device("meta"))
    assert layer.lora_A.is_meta
    assert layer.lora_A.dtype == dtype


def test_copies_and_pickles_compute_the_same_and_share_one_record() -> None:
    x = torch.randn(2, 64)
    for quantize in BASES:
        layer = make_layer(quantize=quantize)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), layer(x))
        pair = copy.deepcopy(nn.ModuleList([layer, layer]))
        assert pair[0].record is pair[1].record


@pytest.mark.parametrize("conv1d", [False, True])
def test_activations_of_another_dtype_are_refused_as_torch_refuses_them(conv1d: bool) -> None:
    layer = make_layer(conv1d=conv1d)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(2, 64, dtype=torch.bfloat16))


def test_compute_dtype_of_a_packed_base_is_taken_where_it_is_narrower() -> None:
    layer = make_layer(quantize="nf4")
    x = torch.randn(4, 64, requires_grad=True)
    full = layer(x)
    layer.base_layer.compute_dtype = torch.bfloat16
    narrow = layer(x)
    assert narrow.dtype == torch.float32
    assert 1e-4 < relative(narrow, full) < 2e-2
    assert torch.equal(narrow, layer(x.bfloat16()).float())
    layer.base_layer.compute_dtype = torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(layer(x.bfloat16()).float(), narrow)


class Doubling(nn.Linear):
    """A linear layer that does more than multiply."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _on(base: nn.Module) -> LoRALinear:
    base.requires_grad_(False)
    layer = LoRALinear(base, AdapterRecord(LoRAConfig(r=4, lora_alpha=8.0)), 4, 8.0)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def test_a_base_with_a_forward_of_its_own_runs_it() -> None:
    layer = _on(Doubling(64, 48))
    x = torch.randn(3, 64, requires_grad=True)
    delta = layer.delta_weight()
    y = layer(x)
    y.sum().backward()
    assert relative(y, layer.base_layer(x) + x @ delta.t()) < 1e-6
    assert relative(x.grad, (2 * layer.weight + delta).sum(0).expand(3, 64)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


def test_hooks_on_the_base_are_called_and_see_its_output() -> None:
    base = nn.Linear(64, 48)
    seen: list[Tensor] = []
    base.register_forward_hook(lambda module, args, out: seen.append(out))
    layer = _on(base)
    x = torch.randn(3, 64)
    y = layer(x)
    assert relative(y, seen[0] + x @ layer.delta_weight().t()) < 1e-6


def test_a_base_whose_weight_is_trained_gets_its_gradient() -> None:
    layer = make_layer()
    layer.base_layer.requires_grad_(True)
    x = torch.randn(3, 64)
    layer(x).sum().backward()
    assert relative(layer.base_layer.weight.grad, x.sum(0).expand(48, 64)) < 1e-6


def test_what_is_printed() -> None:
    text = str(make_layer(64, 48, quantize="nf4"))
    assert "r=4, lora_alpha=8.0, scaling=2" in text
    assert "A=(4, 64), B=(48, 4), torch.float32" in text
    assert "in_features=64, out_features=48" in text
    assert "nf4, shape=(48, 64)" in text
