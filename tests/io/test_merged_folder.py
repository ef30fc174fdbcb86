# SPDX-License-Identifier: Apache-2.0
"""The merged folder: transformers loads it cleanly, it computes what the live model computes, nothing moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, MergeError, Notice, UnsupportedError
from lightning_lora.io.merge import merge_adapters
from lightning_lora.io.merged_folder import check_target, write_merged
from lightning_lora.model.apply import apply_lora
from tests.helpers import LM, TinyNet, named_tensors, random_adapters, tiny_gpt2, tiny_llama
from tests.io.merging import IDS, error, logits


def adapted(base: nn.Module, **config: Any) -> nn.Module:
    apply_lora(base, LoRAConfig(**{"r": 4, **config}))
    return random_adapters(base)


def tied_llama() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


CASES = {
    "llama": (tiny_llama, {}),
    "llama, packed": (tiny_llama, {"quantize": "nf4"}),
    "llama, packed but not all adapted": (tiny_llama, {"quantize": "nf4-dq", "target_modules": ["q_proj"]}),
    "llama, tied": (tied_llama, {}),
    "llama, tied, head kept": (tied_llama, {"modules_to_save": ["lm_head"]}),
    "llama, tied, embeddings kept": (tied_llama, {"modules_to_save": ["embed_tokens"]}),
    "llama, tied, both kept": (tied_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2": (tiny_gpt2, {}),
    "gpt2, packed": (tiny_gpt2, {"quantize": "int8"}),
    "gpt2, head kept": (tiny_gpt2, {"modules_to_save": ["lm_head"]}),
    "gpt2, tied head adapted": (tiny_gpt2, {"target_modules": ["c_attn", "lm_head"]}),
}


@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "in a LightningModule"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_it_cleanly_and_gives_the_live_logits(case: str, wrap: bool, tmp_path: Path) -> None:
    make, config = CASES[case]
    model = adapted(LM(make()) if wrap else make(), **config)
    live, before = logits(model), {n: t.clone() for n, t in named_tensors(model)}
    inner = model.net if wrap else model
    settings, generation = inner.config.to_dict(), inner.generation_config.to_dict()
    report = write_merged(model, tmp_path / "m")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values()), info
    assert error(logits(loaded), live) < 1e-4
    assert report.logit_error is not None
    assert report.logit_error < 1e-4
    assert report.checked_on == "fixed token ids"
    written = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert written["logit_error"] == report.logit_error
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    # nothing in memory has changed
    assert all(torch.equal(t, before[n]) for n, t in named_tensors(model))
    assert (inner.config.to_dict(), inner.generation_config.to_dict()) == (settings, generation)
    tied_still = "tied" in case and "kept" not in case and "head" not in case
    assert loaded.config.tie_word_embeddings is (tied_still or case in ("gpt2", "gpt2, packed"))


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_dtype_is_the_bases_or_the_one_asked_for(quantize: str, dtype: str, tmp_path: Path) -> None:
    model = adapted(tiny_llama().bfloat16(), quantize=quantize)
    report = write_merged(model, tmp_path / "m", dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert loaded.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert report.logit_limit == 5e-2  # the live model computes in bf16
    assert error(logits(loaded), logits(model)) < 5e-2


def test_a_classifier_keeps_its_head(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    model = adapted(LlamaForSequenceClassification(config), modules_to_save=["score"])
    write_merged(model, tmp_path / "m")
    loaded = LlamaForSequenceClassification.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.score.weight, model.score.trained.weight)
    assert error(logits(loaded), logits(model)) < 1e-4


def test_an_encoder_decoder_works_too(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    report = write_merged(adapted(T5ForConditionalGeneration(config)), tmp_path / "m")
    assert report.logit_error is not None
    assert report.logit_error < 1e-4


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_plain_module_gives_a_state_dict_that_loads_strictly(quantize: str, tmp_path: Path) -> None:
    model = adapted(LM(TinyNet()), quantize=quantize)
    inputs = {"a batch": [{"net": ((IDS,), {})}]}
    report = write_merged(model, tmp_path / "m", inputs=inputs)
    plain = LM(TinyNet())
    plain.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"), strict=True)
    assert error(logits(plain), logits(model)) < 1e-5
    assert report.logit_error is not None
    assert report.logit_error < 1e-5
    with pytest.warns(Notice, match="could not be compared"):  # there is nothing to compare on
        assert write_merged(model, tmp_path / "m").logit_error is None


def test_a_batch_that_cannot_be_run_again_gives_way_to_fixed_ids(tmp_path: Path) -> None:
    report = write_merged(
        adapted(tiny_llama()), tmp_path / "m", inputs={"a batch": [{"": ((), {"attention_mask": IDS})}]}
    )
    assert report.checked_on == "fixed token ids"
    assert report.logit_error < 1e-4


@pytest.mark.parametrize("where", ["layer", "saved"])
def test_weights_that_are_not_finite_are_not_written(where: str, tmp_path: Path) -> None:
    model = adapted(LM(TinyNet()), modules_to_save=["second"])
    broken = model.net.first.lora_B if where == "layer" else model.net.second.trained.bias
    broken.data[0] = float("inf")
    with pytest.raises(MergeError, match="merged weights are not finite in 1 modules, 'net.(first|second.bias)'"):
        write_merged(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MergeError, match="not finite in 1 modules, 'net.(first|second)'"):
        merge_adapters(model)


def test_a_weight_that_fp16_has_no_room_for_is_refused(tmp_path: Path) -> None:
    model = adapted(LM(TinyNet()))
    model.net.first.base_layer.weight.data[0, 0] = 1e5
    with pytest.raises(MergeError, match='float16 has no room for them .merge with dtype="fp32"'):
        write_merged(model, tmp_path / "m", "fp16")


def test_a_difference_past_the_limit_leaves_no_folder(tmp_path: Path) -> None:
    class Drifts(TinyNet):
        """Its copy computes something else."""

        def __deepcopy__(self, memo: dict) -> nn.Module:
            other = TinyNet()
            apply_lora(other, LoRAConfig(r=4))
            other.forward = lambda ids: 2 * TinyNet.forward(other, ids)  # type: ignore[method-assign]
            return other

    model = adapted(Drifts())
    with pytest.raises(MergeError, match=r"outputs differ from the live model's by 1\.000e\+00, the limit"):
        write_merged(model, tmp_path / "m", inputs={"a batch": [{"": ((IDS,), {})}]})
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    write_merged(adapted(base), tmp_path / "given", tokenizer=tokenizer)
    assert (tmp_path / "given" / "tokenizer.json").is_file()
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "additional_chat_templates").mkdir()
    others = ["source.spm", "video_preprocessor_config.json", "modeling_own.py", "additional_chat_templates/rag.jinja"]
    for name in others:
        (tmp_path / "base" / name).write_text("x")
    local = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    write_merged(adapted(local), tmp_path / "copied")
    assert all((tmp_path / "copied" / name).is_file() for name in ["tokenizer.json", *others])


def test_an_earlier_merged_folder_is_replaced_and_others_are_not(tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    write_merged(model, tmp_path / "m")
    (tmp_path / "m" / "stale.txt").write_text("old")
    write_merged(model, tmp_path / "m")
    assert not (tmp_path / "m" / "stale.txt").exists()
    (tmp_path / "mine").mkdir()
    check_target(tmp_path / "mine")
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(MergeError, match="not empty and holds no earlier merged model"):
        write_merged(model, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(MergeError, match="is a file: choose another path"):
        check_target(tmp_path / "mine" / "thesis.tex")


def test_a_model_without_adapters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters to merge"):
        write_merged(tiny_llama(), tmp_path / "m")


def test_a_class_that_needs_more_than_its_config_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    class Special(LlamaForCausalLM):
        def __init__(self, config: Any, extra: int) -> None:
            super().__init__(config)
            self.extra = extra

    model = adapted(Special(tiny_llama().config, 3))
    with pytest.raises(UnsupportedError, match="Special cannot be built from its config alone"):
        write_merged(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_random_numbers_and_train_flags_are_left_alone(tmp_path: Path) -> None:
    model = adapted(tiny_llama(), lora_dropout=0.5).train()
    state = torch.get_rng_state()
    write_merged(model, tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
