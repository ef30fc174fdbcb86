# SPDX-License-Identifier: Apache-2.0
"""The function itself: values and gradients against float64, and every way in which autograd is used."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.functional import dropout_mask, keep_probability, lora_linear
from lightning_lora.nn.linear import LoRALinear
from tests.nn.layers import BASES, exact, grads_of, magnitude, make_layer, relative

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.bfloat16: 1e-2}  # A and B are fp32 under float64


def _input(leading: list[int], inn: int, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "contiguous":
        return torch.randn(*leading, inn).to(dtype)
    if layout == "transposed":
        return torch.randn(inn, *leading).to(dtype).movedim(0, -1)
    if layout == "strided":
        return torch.randn(*leading, 2 * inn).to(dtype)[..., ::2]
    return torch.randn(inn).to(dtype).expand(*leading, inn)


@settings(max_examples=60)
@given(
    leading=st.lists(st.integers(0, 4), max_size=3),
    inn=st.sampled_from([1, 5, 33, 64, 96]),
    out=st.sampled_from([1, 7, 32, 64]),
    r=st.integers(1, 8),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    bias=st.booleans(),
    conv1d=st.booleans(),
    quantize=st.sampled_from(BASES),
    strength=st.sampled_from([1.0, 0.5, -2.0]),
)
def test_output_and_gradients_are_those_of_the_equation(
    leading: list[int], inn: int, out: int, r: int, layout: str, dtype: torch.dtype, bias: bool, conv1d: bool,
    quantize: str, strength: float,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    layer = make_layer(inn, out, r=r, bias=bias, conv1d=conv1d, quantize=quantize).to(dtype)
    layer.strength = strength
    x = _input(leading, inn, layout, dtype).requires_grad_()
    y = layer(x)
    upstream = torch.randn(y.shape).to(dtype)
    y.backward(upstream)

    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    want = exact(layer, *leaves, dtype)
    want.backward(upstream.double())
    sizes = [t.detach().abs().requires_grad_() for t in leaves]
    size = magnitude(layer, *sizes)
    size.backward(upstream.double().abs())
    assert y.dtype == dtype
    assert y.shape == (*leading, out)
    assert (y - want).norm() <= TOLERANCE[dtype] * size.norm()
    for got, leaf, term in zip((x, layer.lora_A, layer.lora_B), leaves, sizes, strict=True):
        assert got.grad.dtype == got.dtype
        assert (got.grad - leaf.grad).norm() <= TOLERANCE[dtype] * term.grad.norm()


@pytest.mark.parametrize("quantize", BASES)
def test_without_adapter_it_is_the_frozen_map_and_gives_the_input_its_gradient(quantize: str) -> None:
    layer = make_layer(quantize=quantize)
    layer.enabled = False
    x = torch.randn(3, 5, 64, requires_grad=True)
    upstream = torch.randn(3, 5, 48)
    layer(x).backward(upstream)
    assert torch.equal(x.grad, (upstream.view(15, 48) @ layer.base_weight()).view(3, 5, 64))
    assert layer.lora_A.grad is None


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_nothing_that_comes_in_is_written_into(quantize: str, dropout: float) -> None:
    layer = make_layer(quantize=quantize, lora_dropout=dropout)
    x = torch.randn(3, 64, requires_grad=True)
    upstream = torch.randn(3, 48)
    inputs = [x, upstream, *layer.parameters(), *layer.buffers()]
    before = [(t.detach().clone(), t._version) for t in inputs]
    layer(x).backward(upstream)
    for tensor, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def _saved_bytes(run: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Bytes of what autograd keeps of ``run(x)``, parameters left out."""
    own = {p.data_ptr() for p in run.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x)
    return sum(kept.values()), y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (3, 5, 64)])
def test_the_output_may_be_written_into(bias: bool, enabled: bool, shape: tuple[int, ...]) -> None:
    layer = make_layer(bias=bias)
    layer.enabled = enabled
    x = torch.randn(shape, requires_grad=True)
    expected = torch.autograd.grad((layer(x) * 2 + 1).square().sum(), x)[0]
    y = layer(x)
    y *= 2
    y += 1
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward_are_the_input_and_its_small_image(
    quantize: str, dropout: float, dtype: torch.dtype
) -> None:
    layer = make_layer(r=4, quantize=quantize, lora_dropout=dropout).to(dtype)
    x = torch.randn(32, 64, dtype=dtype, requires_grad=True)
    saved, y = _saved_bytes(layer, x)
    assert y.requires_grad
    assert saved == 32 * (64 + 4) * dtype.itemsize + 16  # and which adapter it was
    layer.enabled = False
    saved, y = _saved_bytes(layer, x)
    assert y.requires_grad
    assert saved == 0


# dropout


