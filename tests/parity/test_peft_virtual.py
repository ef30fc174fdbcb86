# SPDX-License-Identifier: Apache-2.0
"""Prompt and prefix tuning against PEFT: logits, gradients, generation and folders, both ways."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import lightning_lora
from lightning_lora import apply_adapters, load_adapter, save_adapter
from lightning_lora.errors import UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.virtual import VirtualTokens
from tests.helpers import tiny_gpt2, tiny_llama

COUNT = 5
IDS = torch.tensor([[7, 21, 33, 4, 50, 19, 8, 61, 12], [9, 9, 41, 30, 22, 17, 5, 44, 3]])
FULL = torch.ones_like(IDS)
RIGHT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
LEFT = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def grouped() -> nn.Module:
    return tiny_llama(num_attention_heads=4, num_key_value_heads=2)


MAKES = [tiny_llama, grouped, tiny_gpt2]
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompt": ({}, {}),
    "prefix": ({}, {}),
    "projected": (
        {"prefix_projection": True, "encoder_hidden_size": 24},
        {"prefix_projection": True, "encoder_hidden_size": 24},
    ),
}


def pair(make: Callable[[], nn.Module], kind: str) -> tuple[nn.Module, VirtualTokens, Any, nn.Module]:
    """Our model and its decoder, PEFT's and its encoder, of the same values."""
    own, theirs = KINDS[kind]
    model = make().eval()
    peft_kind: Any = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    torch.manual_seed(5)
    peft = get_peft_model(copy.deepcopy(model), peft_kind(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, **theirs))
    config = lightning_lora.PromptTuningConfig if kind == "prompt" else lightning_lora.PrefixTuningConfig
    apply_adapters(model, config(num_virtual_tokens=COUNT, **own))
    ((_, decoder),) = adapter_modules(model)
    assert isinstance(decoder, VirtualTokens)
    encoder = peft.prompt_encoder["default"]
    state = {name.replace("embedding.weight", "embedding"): t for name, t in encoder.state_dict().items()}
    decoder.adapter.load_state_dict(state)
    return model, decoder, peft, encoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_logits_and_gradients(make: Callable[[], nn.Module], kind: str) -> None:
    model, decoder, peft, encoder = pair(make, kind)
    cut = COUNT if kind == "prompt" else 0
    for mask in (None, FULL, RIGHT, LEFT):
        seen = FULL.bool() if mask is None else mask.bool()
        ours = model(input_ids=IDS, attention_mask=mask).logits
        theirs = peft(input_ids=IDS, attention_mask=mask).logits[:, cut:]
        assert ours.shape == theirs.shape == (2, 9, 64)
        assert (ours - theirs)[seen].abs().max() < 1e-5
        grads = [
            torch.autograd.grad(logits[seen].square().sum(), list(module.parameters()))
            for logits, module in ((ours, decoder.adapter), (theirs, encoder))
        ]
        for a, b in zip(*grads, strict=True):
            assert (a - b).abs().max() < 1e-5 * max(1.0, float(b.abs().max()))
            assert b.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_generation_is_pefts_with_and_without_a_cache(make: Callable[[], nn.Module], kind: str) -> None:
    model, _, peft, _ = pair(make, kind)
    ids = IDS.masked_fill(LEFT == 0, 0)
    words: dict[str, Any] = {"attention_mask": LEFT, "max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    words["eos_token_id"] = None
    theirs = peft.generate(input_ids=ids, **words)
    assert torch.equal(model.generate(input_ids=ids, **words), theirs)
    assert torch.equal(model.generate(input_ids=ids, use_cache=False, **words), theirs)
    alone = model.generate(input_ids=ids[1:, 3:], **{**words, "attention_mask": LEFT[1:, 3:]})
    assert torch.equal(alone[0], theirs[1, 3:])
    beams = [m.generate(input_ids=ids, num_beams=3, **words) for m in (model, peft)]
    assert torch.equal(*beams)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=LEFT).logits[:, -9:][LEFT.bool()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [grouped, tiny_gpt2])
def test_folders_both_ways(make: Callable[[], nn.Module], kind: str, tmp_path: Path) -> None:
    model, decoder, peft, _ = pair(make, kind)
    want = _logits(model)
    save_adapter(model, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["peft_type"] == ("PROMPT_TUNING" if kind == "prompt" else "PREFIX_TUNING")
    assert written["task_type"] == "CAUSAL_LM"
    loaded = PeftModel.from_pretrained(make().eval(), tmp_path / "ours")
    assert (_logits(loaded) - want).abs().max() < 1e-5
    again = make().eval()
    load_adapter(again, tmp_path / "ours")
    assert (_logits(again) - want).abs().max() < 1e-6

    peft.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        other = make().eval()
        load_adapter(other, folder)
        assert (_logits(other) - want).abs().max() < 1e-5
        ((_, there),) = adapter_modules(other)
        assert there.count == COUNT
        assert all(p.requires_grad for p in there.adapter.parameters())
    if kind != "projected":
        with torch.no_grad():
            decoder.adapter.embedding.zero_()
        load_adapter(model, tmp_path / "theirs")
        assert torch.equal(_logits(model), want)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"modules_to_save": ["lm_head"]}, r"`modules_to_save` is \['lm_head'\]; beside virtual tokens no module is"),
        ({"task_type": "SEQ_CLS"}, "`task_type` is 'SEQ_CLS'; virtual tokens are built for causal models"),
        ({"num_transformer_submodules": 2}, "`num_transformer_submodules` is 2; only 1 is built"),
    ],
)
def test_what_is_not_built_is_refused_by_name(words: dict[str, Any], text: str, tmp_path: Path) -> None:
    peft = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    peft.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(written | words))
    with pytest.raises(UnsupportedError, match=text):
        load_adapter(tiny_llama(), tmp_path)
