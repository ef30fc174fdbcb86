# SPDX-License-Identifier: Apache-2.0
"""Merging folder into folder: the live model's function, the bits of a merge in memory, and never half a folder."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_lora import bars
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError, MergeError, UnsupportedError
from lightning_lora.io.adapter import save_adapter
from lightning_lora.io.merge import merge_adapters
from lightning_lora.io.merge_disk import merge_to_disk
from lightning_lora.model.apply import apply_lora, set_adapter_scale
from lightning_lora.nn.quantized import PackedWeight
from tests.helpers import LM, TinyNet, random_adapters, tiny_gpt2, tiny_llama
from tests.io.merging import edit, error, logits, merge, tensors_of, tied_llama, trained

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tiny_llama, {}),
    "llama, patterns and rslora": (tiny_llama, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "llama, head adapted": (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "llama, head kept": (tiny_llama, {"modules_to_save": ["lm_head"]}),
    "llama, nf4": (tiny_llama, {"quantize": "nf4"}),
    "llama, nf4-dq, not all adapted": (tiny_llama, {"quantize": "nf4-dq", "target_modules": ["q_proj"]}),
    "llama, fp4, some left out": (tiny_llama, {"quantize": "fp4", "exclude_modules": ["down_proj"]}),
    "llama, int8": (tiny_llama, {"quantize": "int8"}),
    "tied": (tied_llama, {}),
    "tied, nf4": (tied_llama, {"quantize": "nf4"}),
    "tied, head adapted": (tied_llama, {"target_modules": ["q_proj", "lm_head"]}),
    "tied, head kept": (tied_llama, {"modules_to_save": ["lm_head"]}),
    "tied, embeddings kept": (tied_llama, {"modules_to_save": ["embed_tokens"]}),
    "tied, both kept": (tied_llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2": (tiny_gpt2, {}),
    "gpt2, nf4": (tiny_gpt2, {"quantize": "nf4"}),
    "gpt2, tied head adapted": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj", "lm_head"]}),
    "gpt2, tied head kept": (tiny_gpt2, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_the_folder_holds_the_bits_of_a_merge_in_memory(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, config = CASES[case]
    model = trained(tmp_path, make, dtype, **config)
    report = merge(tmp_path, max_shard_size="60KB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert error(logits(loaded), logits(model)) < (1e-5 if dtype == torch.float32 else 5e-2)
    in_memory = merge_adapters(model)
    state = loaded.state_dict()
    assert {n: t.dtype for n, t in model.state_dict().items()} == {n: t.dtype for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert report.layers == pytest.approx(in_memory.layers, abs=1e-8)
    assert report.trained == report.layers
    untied = "tied" in case and ("kept" in case or "head" in case)
    assert report.untied is untied
    assert loaded.config.tie_word_embeddings is (("tied" in case or "gpt2" in case) and not untied)
    assert len(report.files) > 1
    assert bool(report.q_over_dw) is ("quantize" in config)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("layout", ["peft", "portable", "PEFT's own"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_pefts_merge_in_fp32_rounded_once(make: Any, layout: str, tmp_path: Path) -> None:
    model = trained(tmp_path, make, torch.bfloat16, use_rslora=True)
    oracle = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter"
    )
    if layout == "PEFT's own":
        oracle.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter" / "lightning_lora.json").unlink()
    elif layout == "portable":
        save_adapter(model, tmp_path / "adapter", layout="portable")
    report = merge(tmp_path)
    expected = {n: t.bfloat16() for n, t in oracle.merge_and_unload().state_dict().items()}
    merged = tensors_of(tmp_path / "merged")
    assert report.files == ["model.safetensors"]
    for name, tensor in merged.items():
        differing = int((tensor != expected[name]).sum())
        assert differing <= (tensor.numel() // 500 if layout == "portable" else 0), name  # s B is rounded in fp32


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [tiny_llama, tied_llama])
def test_pefts_folder_with_an_adapted_head(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    oracle = get_peft_model(make(), config)
    torch.manual_seed(0)
    for name, parameter in oracle.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn(parameter.shape) * 0.1
    oracle.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path)
    assert report.untied is (make is tied_llama)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    assert error(logits(loaded), logits(oracle)) < 1e-5


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_both_bases_and_their_distance_are_reported(quantize: str, tmp_path: Path) -> None:
    model = trained(tmp_path, dtype=torch.bfloat16, quantize=quantize, target_modules=["q_proj", "v_proj"])
    reports = {base: merge(tmp_path, base, base=base) for base in ("dequantized", "original")}
    name = "model.layers.1.self_attn.q_proj"
    W = tensors_of(tmp_path / "base")[f"{name}.weight"]
    W4 = PackedWeight(W, quantize).dequantize(torch.float32)
    delta = model.get_submodule(name).delta_weight()
    assert torch.equal(tensors_of(tmp_path / "dequantized")[f"{name}.weight"], (W4 + delta).bfloat16())
    original = tensors_of(tmp_path / "original")[f"{name}.weight"]
    assert torch.equal(original, (W.float() + delta).bfloat16())
    for base, report in reports.items():
        assert report.base == base
        assert report.q_over_dw[name] == pytest.approx(float((W.float() - W4).norm() / delta.norm()), rel=1e-4)
        assert len(report.q_over_dw) == 4
    assert reports["original"].trained[name] == pytest.approx(error(original.float(), W4 + delta), rel=1e-3)
    assert reports["original"].trained[name] > reports["dequantized"].trained[name]
    other = "model.layers.0.mlp.up_proj.weight"  # packed in training and not adapted
    W = tensors_of(tmp_path / "base")[other]
    unpacked = PackedWeight(W, quantize).dequantize(torch.bfloat16)
    assert torch.equal(tensors_of(tmp_path / "dequantized")[other], unpacked)
    assert torch.equal(tensors_of(tmp_path / "original")[other], W)
    assert "|q|/|dW|" in str(reports["original"])
    written = json.loads((tmp_path / "original" / "merge_report.json").read_text())
    assert written["q_over_dw"] == reports["original"].q_over_dw


def test_the_base_is_packed_from_the_dtype_that_it_was_loaded_in(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")  # fp32 on disk, bf16 in training
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    apply_lora(model, LoRAConfig(r=4, quantize="nf4"))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    merge(tmp_path)
    layer = model.model.layers[0].mlp.up_proj
    merged = tensors_of(tmp_path / "merged")["model.layers.0.mlp.up_proj.weight"]
    assert merged.dtype == torch.float32
    assert torch.equal(merged, layer.base_weight(torch.float32) + layer.delta_weight())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_dtype_that_was_asked_for(dtype: str, tmp_path: Path) -> None:
    model = trained(tmp_path)
    report = merge(tmp_path, dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {t.dtype for t in tensors_of(tmp_path / "merged").values()} == {wanted}
    assert loaded.dtype == wanted
    assert report.dtype == str(wanted).removeprefix("torch.")
    assert error(logits(loaded.float()), logits(model)) < 2e-2


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    model = trained(tmp_path, modules_to_save=["lm_head"])
    model.lm_head.trained.weight.data[0, 0] = float("nan")
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MergeError, match="'lm_head.weight': trained values are not finite"):
        merge(tmp_path)
    model.lm_head.trained.weight.data[0, 0] = 1e6
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"'lm_head.weight': values up to 1e\+06 do not fit torch.float16"):
        merge(tmp_path, dtype="fp16")
    assert not (tmp_path / "merged").exists()
    merge(tmp_path)


def test_a_base_that_fp16_has_no_room_for(tmp_path: Path) -> None:
    trained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.model.norm.weight.data[0] = 1e6
    base.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    with pytest.raises(MergeError, match=r"'model.norm.weight': values up to 1e\+06 do not fit torch.float16"):
        merge(tmp_path, dtype="fp16", check_base=False)
    merge(tmp_path, check_base=False)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    trained(tmp_path)
    base = tmp_path / "base"
    (base / "LICENSE").write_text("mine")
    others = {"source.spm", "bpe.codes", "modeling_own.py", "additional_chat_templates"}
    for name in others - {"additional_chat_templates"}:
        (base / name).write_text("x")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("x")
    (base / "pytorch_model.bin").write_text("no")
    (base / "pytorch_model.bin.index.json").write_text("no")
    (base / "adapter_config.json").write_text("no")
    report = merge(tmp_path, max_shard_size="60KB")
    found = {p.name for p in (tmp_path / "merged").iterdir()}
    assert found == {
        *report.files, "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer.json",
        "LICENSE", "merge_report.json", *others,
    }  # fmt: skip
    assert (tmp_path / "merged" / "additional_chat_templates" / "rag.jinja").is_file()
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.nbytes == sum(t.nbytes for t in tensors_of(base).values())
    for file in report.files:
        with safe_open(tmp_path / "merged" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == file for key in opened.keys())  # noqa: SIM118
        assert (tmp_path / "merged" / file).stat().st_size < 70_000
    merge(tmp_path)  # an earlier one of ours is replaced, as a whole
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()


def test_the_strength_is_merged_too(tmp_path: Path) -> None:
    model = trained(tmp_path, modules_to_save=["lm_head"])
    set_adapter_scale(model, 0.5)
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path)
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-5


def test_a_base_without_its_head(tmp_path: Path) -> None:
    tiny_gpt2().transformer.save_pretrained(tmp_path / "base")  # names lack "transformer."
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_lora(model, LoRAConfig(r=4, quantize="nf4"))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    merge(tmp_path)
    assert "h.0.attn.c_attn.weight" in tensors_of(tmp_path / "merged")
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-5
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_lora(head, LoRAConfig(r=4, target_modules=["lm_head"]))
    save_adapter(random_adapters(head), tmp_path / "adapter")
    edit(tmp_path / "base" / "config.json", architectures=["GPT2LMHeadModel"])
    with pytest.raises(UnsupportedError, match="lack a part of the model's names"):
        merge(tmp_path, "other")


def test_a_task_head_that_the_base_never_had_is_added(tmp_path: Path) -> None:
    base = tiny_llama()
    base.model.save_pretrained(tmp_path / "base")
    config = base.config
    config.num_labels = 3
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    apply_lora(model, LoRAConfig(r=4, modules_to_save=["score"]))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    merge(tmp_path)
    assert torch.equal(tensors_of(tmp_path / "merged")["score.weight"], model.score.trained.weight)


def test_a_classifier_over_an_encoder_that_says_it_is_tied(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        tie_word_embeddings=True, max_position_embeddings=32,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    apply_lora(model, LoRAConfig(r=4, quantize="nf4", modules_to_save=["classifier"]))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    assert not merge(tmp_path).untied
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert error(logits(loaded), logits(model)) < 1e-5


def test_a_plain_modules_weights_without_a_config(tmp_path: Path) -> None:
    torch.manual_seed(3)
    net = TinyNet()
    (tmp_path / "base").mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "weights.safetensors")
    apply_lora(net, LoRAConfig(r=4, quantize="nf4", modules_to_save=["head"]))
    save_adapter(random_adapters(net), tmp_path / "adapter")
    merge(tmp_path)
    plain = TinyNet()
    plain.load_state_dict(tensors_of(tmp_path / "merged"), strict=True)
    assert error(logits(plain), logits(net)) < 1e-5


class Interrupts(logging.Handler):
    """Stops the merge when it reports its second file."""

    def emit(self, record: logging.LogRecord) -> None:
        if "(2 of" in record.getMessage():
            raise KeyboardInterrupt


def test_an_interrupted_merge_leaves_nothing_and_can_be_run_again(tmp_path: Path) -> None:
    trained(tmp_path)
    logger, handler = logging.getLogger("lightning_lora.io.merge_disk"), Interrupts()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path, max_shard_size="60KB")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
    assert merge(tmp_path, max_shard_size="60KB").layers


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_in_a_terminal_and_only_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(tmp_path)
    monkeypatch.setattr(bars, "DELAY", 0.0)
    for stream, progress, shown in ((Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        with contextlib.redirect_stderr(stream):
            merge(tmp_path, progress=progress)
        assert ("merging:" in stream.getvalue()) is shown


KILLED = """
import logging, os, signal, sys
from lightning_lora.io.merge_disk import merge_to_disk
class Kills(logging.Handler):
    def emit(self, record):
        if "(2 of" in record.getMessage():
            os.kill(os.getpid(), signal.SIGKILL)