def _dropping(p: float, width: int = 64) -> LoRALinear:
    """A layer that gives ``dropout(x)`` itself: W = 0, A = B = 1, scale 1."""
    layer = make_layer(width, width, r=width, lora_alpha=width, bias=False, lora_dropout=p)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(width))
        layer.lora_B.copy_(torch.eye(width))
    return layer


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    x = torch.ones(4000, 64)
    y = _dropping(p)(x)
    keep = keep_probability(p)
    assert abs(keep - (1 - p)) <= 1 / 256
    kept = y[y != 0]
    assert torch.allclose(kept, torch.full_like(kept, 1 / keep))  # so the mean is exact: keep * 1 / keep
    spread = (keep * (1 - keep) / x.numel()) ** 0.5
    assert abs(len(kept) / x.numel() - keep) < 5 * spread


def test_dropout_is_independent_along_rows_and_columns() -> None:
    mask = dropout_mask(torch.Size([2000, 64]), 0.5, seed=7, device=torch.device("cpu")).double()
    centred = mask - mask.mean()
    assert (centred.mean(0).abs() < 5 * 0.5 / 2000**0.5).all()
    assert (centred.mean(1).abs() < 6 * 0.5 / 64**0.5).all()
    for shift in (1, 8, 64):
        flat = centred.view(-1)
        assert abs(float((flat[:-shift] * flat[shift:]).mean())) < 5 * 0.25 / flat.numel() ** 0.5


def test_dropout_follows_the_seed_and_the_gradient_has_the_same_mask() -> None:
    layer = _dropping(0.4)
    x = torch.ones(16, 64, requires_grad=True)
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert torch.equal(x.grad, first)


