# SPDX-License-Identifier: Apache-2.0
"""Packing loses no token and leaks no attention: rows against examples alone, for the families where it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora.causal_lm.collate import Collate
from lightning_lora.causal_lm.encoding import IGNORED, Encoded
from lightning_lora.causal_lm.loss import count, next_token_loss
from lightning_lora.causal_lm.packing import check_packing, pack, positions_of
from lightning_lora.errors import UnsupportedError
from tests.helpers import tiny_gpt2, tiny_llama

LENGTHS = st.lists(st.integers(2, 12), min_size=1, max_size=8)
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def tiny(family: str, **config: Any) -> nn.Module:
    """A random model of a family, by its name in transformers."""
    import transformers

    torch.manual_seed(0)
    values = {**SMALL, **config}
    return transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **values)).eval()


MODELS = {
    "llama": lambda: tiny_llama().eval(),
    "gpt2": lambda: tiny_gpt2().eval(),
    "mistral, window": lambda: tiny("mistral", sliding_window=4),
    "gemma2": lambda: tiny("gemma2", head_dim=16, sliding_window=4),
    "qwen2": lambda: tiny("qwen2"),
    "phi, eager": lambda: tiny("phi", attn_implementation="eager"),
    "gpt_neox": lambda: tiny("gpt_neox"),
    "mixtral": lambda: tiny("mixtral", num_local_experts=4),
}
REFUSED = {
    "opt": lambda: tiny("opt", ffn_dim=48, word_embed_proj_dim=32),  # its positions begin anew, its mask does not
    "falcon": lambda: tiny("falcon"),
    "bloom": lambda: tiny("bloom", n_layer=1, n_head=2),
    "mamba": lambda: tiny("mamba", state_size=4),
}


def examples(lengths: list[int], seed: int = 0) -> list[Encoded]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 64, (length,), generator=generator, dtype=torch.int32)
        labels = ids.clone()
        labels[: int(torch.randint(1, length, (), generator=generator))] = IGNORED
        made.append(Encoded(ids, labels))
    return made


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    labels = batch.pop("labels")
    return next_token_loss(model(**batch, use_cache=False).logits, labels) * count(labels)


@given(st.lists(st.integers(1, 20)), st.integers(20, 40))
def test_rows_hold_every_example_once_and_no_more_than_fits(lengths: list[int], size: int) -> None:
    rows = pack(lengths, size)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(row and sum(lengths[i] for i in row) <= size for row in rows)
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert all(a + b > size for a, b in zip(filled, filled[1:], strict=False)), "two rows would have fitted into one"


def test_row_that_is_too_short_is_an_error() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit a row of 8"):
        pack([3, 9], 8)


@given(LENGTHS)
def test_collated_rows_hold_every_token_and_label(lengths: list[int]) -> None:
    parts = examples(lengths)
    rows = [[parts[i] for i in row] for row in pack(lengths, 12)]
    batch = Collate(pad=0, packed=True)(rows)
    for ids, labels, positions, row in zip(
        *(batch[k] for k in ("input_ids", "labels", "position_ids")), rows, strict=True
    ):
        length = sum(map(len, row))
        assert ids[:length].tolist() == torch.cat([part.ids for part in row]).tolist()
        assert labels[:length].tolist() == torch.cat([part.labels for part in row]).tolist()
        assert (labels[length:] == IGNORED).all()
        assert (positions[:length] == positions_of([len(part) for part in row])).all()
        assert (labels[positions == 0] == IGNORED).all(), "the first token stands behind another example"


@settings(max_examples=8)
@given(LENGTHS)
def test_packed_loss_and_gradients_are_those_of_the_examples_alone(lengths: list[int]) -> None:
    model = tiny_llama().double().eval()
    parts = examples(lengths)
    rows = [[parts[i] for i in row] for row in pack(lengths, 16)]
    summed(model, Collate(0, packed=True)(rows)).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sum(summed(model, Collate(0)([[part]])) for part in parts).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_family_keeps_examples_apart(name: str) -> None:
    model, parts = MODELS[name](), examples([7, 5, 9, 3])
    rows = [[parts[i] for i in row] for row in pack([7, 5, 9, 3], 16)]
    with torch.no_grad():
        packed = summed(model, Collate(0, packed=True)(rows))
        alone = sum(summed(model, Collate(0)([[part]])) for part in parts)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)
    check_packing(model)
    check_packing(model, rows=2)


@pytest.mark.parametrize("name", REFUSED)
def test_family_that_leaks_is_refused_by_name(name: str) -> None:
    model = REFUSED[name]()
    with pytest.raises(UnsupportedError, match=rf"(?i){name}ForCausalLM.*`packing=False`"):
        check_packing(model)


def test_check_changes_neither_model_nor_random_state() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    check_packing(model)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]


def test_padding_is_seen_by_nobody() -> None:
    parts = examples([7, 3])
    batch = Collate(pad=9)([[part] for part in parts])
    assert batch["attention_mask"].sum(1).tolist() == [7, 3]
    model = tiny_llama().eval()
    with torch.no_grad():
        together = summed(model, batch)
        alone = sum(summed(model, Collate(0)([[part]])) for part in parts)
    torch.testing.assert_close(together, alone)
