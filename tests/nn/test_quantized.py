# SPDX-License-Identifier: Apache-2.0
"""Packed weights: codes and values of bitsandbytes, through its kernels and through plain torch."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora.errors import QuantizationError
from lightning_lora.nn.quantized import (
    FP4,
    NF4,
    PIECE,
    PackedLinear,
    PackedWeight,
    dequantize_4bit_reference,
    quantize_4bit_reference,
)
from tests.nn.layers import BASES, make_base, relative

KINDS = ("nf4", "nf4-dq", "fp4", "int8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

sizes = st.one_of(st.integers(1, 130), st.sampled_from([64, 128, 192, 320]))


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices of any shape, dtype and size of values, some with whole blocks at zero."""
    rows, columns = draw(st.integers(1, 20)), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-3, 3))
    flat = weight.view(-1)
    if draw(st.booleans()):
        flat[: min(len(flat), 64 * draw(st.integers(1, 3)))] = 0.0
    return weight.to(draw(st.sampled_from(DTYPES)))


@settings(max_examples=60)
@given(weight=weights(), kind=st.sampled_from(["nf4", "fp4"]))
def test_4bit_codes_are_those_of_bitsandbytes_by_torch_alone_too(weight: Tensor, kind: str) -> None:
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=False)
    packed = PackedWeight(weight, kind)
    for own_codes, own_absmax in (quantize_4bit_reference(weight, kind), (packed.codes, packed.absmax)):
        assert torch.equal(own_codes, codes.view(-1))
        assert torch.equal(own_absmax, state.absmax.float())
        assert own_absmax.dtype == torch.float32


@settings(max_examples=40)
@given(weight=weights(), kind=st.sampled_from(["nf4", "fp4"]), dtype=st.sampled_from([*DTYPES, torch.float64]))
def test_4bit_values_are_level_times_absmax_rounded_once(weight: Tensor, kind: str, dtype: torch.dtype) -> None:
    packed = PackedWeight(weight, kind)
    got = packed.dequantize(dtype)
    reference = dequantize_4bit_reference(packed.codes, packed.absmax, kind, tuple(weight.shape), dtype)
    assert got.dtype == dtype
    assert torch.equal(got, reference)
    halves = torch.stack([packed.codes >> 4, packed.codes & 15], 1).view(-1)[: weight.numel()]
    level = torch.tensor(NF4 if kind == "nf4" else FP4)[halves.long()]
    want = level * packed.absmax.repeat_interleave(64)[: weight.numel()]
    assert torch.equal(got, want.view(weight.shape).to(dtype))
    if weight.shape[1] % 64 == 0 and dtype in DTYPES:
        state = bnb.QuantState(packed.absmax, weight.shape, None, 64, kind, dtype)
        assert torch.equal(bnb.dequantize_4bit(packed.codes.view(-1, 1), state).view(weight.shape), got)


