# SPDX-License-Identifier: Apache-2.0
"""Plans: counts are those of the converted model, what fits does fit, and the advice follows the goal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, ViTConfig

from lightning_lora import LoRAConfig, apply_lora, plan
from lightning_lora.cli.main import main
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.planning.architecture import architecture, build, read_config
from lightning_lora.planning.devices import DEVICES, find_device

LLAMA = LlamaConfig(
    vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
TIED = LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": True})
GPT2 = GPT2Config(vocab_size=512, n_embd=128, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
def test_counts_are_exactly_those_of_the_converted_model(config: Any, quantize: str, dtype: torch.dtype) -> None:
    lora = LoRAConfig(r=7, quantize=quantize, rank_pattern={"c_attn" if config is GPT2 else "q_proj": 3})
    found = architecture(config, lora, dtype)
    report = apply_lora(build(config, dtype), lora)
    assert found.params == report.logical_params
    assert found.adapter_params == report.trainable_params
    assert found.nbytes == report.base_bytes
    assert found.packed_nbytes == report.packed_bytes
    assert len(found.adapted) == len(report.adapted)


def test_rows_of_an_8b_model() -> None:
    methods = plan(LLAMA_8B, gradient_checkpointing=True).methods
    params, adapters = 8_030_261_248, 41_943_040
    full, lora, qlora = (methods[name].memory for name in ("full", "lora", "qlora"))
    assert full.fixed == pytest.approx(16 * params, rel=1e-6)  # and a few buffers
    assert lora.fixed == pytest.approx(2 * params + 16 * adapters, rel=1e-6)
    assert 5.9e9 < qlora.weights < 6.1e9
    assert qlora.adapters == lora.adapters == 4 * adapters == methods["lora"].file_bytes
    assert methods["full"].file_bytes == 2 * params
    assert methods["full"].trainable_params == params
    for memory in (full, lora, qlora):
        parts = [value for name, value in vars(memory).items() if name != "total"]
        assert memory.total == sum(parts)


def test_more_tokens_take_more_and_checkpointing_less() -> None:
    one, two, kept = (plan(LLAMA, **a).methods["lora"] for a in (
        {"batch_size": 1}, {"batch_size": 2}, {"batch_size": 1, "gradient_checkpointing": True}
    ))  # fmt: skip
    assert two.memory.activations == pytest.approx(2 * one.memory.activations, rel=0.02)
    assert kept.memory.activations < one.memory.activations
    assert kept.step_flops > one.step_flops


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("gpu", ["24GB", "a100-40gb"])
def test_the_largest_batch_fits_and_the_next_does_not(gpu: str, method: str) -> None:
    given: dict[str, Any] = {"gpu": gpu, "sequence_length": 512, "gradient_checkpointing": True}
    largest = plan(LLAMA_8B, **given).methods[method].largest_batch
    assert largest is not None
    assert largest > 0
    assert plan(LLAMA_8B, batch_size=largest, **given).methods[method].fits is True
    assert plan(LLAMA_8B, batch_size=largest + 1, **given).methods[method].fits is False


def test_time_and_cost_follow_tokens_rate_and_price() -> None:
    found = plan(LLAMA_8B, gpu="h100", examples=1000, epochs=2, sequence_length=1024, price=3.0)
    for method in found.methods.values():
        assert method.tokens_per_second is not None
        assert method.hours == pytest.approx(2 * 1000 * 1024 / method.tokens_per_second / 3600)
        assert method.cost == pytest.approx(3.0 * (method.hours or 0))
    full, lora = found.methods["full"], found.methods["lora"]
    assert 1.4 < full.step_flops / lora.step_flops < 1.5  # three products of the weights against two and a little


def choice(goal: str, gpu: str | None = None, **given: Any) -> str | None:
    return plan(LLAMA_8B, gpu=gpu, goal=goal, gradient_checkpointing=True, **given).advice.method


def test_advice_follows_the_goal_and_what_fits() -> None:
    assert choice("behaviour") == "lora"
    assert choice("behaviour", "16GB") == "qlora"
    assert choice("behaviour", "8GB") is None
    assert choice("knowledge") == "full"
    assert choice("knowledge", "24GB", config=LoRAConfig()) == "lora"
    assert choice("knowledge", "24GB") == "qlora"  # at rank 64, which is advised, LoRA does not fit
    assert choice("narrow", examples=200_000) == "full"
    assert choice("narrow", examples=5_000) == "lora"
    assert choice("behaviour", examples=20_000_000) == "full"
    knowledge = plan(LLAMA_8B, gpu="24GB", goal="knowledge", gradient_checkpointing=True).advice
    assert knowledge.r == 64
    assert any("target_tasks" in text for text in knowledge.warnings)
    assert any("would be the first choice and does not fit" in text for text in knowledge.reasons)
    few = plan(LLAMA, examples=300).advice
    assert few.r == 8
    assert "300 examples are few" in few.warnings[0]


def test_it_is_read_from_folders_files_and_values(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    wanted = plan(LLAMA).to_dict()
    for given in (
        tmp_path,
        str(tmp_path),
        tmp_path / "config.json",
        json.loads((tmp_path / "config.json").read_text()),
    ):
        assert plan(given).to_dict() == wanted
    json.dumps(wanted, allow_nan=False)


def test_the_table_is_of_the_rank_that_is_advised_or_asked_for() -> None:
    for found, r in (
        (plan(LLAMA, examples=10), 8),
        (plan(LLAMA, goal="knowledge", gpu="24GB", config=LoRAConfig(r=4)), 4),
        (plan(LLAMA, examples=10, config=LoRAConfig(r=32)), 32),
    ):
        assert found.r == r
        assert found.advice.r in (r, None)
        assert found.adapter_params == plan(LLAMA, config=LoRAConfig(r=r)).adapter_params
        assert f"in adapters of rank {r} on" in str(found)
    assert any("r=8 is where to begin" in text for text in found.advice.reasons)


@pytest.mark.parametrize(("config", "meant"), [(LLAMA, "rotary"), (GPT2, "its forward fails")])
def test_sequences_beyond_the_context_are_said_and_never_advised(config: Any, meant: str) -> None:
    own = type(config)(**{**config.to_dict(), "max_position_embeddings": 256, "n_positions": 256})
    within = plan(own, sequence_length=256, gpu="h100")
    assert (within.context, within.notes) == (256, [])
    assert within.methods["lora"].largest_sequence == 256
    assert "256 (context)" in str(within)
    beyond = plan(own, sequence_length=300, gpu="h100")
    assert "300 tokens are more than the model's context of 256" in beyond.notes[0]
    assert meant in beyond.notes[0]
    assert ("total without activations" in str(beyond)) == (config is GPT2)


def test_the_context_of_a_scaled_rotation_is_the_longer_one() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4}
    values = {**LLAMA.to_dict(), "max_position_embeddings": 512, "rope_parameters": rope}
    assert plan(values, sequence_length=2048).notes == []
    assert plan({**values, "max_position_embeddings": 4096}, sequence_length=64).context == 4096


ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_a_classifier_is_counted_within_its_positions() -> None:
    config = BertConfig(vocab_size=99, **ENCODER, architectures=["BertForSequenceClassification"])
    found = plan(config, sequence_length=128)
    assert found.model == "BertForSequenceClassification"
    assert found.methods["lora"].trainable_params > found.adapter_params  # and the head, trained in full
    assert found.methods["lora"].memory.activations > 0
    assert found.notes == []
    longer = plan(config, sequence_length=2048, gpu="24GB")
    assert longer.methods["lora"].memory.activations == 0
    assert "cannot be counted for 2,048 tokens: it has 512 positions" in longer.notes[1]
    assert "total without activations" in str(longer)


def test_a_model_of_images_is_counted_without_its_activations() -> None:
    found = plan(ViTConfig(**ENCODER, architectures=["ViTForImageClassification"]))
    (note,) = found.notes
    assert "counted of sequences of tokens, and the model of ViTConfig takes none" in note
    assert "total without activations" in str(found)


def test_short_runs_have_minutes_and_cents() -> None:
    text = str(plan(LLAMA, gpu="h100", examples=9_000_000, sequence_length=1024, price=3.0))
    hours, cost = (next(line for line in text.splitlines() if line.startswith(row)) for row in ("hours", "cost"))
    assert " min" in hours
    assert float(cost.split()[-1]) < 1
    tiny = str(plan(LLAMA, gpu="h100", examples=1, sequence_length=16, price=3.0))
    assert "<0.1 min" in tiny
    assert "<0.01" in tiny


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"gpu": "h1000"}, r"`gpu`='h1000' is not in the table \(nearest: h100"),
        ({"goal": "fun"}, r"`goal`='fun' is none that is known: 'behaviour' for a style"),
        ({"batch_size": 0}, r"`batch_size` must be a whole number above 0, got 0"),
        ({"sequence_length": 1.5}, r"`sequence_length` must be a whole number above 0, got 1.5"),
        ({"epochs": -1}, r"`epochs` must be a number above 0, got -1"),
        ({"examples": -1}, r"`examples` must be a number of 0 or more, or null: got -1"),
        ({"dtype": "int4"}, r'`dtype` must be "bf16", "fp16" or "fp32", got \'int4\''),
        ({"model": "no/such"}, r"no configuration at 'no/such', and none of that name in the local cache"),
        (
            {"model": {"model_type": "nothing"}},
            r"`model_type` 'nothing' is none that this version of transformers \(\d[\w.]*\) knows$",
        ),
        ({"model": {"model_type": "lama"}}, r"'lama' is none .* knows; nearest: llama"),
        ({"model": {}}, r"`model_type` None is none"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        plan(**{"model": LLAMA, **given})


def test_adapters_that_match_nothing_are_an_error() -> None:
    with pytest.raises(TargetError):
        plan(LLAMA, config=LoRAConfig(target_modules=["qproj"]))


def test_a_broken_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is no JSON.*Give the model's config.json"):
        read_config(tmp_path)


def test_a_file_of_no_mapping_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    assert main(["plan", str(tmp_path)]) == 2
    assert "config.json holds a list, not a mapping of keys" in capsys.readouterr().err


def test_devices_go_by_any_spelling() -> None:
    assert find_device("A100 80GB") is find_device("a100_80gb") is DEVICES["a100-80gb"]
    assert find_device("48gb").memory == 48e9


def test_the_command_prints_the_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLAMA_8B.save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--gpu", "24GB", "--examples", "50000", "--gradient_checkpointing"]) == 0
    text = capsys.readouterr().out
    for part in ("QLoRA", "8,030,261,248", "largest batch", "Take LoRA with r=16, lora_alpha=32", "Assumed: 8 %"):
        assert part in text
    assert main(["plan", str(tmp_path), "--gpu", "8GB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["advice"]["method"] is None
    assert found["methods"]["qlora"]["fits"] is False
    assert main(["plan", str(tmp_path / "nothing")]) == 2
    assert "nothing is downloaded" in capsys.readouterr().err