def test_dropout_rests_in_evaluation_and_draws_no_random_number() -> None:
    layer = _dropping(0.4).eval()
    x = torch.randn(4, 64)
    state = torch.get_rng_state()
    assert torch.allclose(layer(x), x, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    layer = make_layer()  # in training, without dropout
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_gradients_are_right_at_the_drawn_mask() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    W = torch.randn(4, 5, dtype=torch.float64)
    A = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lora_linear(x, W.to, None, A, B, 0.5, 0.4)

    assert gradcheck(run, (x, A, B))
    assert gradgradcheck(run, (x, A, B))


# the ways of autograd


class Stack(nn.Module):
    def __init__(self, **config: object) -> None:
        super().__init__()
        self.first = make_layer(64, 64, **config)
        self.second = make_layer(64, 64, **config)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(quantize: str, dropout: float, reentrant: bool) -> None:
    stack = Stack(quantize=quantize, lora_dropout=dropout)
    x = torch.randn(8, 64, requires_grad=True)

    def run(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(5)
        stack.zero_grad()
        x.grad = None
        y = checkpoint(stack, x, use_reentrant=reentrant) if checkpointed else stack(x)
        y.square().sum().backward()
        grads = [p.grad.clone() for p in stack.parameters() if p.requires_grad]
        return [y.detach(), x.grad.clone(), *grads, torch.get_rng_state()]

    plain, checkpointed = run(False), run(True)
    assert len(plain) == 7
    for a, b in zip(plain, checkpointed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_forwards_before_one_backward_are_two_steps_accumulated(dropout: float) -> None:
    layer = make_layer(lora_dropout=dropout)
    x1, x2 = torch.randn(2, 8, 64)
    torch.manual_seed(5)
    layer(x1).square().sum().backward()
    layer(x2).square().sum().backward()
    apart = grads_of(layer)
    torch.manual_seed(5)
    (layer(x1).square().sum() + layer(x2).square().sum()).backward()
    for got, want in zip(grads_of(layer), apart, strict=True):
        assert relative(got, want) < 1e-6


def test_the_same_layer_twice_in_one_graph() -> None:
    layer = make_layer(64, 64)
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    layer.base_layer.double()
    layer(layer(x)).sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    exact(layer, exact(layer, *leaves, torch.float64), *leaves[1:], torch.float64).sum().backward()
    for got, leaf in zip((x, layer.lora_A, layer.lora_B), leaves, strict=True):
        assert relative(got.grad, leaf.grad) < 1e-6


@pytest.mark.parametrize("need", [(0,), (1,), (2,), (0, 1), (1, 2)])
def test_only_the_wanted_gradients_are_made(need: tuple[int, ...]) -> None:
    layer = make_layer()
    x = torch.randn(3, 64)
    tensors = [x, layer.lora_A, layer.lora_B]
    for i, tensor in enumerate(tensors):
        tensor.requires_grad_(i in need)
    layer(x).square().sum().backward()
    assert [t.grad is not None for t in tensors] == [i in need for i in range(3)]
    got = [tensors[i].grad.clone() for i in need]
    for tensor in tensors:
        tensor.grad = None
        tensor.requires_grad_(True)
    layer(x).square().sum().backward()
    for grad, i in zip(got, need, strict=True):
        assert torch.equal(grad, tensors[i].grad)


@pytest.mark.parametrize("quantize", BASES)
@pytest.mark.parametrize("conv1d", [False, True])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_theirs(quantize: str, conv1d: bool) -> None:
    layer = make_layer(quantize=quantize, conv1d=conv1d)
    x = torch.randn(6, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    upstream = torch.randn(6, 48).bfloat16()
    y.backward(upstream)  # outside of autocast, as Lightning does
    got = [x.grad, *grads_of(layer)]
    assert {g.dtype for g in got} == {torch.float32}
    leaves = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    want = exact(layer, *leaves, torch.bfloat16)
    want.backward(upstream.double())
    assert relative(y, want) < 3e-2
    for grad, leaf in zip(got, leaves, strict=True):
        assert relative(grad, leaf.grad) < 3e-2


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("conv1d", [False, True])
def test_autocast_of_the_switched_off_layer_is_autocast_of_the_base(quantize: str, conv1d: bool) -> None:
    layer = make_layer(quantize=quantize, conv1d=conv1d)
    layer.enabled = False
    x = torch.randn(6, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("adapted", [True, False])
def test_double_backward(adapted: bool) -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    W = torch.randn(4, 5, dtype=torch.float64)
    A = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    B = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
        return lora_linear(x, W.to, bias, *factors, scale=0.7)

    inputs = (x, bias, A, B) if adapted else (x, bias)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_forward_mode_derivative(quantize: str) -> None:
    layer = make_layer(quantize=quantize)
    x, tangent = torch.randn(2, 3, 64)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent
    assert relative(got, layer(tangent) - layer.bias) < 1e-5


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_torch_func_grad_vmap_and_jvp(quantize: str) -> None:
    layer = make_layer(quantize=quantize)
    params = {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}
    assert set(params) == {"adapter.lora_A", "adapter.lora_B"}
    x = torch.randn(5, 64)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, (x,)).square().sum()

    layer(x).square().sum().backward()
    summed = dict(zip(params, grads_of(layer), strict=True))
    whole = torch.func.grad(loss)(params, x)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    tangents = {name: torch.randn_like(p) for name, p in params.items()}
    _, slope = torch.func.jvp(lambda p: loss(p, x), (params,), (tangents,))
    for name, want in summed.items():
        assert relative(whole[name], want) < 1e-5
        assert relative(each[name].sum(0), want) < 1e-5
    want_slope = sum((summed[name] * tangents[name]).sum() for name in params)
    assert torch.allclose(slope, want_slope, rtol=1e-4)


def test_a_bias_that_the_user_trains_gets_its_gradient() -> None:
    for quantize in ("none", "nf4"):
        layer = make_layer(quantize=quantize)
        layer.bias.requires_grad_()
        x = torch.randn(2, 3, 64)
        upstream = torch.randn(2, 3, 48)
        layer(x).backward(upstream)
        assert torch.allclose(layer.bias.grad, upstream.sum((0, 1)), atol=1e-5)


def test_meta_tensors_pass_with_dropout_too() -> None:
    layer = make_layer(lora_dropout=0.1).to("meta")
    assert layer(torch.randn(2, 64, device="meta")).shape == (2, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_with_a_frozen_A_the_input_is_not_kept(dropout: float, quantize: str, dtype: torch.dtype) -> None:
    words = {"quantize": quantize, "lora_dropout": dropout, "r": 4}
    frozen, plain = make_layer(freeze_lora_A=True, **words).to(dtype), make_layer(**words).to(dtype)  # type: ignore[arg-type]
    plain.load_state_dict(frozen.state_dict())
    assert not frozen.lora_A.requires_grad
    results, bytes_ = [], []
    for layer in (frozen, plain):
        torch.manual_seed(5)
        x = torch.randn(4, 8, 64, dtype=dtype, requires_grad=True)
        saved, y = _saved_bytes(layer, x)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), x.grad, layer.lora_B.grad))
        bytes_.append(saved)
    assert bytes_[0] == 32 * 4 * dtype.itemsize + 16  # x A^T, and which adapter it was
    assert bytes_[1] == 32 * (64 + 4) * dtype.itemsize + 16
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert frozen.lora_A.grad is None


def test_with_a_frozen_A_nothing_keeps_the_input_alive() -> None:
    for frozen in (True, False):
        layer = make_layer(freeze_lora_A=frozen)
        first = torch.randn(4, 64, requires_grad=True)
        x = first * 2  # nobody else's
        alive = weakref.ref(x)
        y = layer(x)
        del x
        assert (alive() is None) == frozen
        y.sum().backward()
        assert first.grad is not None


def test_a_gradient_of_a_gradient_with_a_frozen_A_is_refused_by_name() -> None:
    layer = make_layer(freeze_lora_A=True)
    y = layer(torch.randn(4, 64, requires_grad=True))
    with pytest.raises(UnsupportedError, match="whose factor A is frozen"):
        torch.autograd.grad(y.sum(), [layer.lora_B], create_graph=True)