@pytest.mark.parametrize("shape", [(96, 96), (5, 33), (3, 1), (1, 65), (64, 100)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_no_multiple_of_a_block_come_back_near_what_they_were(
    shape: tuple[int, int], kind: str, dtype: torch.dtype
) -> None:
    # A kernel that starts each row on a new block gets these wrong by as much as the weights themselves.
    weight = torch.randn(shape)
    packed = PackedWeight(weight, kind)
    levels = torch.tensor(sorted(NF4 if kind == "nf4" else FP4))
    gap = float(levels.diff().max()) / 2
    bound = gap * packed.absmax.repeat_interleave(64)[: weight.numel()].view(shape)
    error = (packed.dequantize(dtype).float() - weight).abs()
    assert (error <= bound * 1.001 + 0.01 * weight.abs()).all()


@settings(max_examples=25)
@given(rows=st.integers(1, 300), columns=st.sampled_from([33, 64, 256]), dtype=st.sampled_from(DTYPES))
def test_double_quantization_is_that_of_bitsandbytes(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    packed = PackedWeight(weight, "nf4-dq")
    assert torch.equal(packed.codes, codes.view(-1))
    assert torch.equal(packed.nested_offset, state.offset)
    assert torch.equal(packed.nested_absmax, state.state2.absmax)
    scales = PackedWeight(weight, "nf4").absmax
    own, theirs = (_unpacked(packed, levels) for levels in (packed.absmax, state.absmax))
    assert ((own - scales).abs() <= (theirs - scales).abs()).all()  # its CPU kernel now and then takes the next level
    assert (packed.absmax != state.absmax).sum() <= 1 + 0.01 * len(scales)
    state.absmax = packed.absmax
    for out in DTYPES if columns % 64 == 0 else ():
        state.dtype = out
        assert torch.equal(packed.dequantize(out), bnb.dequantize_4bit(codes, state))


def _unpacked(packed: PackedWeight, levels: Tensor) -> Tensor:
    values = bnb.create_dynamic_map()[levels.long()]
    return values * packed.nested_absmax.repeat_interleave(256)[: len(levels)] + packed.nested_offset


@settings(max_examples=30)
@given(rows=st.integers(1, 20), columns=sizes, power=st.integers(-3, 3))
def test_int8_codes_are_those_of_bitsandbytes(rows: int, columns: int, power: int) -> None:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = (torch.randn(rows, columns, generator=generator) * 10.0**power).half()
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    for source in (weight, weight.float()):
        packed = PackedWeight(source, "int8")
        assert torch.equal(packed.absmax, absmax.float())
        assert torch.equal(packed.codes, codes)
        for dtype in (*DTYPES, torch.float64):
            want = packed.codes.float() * (packed.absmax / 127).unsqueeze(1)
            assert torch.equal(packed.dequantize(dtype), want.to(dtype))
        error = (packed.dequantize(torch.float32) - weight.float()).abs()
        assert (error <= packed.absmax.unsqueeze(1) / 254 * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_zeros_stay_zeros(kind: str, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64).to(dtype)
    weight[1:3] = 0.0
    packed = PackedWeight(weight, kind)
    assert packed.dequantize(torch.float32).isfinite().all()
    if kind != "nf4-dq":
        assert not packed.dequantize(dtype)[1:3].any()
    if kind == "int8":
        assert not packed.codes[1:3].any()


@pytest.mark.parametrize("kind", KINDS)
def test_float64_and_non_contiguous_weights_are_packed_as_their_values(kind: str) -> None:
    weight = torch.randn(64, 48)
    want = PackedWeight(weight.t().contiguous(), kind)
    for source in (weight.t(), weight.t().double()):
        packed = PackedWeight(source, kind)
        assert torch.equal(packed.codes, want.codes)
        assert packed.source_dtype == source.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(301, 701), (3, 70_000), (70_000, 3)])
def test_a_weight_of_several_pieces_is_packed_as_in_one(kind: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    assert weight.numel() > 3 * PIECE
    packed = PackedWeight(weight, kind)
    if kind == "int8":
        absmax = weight.float().abs().amax(1)
        assert torch.equal(packed.absmax, absmax)
        assert torch.equal(packed.codes, (weight.float() * (127 / absmax).unsqueeze(1)).round().to(torch.int8))
        return
    codes, absmax = quantize_4bit_reference(weight, kind[:3])
    assert torch.equal(packed.codes, codes)
    if kind != "nf4-dq":
        assert torch.equal(packed.absmax, absmax)


@pytest.mark.parametrize("kind", KINDS)
def test_size_in_bytes(kind: str) -> None:
    packed = PackedWeight(torch.randn(128, 256), kind)
    count, blocks = 128 * 256, 128 * 4
    want = {
        "nf4": count // 2 + 4 * blocks,
        "fp4": count // 2 + 4 * blocks,
        "nf4-dq": count // 2 + blocks + 4 * math.ceil(blocks / 256) + 4,
        "int8": count + 4 * 128,
    }
    assert packed.nbytes == want[kind]
    assert packed.logical_numel == count


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_model_goes_through_changes_a_packed_bit(kind: str, tmp_path: Path) -> None:
    layer = PackedLinear(PackedWeight(torch.randn(48, 64), kind), nn.Parameter(torch.randn(48), requires_grad=False))
    model = nn.Sequential(layer)
    before = {name: buffer.clone() for name, buffer in layer.packed.named_buffers()}
    dense = layer.packed.dequantize(torch.float32)

    def unchanged(packed: PackedWeight) -> None:
        buffers = dict(packed.named_buffers())
        assert buffers.keys() == before.keys()
        for name, buffer in buffers.items():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
        assert torch.equal(packed.dequantize(torch.float32), dense)

    casts = (model.half, model.bfloat16, model.double, model.float, model.cpu, model.eval, model.train)
    for cast in (*casts, lambda: model.to(torch.bfloat16), lambda: model.to("cpu", torch.float16)):
        cast()
        unchanged(layer.packed)
    assert layer.bias.dtype == torch.float16
    unchanged(copy.deepcopy(model)[0].packed)
    unchanged(pickle.loads(pickle.dumps(model))[0].packed)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = nn.Sequential(PackedLinear(PackedWeight(torch.randn(48, 64), kind), nn.Parameter(torch.zeros(48))))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    unchanged(other[0].packed)


@pytest.mark.parametrize("quantize", KINDS)
@pytest.mark.parametrize("conv1d", [False, True])
def test_packed_linear_is_the_linear_map_of_its_dense_weight(quantize: str, conv1d: bool) -> None:
    layer = make_base(64, 48, conv1d=conv1d, quantize=quantize)
    assert (layer.in_features, layer.out_features) == (64, 48)
    x = torch.randn(2, 5, 64, requires_grad=True)
    weight = layer.weight.t() if conv1d else layer.weight
    assert relative(layer(x), x @ weight.t() + layer.bias) < 1e-6
    upstream = torch.randn(2, 5, 48)
    layer(x).backward(upstream)
    assert relative(x.grad, upstream @ weight) < 1e-6


@pytest.mark.parametrize("quantize", BASES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_in_between_changes_no_gradient(quantize: str, dtype: torch.dtype) -> None:
    # Some bitsandbytes modules repack their weight in an evaluation without gradient, and train wrongly after it.
    layer = make_base(64, 64, quantize=quantize).to(dtype)
    x = torch.randn(32, 64).to(dtype).requires_grad_()
    layer(x).square().sum().backward()
    before, x.grad = x.grad, None
    layer.eval()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x.detach())
    layer.train()
    layer(x).square().sum().backward()
    assert torch.equal(x.grad, before)


@pytest.mark.parametrize("kind", KINDS)
def test_meta_weights_are_packed_to_meta_buffers_of_the_same_shapes(kind: str) -> None:
    real, meta = PackedWeight(torch.randn(70, 100), kind), PackedWeight(torch.randn(70, 100, device="meta"), kind)
    for (name, buffer), (other, empty) in zip(real.named_buffers(), meta.named_buffers(), strict=True):
        assert (name, buffer.shape, buffer.dtype) == (other, empty.shape, empty.dtype)
        assert empty.is_meta
    assert meta.nbytes == real.nbytes
    assert meta.dequantize(torch.bfloat16).shape == (70, 100)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(QuantizationError, match="`quantize` must be nf4, nf4-dq, fp4 or int8, got 'int3'"):
        PackedWeight(torch.randn(4, 4), "int3")
    with pytest.raises(QuantizationError, match=r"only floating matrices are packed, got \(4,\) of torch.float32"):
        PackedWeight(torch.randn(4), "nf4")
    with pytest.raises(QuantizationError, match=r"only floating matrices are packed, got \(4, 4\) of torch.int64"):
        PackedWeight(torch.ones(4, 4, dtype=torch.long), "nf4")


WITHOUT_BITSANDBYTES = """
import sys, warnings, torch

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.partition(".")[0] == "bitsandbytes" else self.finder.find_spec(name, *args)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import Notice
from lightning_lora.model.apply import apply_lora
results = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for kind in ("nf4", "nf4-dq", "fp4", "int8"):
        weights = torch.load("weights.pt")
        model = torch.nn.Sequential(*(torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for w in weights))
        for layer, weight in zip(model, weights):
            layer.weight.data = weight
        apply_lora(model, LoRAConfig(quantize=kind))
        model[0](torch.randn(2, 64)).sum().backward()
        assert model[0].lora_B.grad.any()
        results[kind] = [dict(layer.base_layer.packed.named_buffers()) for layer in model]
said = [str(w.message) for w in caught if issubclass(w.category, Notice) and "bitsandbytes" in str(w.message)]
assert "bitsandbytes" not in sys.modules
torch.save((said, results), "results.pt")
"""


def test_without_bitsandbytes_the_codes_are_the_same_and_it_is_said_once(tmp_path: Path) -> None:
    weights = [torch.randn(48, 64), torch.randn(33, 48), torch.randn(8, 33)]
    torch.save(weights, tmp_path / "weights.pt")
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{WITHOUT_BITSANDBYTES}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    said, results = torch.load(tmp_path / "results.pt")
    assert len(said) == 1
    assert "bitsandbytes is not installed: 4-bit weights are packed and unpacked by plain torch" in said[0]
    assert "pip install lightning-lora[quant]" in said[0]
    for kind, layers in results.items():
        for weight, buffers in zip(weights, layers, strict=True):
            for name, buffer in PackedWeight(weight, kind).named_buffers():
                assert torch.equal(buffers[name], buffer), (kind, name)