logger = logging.getLogger("lightning_lora.io.merge_disk")
logger.addHandler(Kills())
logger.setLevel(logging.INFO)
merge_to_disk(*sys.argv[1:4], max_shard_size="60KB")
"""


def test_a_killed_merge_leaves_no_folder_and_its_rubbish_goes_with_the_next(tmp_path: Path) -> None:
    trained(tmp_path)
    merge(tmp_path, dtype="bf16")
    before = tensors_of(tmp_path / "merged")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", KILLED, *paths], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert all(torch.equal(t, before[k]) for k, t in tensors_of(tmp_path / "merged").items())  # the old one stands
    assert len(list(tmp_path.iterdir())) == 4
    merge(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def refused(kind: type[Exception], match: str, tmp_path: Path, **arguments: Any) -> None:
    with pytest.raises(kind, match=match):
        merge(tmp_path, **arguments)
    assert not (tmp_path / "merged").exists()


def test_arguments_that_are_none(tmp_path: Path) -> None:
    refused(ConfigError, "`base` must be", tmp_path, base="packed")
    refused(ConfigError, "`dtype` must be", tmp_path, dtype="int8")
    refused(ConfigError, "`max_shard_size` must be", tmp_path, max_shard_size="much")
    with pytest.raises(ConfigError, match="is where the base or the adapter stands"):
        merge(tmp_path, "base")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(MergeError, match="`out_dir` .* is not empty"):
        merge(tmp_path, "other")
    refused(CheckpointError, "there is no adapter folder", tmp_path)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    trained(tmp_path, quantize="nf4")
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    record, weights = (
        json.loads((adapter / "lightning_lora.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    (adapter / "lightning_lora.json").write_text(json.dumps({k: v for k, v in record.items() if k != "packed"}))
    refused(MergeError, "does not say which layers were", tmp_path)
    (adapter / "lightning_lora.json").write_text(json.dumps({**record, "names": "module"}))
    refused(UnsupportedError, "partly outside the transformers model", tmp_path)
    record["packed"][0]["names"].append("model.layers.9.mlp.up_proj")
    (adapter / "lightning_lora.json").write_text(json.dumps(record))
    refused(MergeError, r"has no 'model.layers.9.mlp.up_proj.weight'; the nearest is", tmp_path)
    (adapter / "lightning_lora.json").unlink()

    def changed(change: Any) -> None:
        tensors = copy.copy(weights)
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    q = "base_model.model.model.layers.0.self_attn.q_proj"
    changed(lambda t: t.pop(f"{q}.lora_A.weight"))
    refused(CheckpointError, "lacks its 'lora_A.weight'", tmp_path)
    changed(lambda t: t.update({f"{q}.lora_magnitude_vector": torch.ones(64)}))
    refused(CheckpointError, "neither a factor of an adapter nor", tmp_path)
    changed(lambda t: t.update({f"{q}.lora_B.weight": torch.ones(63, 4)}))
    refused(MergeError, r"is \(63, 64\) in the adapter and \(64, 64\) in the base", tmp_path)
    changed(lambda t: t.update({f"{q}.lora_B.weight": torch.full((64, 4), float("nan"))}))
    refused(MergeError, "not finite", tmp_path)
    beyond = q.replace("0", "7")
    changed(
        lambda t: t.update({f"{beyond}.lora_A.weight": torch.ones(4, 64), f"{beyond}.lora_B.weight": torch.ones(64, 4)})
    )
    refused(MergeError, "is it another base", tmp_path)
    changed(lambda t: t.update({"base_model.model.model.norm.bias": torch.ones(64)}))
    refused(MergeError, "has no 'model.norm.bias'", tmp_path)
    changed(lambda t: None)
    edit(base / "config.json", quantization_config={"bits": 4})
    refused(UnsupportedError, "quantized already", tmp_path)
    (base / "config.json").write_text("[]")
    refused(CheckpointError, "must hold a JSON object", tmp_path)
    (base / "config.json").write_text("{")
    refused(CheckpointError, "is no JSON", tmp_path)


def test_ties_that_cannot_be_undone_are_refused(tmp_path: Path) -> None:
    trained(tmp_path, tied_llama, modules_to_save=["lm_head"])
    edit(tmp_path / "base" / "config.json", architectures=["Unheard"])
    refused(UnsupportedError, "'lm_head.weight' is trained and the base ties its embeddings", tmp_path)
    trained(tmp_path, tied_llama, target_modules=["lm_head"])
    edit(tmp_path / "base" / "config.json", architectures=["Unheard"])
    refused(MergeError, "has no 'lm_head.weight'", tmp_path)
    trained(tmp_path, tied_llama, modules_to_save=["embed_tokens"])
    edit(tmp_path / "base" / "config.json", architectures=["Unheard"])
    refused(UnsupportedError, "ties its embeddings, and which they are cannot be told", tmp_path)
    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "t5")
    apply_lora(model, LoRAConfig(r=4, target_modules=["lm_head"]))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="encoder-decoder with tied embeddings"):
        merge_to_disk(tmp_path / "t5", tmp_path / "adapter", tmp_path / "merged")


def test_a_module_around_the_model_makes_no_difference(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = LM(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    apply_lora(model, LoRAConfig(r=4, quantize="nf4", exclude_modules=["net.model.layers.0.mlp.up_proj"]))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    merge(tmp_path)
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-5
