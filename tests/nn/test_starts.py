# SPDX-License-Identifier: Apache-2.0
"""PiSSA, OLoRA and LoftQ as starts of one layer: against PEFT's own, and what they leave of the base."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.nn.starts import start_of, top_singular, top_singular_randomized
from tests.nn.layers import relative


def weight_of(out: int = 48, inn: int = 64) -> Tensor:
    """A matrix with six large singular values, apart from the others."""
    U, _, V = torch.linalg.svd(torch.randn(out, inn), full_matrices=False)
    return U * torch.cat([torch.linspace(4.0, 2.5, 6), torch.linspace(1.0, 0.2, min(out, inn) - 6)]) @ V


def peft_layer(init: str, weight: Tensor, r: int, alpha: float, rslora: bool, conv1d: bool) -> tuple[Tensor, ...]:
    """A, B, what is left of the base, and PEFT's scale."""
    out, inn = weight.shape
    layer = Conv1D(out, inn) if conv1d else nn.Linear(inn, out, bias=False)
    layer.weight.data = (weight.t() if conv1d else weight).clone().contiguous()
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, use_rslora=rslora)
    model = get_peft_model(nn.Sequential(layer), config)
    peft = model.base_model.model[0]
    left = peft.base_layer.weight.detach()
    A, B = (factor["default"].weight.detach() for factor in (peft.lora_A, peft.lora_B))
    return A, B, left.t() if conv1d else left, peft.scaling["default"]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_20", "olora"])
@pytest.mark.parametrize(("out", "inn"), [(48, 64), (64, 48)])
@pytest.mark.parametrize(("rslora", "conv1d"), [(False, False), (True, True)])
def test_pissa_and_olora_begin_where_pefts_do(init: str, out: int, inn: int, rslora: bool, conv1d: bool) -> None:
    weight = weight_of(out, inn)
    conv1d = conv1d and init != "olora"  # there PEFT takes the decomposition of the wrong side
    A, B, left, scale = peft_layer(init, weight, 6, 9.0, rslora, conv1d)
    start = start_of(init, weight, 6, scale)
    assert relative(scale * start.B @ start.A, scale * B @ A) < 1e-5
    assert relative(start.residual, left) < 1e-5
    signs = (start.A * A).sum(1, keepdim=True).sign()  # a pair may be turned around as one
    assert relative(signs * start.A, A) < 2e-3
    assert relative(start.B * signs.t(), B) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_residual_and_start_are_the_base_again(init: str, dtype: torch.dtype) -> None:
    weight = weight_of()
    start = start_of(init, weight, 5, 2.0, dtype)
    assert start.A.dtype == start.B.dtype == dtype
    assert relative(start.residual + 2.0 * start.B.float() @ start.A.float(), weight) < 1e-6


@pytest.mark.parametrize("iterations", [1, 3])
def test_loftq_begins_where_pefts_own_does(iterations: int) -> None:
    # PEFT's keeps its 4-bit codes on an accelerator; the same alternation by its own low-rank step and our packing.
    from peft.utils.loftq_utils import _low_rank_decomposition

    weight = weight_of(64, 128)

    def packed(matrix: Tensor) -> Tensor:
        return PackedWeight(matrix, "nf4").dequantize(torch.float32)

    residual = weight
    for _ in range(iterations):
        base = packed(residual)
        found = _low_rank_decomposition(weight - base, 8)
        residual = weight - found["L"] @ found["R"]
    start = start_of("loftq", weight, 8, 1.0, packed=packed, iterations=iterations)
    assert relative(start.B @ start.A, found["L"] @ found["R"]) < 1e-4
    assert relative(packed(start.residual), base) < 1e-3  # single codes may fall the other way


@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "fp4", "int8"])
def test_loftq_and_pissa_lower_the_error_of_packing_and_more_rounds_do_not_raise_it(quantize: str) -> None:
    weight = weight_of(128, 128)

    def packed(matrix: Tensor) -> Tensor:
        return PackedWeight(matrix, quantize).dequantize(torch.float32)

    def error(init: str, iterations: int = 1) -> float:
        start = start_of(init, weight, 16, 2.0, packed=packed, iterations=iterations)
        return float((weight - packed(start.residual) - 2.0 * start.B @ start.A).norm())

    plain = float((weight - packed(weight)).norm())
    assert error("loftq", 5) < error("loftq") < plain
    assert error("pissa") < plain


def test_the_randomized_decomposition_is_near_the_exact_one_and_leaves_the_random_state() -> None:
    for shape in ((40, 90), (90, 40)):
        matrix = weight_of(*shape)
        state = torch.get_rng_state()
        U, S, V = top_singular_randomized(matrix, 4, 16)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(top_singular_randomized(matrix, 4, 16)[0], U)
        exact = top_singular(matrix, 4)
        torch.testing.assert_close(S.double(), exact[1], rtol=1e-3, atol=0)
        torch.testing.assert_close(S, torch.linalg.svdvals(matrix)[:4], rtol=1e-3, atol=0)
        assert relative(U * S @ V.t(), exact[0] * exact[1] @ exact[2].t()) < 0.1


def test_what_gives_no_start_is_named() -> None:
    with pytest.raises(ConfigError, match=r"`r` is 60, and a layer of \(48, 64\) has no more than 48 directions"):
        start_of("pissa", weight_of(), 60, 1.0)
    with pytest.raises(UnsupportedError, match="no values on the meta device"):
        start_of("olora", torch.empty(4, 4, device="meta"), 2, 1.0)
    with pytest.raises(UnsupportedError, match="has rank 0, below the 2 that is asked for"):
        start_of("pissa", torch.zeros(8, 8), 2, 1.0)
    with pytest.raises(UnsupportedError, match="has rank 1, below the 2"):
        start_of("olora", torch.ones(8, 8), 2, 1.0)
    with pytest.raises(ConfigError, match="needs a packed base"):
        start_of("loftq", weight_of(), 2, 1.0)
