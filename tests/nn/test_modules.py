# SPDX-License-Identifier: Apache-2.0
"""Adapted modules that are no linear layers: their bits at the start and when off, equations, gradients, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from lightning_lora.config import AdapterRecord, LoRAConfig
from lightning_lora.errors import TargetError, UnsupportedError
from lightning_lora.nn.attention import LoRAMultiheadAttention
from lightning_lora.nn.conv import LoRAConv
from lightning_lora.nn.embedding import LoRAEmbedding
from lightning_lora.nn.experts import LoRAExperts
from lightning_lora.nn.tokens import TrainedTokens
from tests.nn.layers import relative
from tests.nn.modules import IDS, KINDS, LOW_RANK, experts, low_rank, make, output

MERGING = [name for name, kind in KINDS.items() if kind.merges]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit_and_off_it_is_the_base(name: str, dtype: torch.dtype) -> None:
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in KINDS[name].inputs())
    fresh = make(name, zero=True).to(dtype)
    assert fresh.untrained()
    with torch.no_grad():  # torch's attention sums in another order over a weight that needs a gradient
        assert torch.equal(output(fresh, inputs), output(fresh.base_layer, inputs))
    module = make(name).to(dtype)
    base = output(module.base_layer, inputs)
    assert not module.untrained()
    assert not torch.equal(output(module, inputs), base)
    assert output(module, inputs).dtype == base.dtype
    for attribute, value in (("enabled", False), ("strength", 0.0)):
        off = copy.deepcopy(module)
        setattr(off, attribute, value)
        assert torch.equal(output(off, inputs), base)
        assert all(torch.equal(tensor, module.base_layer.get_parameter(n)) for n, tensor in off.merged().items())
    assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}  # masters


@pytest.mark.parametrize("name", MERGING)
def test_output_and_gradients_are_those_of_the_merged_parameters(name: str) -> None:
    module, inputs = make(name), KINDS[name].inputs()
    module.strength = 0.4
    own = output(module, inputs)
    merged = module.merged()
    plain = functional_call(module.base_layer, merged, inputs)
    plain = plain[0] if isinstance(plain, tuple) else plain
    assert relative(own, plain) < 1e-6
    assert {n for n in merged if not torch.equal(merged[n], module.base_layer.get_parameter(n))} == set(merged)
    direction = torch.randn_like(own)
    grads = torch.autograd.grad((own * direction).sum(), list(module.adapter.parameters()))
    for parameter, grad in zip(module.adapter.parameters(), grads, strict=True):
        entry = int(grad.abs().argmax())
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter.view(-1)[entry] += step
                ends.append(float((output(module, inputs).double() * direction.double()).sum()))
                parameter.view(-1)[entry] -= step
        assert abs((ends[0] - ends[1]) / 2e-2 - float(grad.reshape(-1)[entry])) < 2e-2 * float(grad.abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_parts_go_and_come_back_with_their_words(name: str) -> None:
    module, inputs = make(name), KINDS[name].inputs()
    module.strength = 0.5
    trained, base = output(module, inputs), output(module.base_layer, inputs)
    held = module.held()
    assert held is not None
    part = held.detached()
    module.hold(None)
    assert module.vacant
    assert module.trained_names() == []
    assert torch.equal(output(module, inputs), base)
    module.hold(part)
    assert torch.equal(output(module, inputs), trained)
    assert torch.equal(output(copy.deepcopy(module), inputs), trained)


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_vacant_module_takes_a_part_of_any_rank(name: str) -> None:
    vacant, other, inputs = make(name, r=0), low_rank(name, use_rslora=True), KINDS[name].inputs()
    assert sum(p.numel() for p in vacant.adapter.parameters()) == 0
    other.base_layer.load_state_dict(vacant.base_layer.state_dict())
    held = other.held()
    assert held is not None
    vacant.hold(held.detached())
    assert torch.equal(output(vacant, inputs), output(other, inputs))


def test_starts_are_pefts() -> None:
    embedding = low_rank("embedding", zero=True)
    assert not embedding.adapter.lora_A.any()
    assert embedding.adapter.lora_B.any()
    for name in ("conv2d", "attention", "experts"):
        module = low_rank(name, zero=True)
        assert all(a.any() and not b.any() for a, b in map(module.factors, module.sites))
    many = LoRAExperts(experts(), AdapterRecord(LoRAConfig(r=64, init_lora_weights="gaussian")), 64, 8, ("down_proj",))
    assert abs(float(many.adapter.lora_A.detach().std()) * 64 - 1) < 0.1  # 1/r, however many experts


def test_attributes_of_the_users_module_are_found() -> None:
    assert make("embedding").padding_idx == 2
    assert make("attention").batch_first
    assert make("tokens of a head").weight.shape == (11, 6)
    with pytest.raises(AttributeError, match="no_such"):
        make("conv2d").no_such  # noqa: B018


def test_the_padding_row_of_an_embedding_learns_nothing() -> None:
    module = low_rank("embedding")
    output(module, (IDS,)).sum().backward()
    grad = module.adapter.lora_A.grad
    assert not grad[:, 2].any()
    assert grad[:, 9].any()
    tokens = TrainedTokens(nn.Embedding(11, 6, padding_idx=2), AdapterRecord(LoRAConfig()), [9, 2])
    tokens(IDS).sum().backward()
    assert torch.equal(tokens.rows.grad, torch.tensor([[2.0], [0.0]]).expand(2, 6))


def test_a_tied_head_uses_the_embeddings_rows() -> None:
    record = AdapterRecord(LoRAConfig())
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    first = TrainedTokens(embedding, record, [3, 10])
    second = TrainedTokens(head, record, [3, 10], owner=first)
    nn.init.normal_(first.rows)
    x = torch.randn(4, 6)
    assert relative(second(x)[:, [3, 10]], x @ first.rows.t()) < 1e-6
    assert torch.equal(second(x)[:, :3], head(x)[:, :3])
    assert second.own_names() == []
    assert [n for n, _ in second.named_parameters()] == ["base_layer.weight"]
    two = copy.deepcopy(nn.ModuleList([first, second]))
    assert two[1].rows is two[0].rows  # type: ignore[union-attr]


@pytest.mark.slow
def test_compiled_without_a_break() -> None:
    for name in ("embedding", "conv2d", "tokens", "tokens of a head"):
        module, inputs = make(name), KINDS[name].inputs()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        for strength in (1.0, 0.5):
            module.strength = strength
            assert relative(output(compiled, inputs), output(module, inputs)) < 1e-6


class Twice(nn.Conv1d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


CONFIG: dict[str, Any] = {"r": 4, "lora_alpha": 6}
REFUSED: list[tuple[Any, Any, dict[str, Any], str]] = [
    (LoRAEmbedding, lambda: nn.Embedding(5, 4, max_norm=1.0), {}, "`max_norm=1.0` changes its weight in every forward"),
    (LoRAEmbedding, lambda: nn.Embedding(5, 4, sparse=True), {}, "`sparse=True` gives sparse gradients"),
    (
        LoRAEmbedding,
        lambda: OPTLearnedPositionalEmbedding(5, 4),
        {},
        "OPTLearnedPositionalEmbedding is nn.Embedding",
    ),
    (LoRAConv, lambda: Twice(4, 4, 3), {}, "Twice is a convolution by class and computes in its own way"),
    (LoRAConv, lambda: nn.Conv1d(4, 4, 3, padding_mode="circular"), {}, "`padding_mode='circular'` is not built"),
    (LoRAConv, lambda: nn.Conv1d(6, 6, 3, groups=3), {}, "3 groups needs a rank that they divide, got 4"),
    (LoRAMultiheadAttention, lambda: nn.MultiheadAttention(4, 2, kdim=6), {}, "`kdim` or `vdim` keeps three weights"),
    (LoRAMultiheadAttention, lambda: nn.MultiheadAttention(4, 2), {"lora_dropout": 0.1}, "set `lora_dropout=0`"),
]


@pytest.mark.parametrize(("kind", "base", "config", "text"), REFUSED)
def test_what_is_not_built_is_refused_by_name(kind: Any, base: Any, config: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        kind(base(), AdapterRecord(LoRAConfig(**CONFIG, **config)), 4, 6)


def test_other_refusals() -> None:
    record = AdapterRecord(LoRAConfig(**CONFIG))
    assert "with 2 groups it mixes channels" in str(make("conv of groups").unmergeable)
    with pytest.raises(UnsupportedError, match="'weight' has 2: name the layer itself in `target_modules`"):
        LoRAExperts(nn.Linear(4, 4), record, 4, 6, ("weight",))
    with pytest.raises(UnsupportedError, match="set `lora_dropout=0`"):
        LoRAExperts(experts(), AdapterRecord(LoRAConfig(lora_dropout=0.1)), 4, 6, ("down_proj",))
    with pytest.raises(TargetError, match=r"`trainable_token_indices` \[11, 40\] are beyond the 11 rows"):
        TrainedTokens(nn.Embedding(11, 6), record, [3, 11, 40])
    with pytest.raises(UnsupportedError, match="names a Conv1d: rows are trained of embeddings"):
        TrainedTokens(nn.Conv1d(4, 4, 3), record, [1])
    with pytest.raises(UnsupportedError, match="have no values on the meta device"):
        TrainedTokens(nn.Embedding(11, 6, device="meta"), record, [1])
    with pytest.raises(UnsupportedError, match="`scale_grad_by_freq=True`"):
        TrainedTokens(nn.Embedding(11, 6, scale_grad_by_freq=True), record, [1])
