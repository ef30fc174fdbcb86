# SPDX-License-Identifier: Apache-2.0
"""Virtual tokens before a decoder: what goes in and out of it keeps its lengths, whatever mask or cache there is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    PrefixTuningConfig,
    PromptTuningConfig,
    apply_adapters,
    disable_adapters,
    set_adapter_scale,
)
from lightning_lora.config import AdapterConfig
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.forgetting.forward import ModelForward
from lightning_lora.forgetting.trees import plant, sees
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.virtual import VirtualTokens
from tests.forgetting.tiny import tokenizer
from tests.helpers import tiny_gpt2, tiny_llama
from tests.model.nets import tiny_bert

COUNT = 5
PROMPT = PromptTuningConfig(num_virtual_tokens=COUNT)
PREFIX = PrefixTuningConfig(num_virtual_tokens=COUNT)
BOTH = pytest.mark.parametrize("config", [PROMPT, PREFIX])


def converted(config: AdapterConfig, make: Callable[..., nn.Module] = tiny_llama, **changes: Any) -> nn.Module:
    model = make(**changes).eval()
    apply_adapters(model, config)
    return model


def vision() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))


def part(model: nn.Module) -> VirtualTokens:
    ((_, module),) = adapter_modules(model)
    assert isinstance(module, VirtualTokens)
    return module


def logits(model: nn.Module, *ids: int) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0]


@BOTH
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_packed_texts_and_trees_are_what_each_text_is_alone(make: Any, attention: str, config: AdapterConfig) -> None:
    model = make().eval()
    model.set_attn_implementation(attention)
    apply_adapters(model, config)
    first, second = (7, 21, 33, 4, 50, 19), (9, 9, 41, 30)
    positions = torch.tensor([[*range(6), *range(4)]])
    packed = model(input_ids=torch.tensor([first + second]), position_ids=positions, use_cache=False).logits[0]
    assert (packed[:6] - logits(model, *first)).abs().max() < 1e-6
    assert (packed[6:] - logits(model, *second)).abs().max() < 1e-6
    (tree,) = plant([(1, 2, 3, 4, 5, 6), (1, 2, 3, 4, 9, 8, 7), (1, 2, 3, 11)])
    keep = torch.arange(len(tree))
    ids, depths = torch.tensor([tree.tokens]), torch.tensor([tree.depths])
    found = ModelForward(model).tree(ids, depths, sees([tree], len(tree)), keep)[0]
    for row, path in zip(tree.rows, tree.paths, strict=True):
        assert (found[path] - logits(model, *row)).abs().max() < 1e-6


@BOTH
def test_all_that_comes_out_has_the_inputs_length(config: AdapterConfig) -> None:
    model = tiny_llama().eval()
    model.set_attn_implementation("eager")
    apply_adapters(model, config)
    ids = torch.tensor([[7, 21, 33, 4]])
    out = model(input_ids=ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert out.logits.shape == (1, 4, 64)
    assert {tuple(h.shape) for h in out.hidden_states} == {(1, 4, 64)}
    assert {tuple(a.shape) for a in out.attentions} == {(1, 2, 4, 4 + COUNT)}
    assert out.past_key_values.get_seq_length() == 4 + COUNT
    assert torch.equal(model(input_ids=ids, return_dict=False)[0], out.logits)
    assert torch.allclose(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, out.logits, atol=1e-6)
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    assert torch.allclose(out.loss, expected)


@BOTH
def test_off_it_is_the_base_and_nothing_lies_between(config: AdapterConfig) -> None:
    ids = torch.tensor([[7, 21, 33, 4]])
    base = tiny_llama().eval()(input_ids=ids).logits
    model = converted(config)
    on = model(input_ids=ids).logits
    assert not torch.allclose(on, base)
    with disable_adapters(model):
        assert torch.equal(model(input_ids=ids).logits, base)
    set_adapter_scale(model, 0.0)
    assert torch.equal(model(input_ids=ids).logits, base)
    with pytest.raises(UnsupportedError, match=r"has no strength of 0\.5: virtual tokens are there or not"):
        set_adapter_scale(model, 0.5)
    set_adapter_scale(model, 1)
    assert torch.equal(model(input_ids=ids).logits, on)


@BOTH
def test_positions_of_the_user_move_behind_the_virtual_tokens(config: AdapterConfig) -> None:
    model = converted(config)
    ids = torch.tensor([[7, 21, 33, 4]])
    plain = model(input_ids=ids).logits
    given = model(input_ids=ids, position_ids=torch.arange(4)[None], attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(given, plain, atol=1e-6)


@BOTH
def test_a_cache_is_gone_on_with(config: AdapterConfig) -> None:
    model = converted(config)
    whole = logits(model, 7, 21, 33, 4, 50, 19)
    begun = model(input_ids=torch.tensor([[7, 21, 33]]), use_cache=True)
    rest = model(input_ids=torch.tensor([[4, 50, 19]]), past_key_values=begun.past_key_values)
    assert torch.allclose(torch.cat([begun.logits, rest.logits], 1)[0], whole, atol=1e-5)


@BOTH
def test_caches_and_masks_that_do_not_fit_are_refused(config: AdapterConfig) -> None:
    from transformers import StaticCache

    model = converted(config)
    ids = torch.tensor([[7, 21, 33]])
    with disable_adapters(model):
        begun = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="a cache that was begun without them, or cut by assisted decoding"):
        model(input_ids=ids, past_key_values=begun, attention_mask=torch.ones(1, 6))
    with pytest.raises(UnsupportedError, match="StaticCache, whose length is fixed without the virtual tokens"):
        model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(UnsupportedError, match=r"cannot make an `attention_mask` longer that is of shape \(1, 3, 3\)"):
        model(input_ids=ids, attention_mask=torch.ones(1, 3, 3))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="over packed rows needs attention that takes a mask"):
        model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0]]), use_cache=False)


def test_gradient_checkpointing_is_right_or_refused() -> None:
    ids = torch.tensor([[7, 21, 33, 4]])
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = converted(PROMPT).train()
        if recompute:
            model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(part(model).adapter.embedding.grad)
    assert torch.equal(*found)
    model = converted(PREFIX).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="prefix tuning does not go with gradient checkpointing"):
        model(input_ids=ids)
    model.eval()(input_ids=ids)


def test_more_tokens_than_learned_positions_are_refused() -> None:
    model = converted(PROMPT, tiny_gpt2)
    model(input_ids=torch.zeros(1, 128 - COUNT, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="129 tokens, the 5 virtual ones among them, are more than the 128 pos"):
        model(input_ids=torch.zeros(1, 129 - COUNT, dtype=torch.long))
    with pytest.raises(UnsupportedError, match="what `token_type_ids` is to be for the virtual tokens"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), token_type_ids=torch.zeros(1, 4, dtype=torch.long))


def test_routers_of_a_mixture_count_the_input_alone() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    model = converted(PROMPT, lambda: MixtralForCausalLM(config))
    ids = torch.arange(8).view(2, 4)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, output_router_logits=True)
    assert {tuple(r.shape) for r in out.router_logits} == {(8, 3)}
    assert torch.isfinite(out.aux_loss)


def test_what_prompts_begin_with(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = "the cat sleeps"
    config = PromptTuningConfig(
        num_virtual_tokens=7,
        prompt_tuning_init="text",
        prompt_tuning_init_text=words,
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )
    model = converted(config, vocab=300)
    ids = tokenizer()(words)["input_ids"]
    expected = model.get_input_embeddings().weight[torch.tensor((ids * 7)[:7])]
    assert torch.equal(part(model).adapter.embedding, expected)
    sampled = part(converted(PromptTuningConfig(prompt_tuning_init="sample_vocab"), vocab=300))
    table = sampled.get_input_embeddings().weight
    assert all(bool((table == row).all(1).any()) for row in sampled.adapter.embedding)
    assert len(sampled.adapter.embedding) == 20
    zero = converted(PrefixTuningConfig(init_weights="zero", prefix_projection=True))
    assert not part(zero).prefix().any()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: tiny_llama().model, "LlamaModel is a bare decoder: prompt tuning stands between a decoder and what"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), "one causal model of transformers, Sequential holds 0: use LoRA"),
        (tiny_bert, "causal language models, not for BertForSequenceClassification, which generates no text"),
        (vision, "not for ViTForImageClassification, whose decoder takes no `inputs_embeds`: use LoRA"),
    ],
)
def test_other_models_are_refused(make: Callable[[], nn.Module], text: str) -> None:
    with pytest.raises(UnsupportedError, match=text):
        apply_adapters(make(), PROMPT)


def test_encoder_decoders_and_other_attention_are_refused() -> None:
    from transformers import LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_heads=4))
    with pytest.raises(UnsupportedError, match="prefix tuning is not built for encoder-decoders such as T5ForCond"):
        apply_adapters(t5, PREFIX)
    with pytest.raises(UnsupportedError, match="not for LlamaForSequenceClassification, which generates no text"):
        apply_adapters(LlamaForSequenceClassification(tiny_llama().config), PROMPT)
    model = tiny_llama()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(UnsupportedError, match="keys and values of one shape in every layer, LlamaModel has 'linear_a"):
        apply_adapters(model, PREFIX)


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        (PromptTuningConfig, {"num_virtual_tokens": 0}, "`num_virtual_tokens` must be an integer of at least 1, got 0"),
        (PromptTuningConfig, {"prompt_tuning_init": "zeros"}, "`prompt_tuning_init` must be one of"),
        (PromptTuningConfig, {"prompt_tuning_init": "text"}, "needs `prompt_tuning_init_text`, got None"),
        (
            PromptTuningConfig,
            {"prompt_tuning_init": "text", "prompt_tuning_init_text": "a"},
            "needs `tokenizer_name_or_path`, got None",
        ),
        (PromptTuningConfig, {"prompt_tuning_init_text": "a"}, 'is of use with `prompt_tuning_init="text"` alone'),
        (PromptTuningConfig, {"target_modules": ["q_proj"]}, "prompt tuning has no `target_modules`"),
        (PrefixTuningConfig, {"modules_to_save": ["lm_head"]}, "prefix tuning has no `modules_to_save`"),
        (PrefixTuningConfig, {"encoder_hidden_size": 8}, "is of use with `prefix_projection=True` alone"),
        (PrefixTuningConfig, {"prefix_projection": "yes"}, "`prefix_projection` must be true or false, got 'yes'"),
        (PrefixTuningConfig, {"init_weights": "one"}, "`init_weights` must be \"zero\" or null, got 'one'"),
    ],
)
def test_bad_arguments(kind: Any, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        kind(**values)


@BOTH
def test_it_is_pickled_and_moved(config: AdapterConfig) -> None:
    model = converted(config)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, 7, 21), logits(model, 7, 21))
    model.to(torch.bfloat16)
    assert {p.dtype for p in part(model).adapter.parameters()} == {torch.float32}
    assert logits(model, 7, 21).dtype == torch.bfloat16
