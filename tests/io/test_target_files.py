# SPDX-License-Identifier: Apache-2.0
"""Targets that are no linear layers through a run, its checkpoints, merges, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from lightning_lora import (
    AdapterDiagnostics,
    AdapterSummary,
    LoRA,
    LoRAConfig,
    MergeOnFitEnd,
    add_tokens,
    add_weighted_adapter,
    apply_lora,
    disable_adapters,
    export_experts,
    load_adapter,
    merge_adapters,
    merge_to_disk,
    merged_state_dict,
    mixed_batch,
    save_adapter,
    set_adapter_scale,
    validate_adapter,
)
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, ConfigError, TargetError, UnsupportedError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.spectrum import adapter_spectra, base_norms
from lightning_lora.strategies.zero_options import refuse_adapters
from small_base.data import MODEL_DIR, load_tokenizer
from tests.helpers import LM, loader, make_trainer, tiny_llama
from tests.model.kinds import CASES, IDS, PARAMS, adapted, logits
from tests.model.nets import notices


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("case", PARAMS)
def test_off_it_is_the_base_and_merged_it_is_the_live_model(case: str) -> None:
    base = logits(CASES[case].make().eval().requires_grad_(False))
    assert torch.allclose(logits(adapted(case, zero=True)), base, atol=1e-6)
    model = adapted(case)
    set_adapter_scale(model, 0.6)
    live = logits(model)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    plain = CASES[case].make().eval()
    plain.load_state_dict(merged_state_dict(model), strict="tied" not in case)
    if case != "tied embedding":  # whose head comes apart, as its state says
        assert error(logits(plain), live) < 1e-5
    report = merge_adapters(model, IDS)
    assert report.logit_error is not None
    assert report.logit_error < 1e-5
    assert report.worst[1] < 1e-6
    assert error(logits(model), live) < 1e-5
    assert not list(adapter_modules(model))
    assert set(model.state_dict()) == set(CASES[case].make().state_dict())
    set_of_types = {type(m) for m in model.modules()}
    assert set_of_types == {type(m) for m in CASES[case].make().modules()}


@pytest.mark.parametrize("case", PARAMS)
def test_a_run_is_resumed_to_the_same_bits_from_adapters_alone(case: str, tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None) -> LM:
        torch.manual_seed(0)
        module = LM(CASES[case].make())
        lora = LoRA(**{"r": 4, "lora_alpha": 6, **CASES[case].config})
        kept = AdapterCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=2, save_top_k=-1)
        make_trainer(tmp_path, [lora, kept]).fit(module, loader(32), ckpt_path=ckpt)
        return module

    uncut = run("uncut")
    cut = tmp_path / "uncut" / "step=2.ckpt"
    own = {f"{name}.{own}" for name, module in adapter_modules(uncut) for own in module.own_names()}
    assert set(read_checkpoint(cut)["state_dict"]) == own
    on = run("on", cut)
    moved = 0
    for (_, a), (_, b) in zip(adapter_modules(uncut), adapter_modules(on), strict=True):
        assert all(torch.equal(a.live(name), b.live(name)) for name in a.own_names())
        moved += not a.untrained()
    assert moved == len(list(adapter_modules(uncut)))
    other = CASES[case].make().eval()
    load_adapter(other, tmp_path / "uncut" / "step=4.ckpt")
    assert torch.equal(logits(other), logits(uncut.net.eval()))


def test_new_words_are_learned_in_a_run_and_found_again(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    ids = add_tokens(model, tokenizer, ["<call>", "</call>"])
    text = torch.tensor([tokenizer.encode("Enter <call>Juliet</call>. What says <call>Nurse</call>?")])
    module = LM(model)
    lora = LoRA(r=4, target_modules=["q_proj"], trainable_token_indices=ids)
    trainer = make_trainer(tmp_path, [lora, MergeOnFitEnd(tmp_path / "merged")], max_steps=3)
    trainer.fit(module, torch.utils.data.DataLoader(text.expand(3, -1)))
    head = model.get_output_embeddings()
    assert head.rows is model.get_input_embeddings().rows  # tied
    trained = logits(model.eval(), text)
    save_adapter(model, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    with pytest.raises(BaseMismatchError, match="were trained on another base"):
        load_adapter(again, tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    add_tokens(again, load_tokenizer(), ["<call>", "</call>"])
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again, text), trained)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert error(logits(merged, text), trained) < 1e-5


def test_experts_are_taken_apart(tmp_path: Path) -> None:
    model = adapted("experts")
    set_adapter_scale(model, 0.5)
    report = export_experts(model, tmp_path / "apart")
    tensors = load_file(tmp_path / "apart" / "adapter_model.safetensors")
    base = revert_weight_conversion(CASES["experts"].make(), CASES["experts"].make().state_dict())
    merged = revert_weight_conversion(CASES["experts"].make(), merged_state_dict(model))
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    assert len(names) == report.layers == 2 * (1 + 3 * 3)
    assert "model.layers.1.block_sparse_moe.experts.2.w3" in names
    for name in names:
        A, B = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert A.shape[0] == B.shape[1] == report.r == 4
        assert error(base[f"{name}.weight"] + B @ A, merged[f"{name}.weight"]) < 1e-6
    assert {key for key in base if not torch.equal(base[key], merged[key])} == {f"{name}.weight" for name in names}
    with pytest.raises(AdapterMismatchError, match="name their parameters in `target_parameters`"):
        export_experts(adapted("tied tokens"), tmp_path / "none")
    with pytest.raises(UnsupportedError, match=r"'model.embed_tokens' is adapted too \(a LoRAEmbedding\)"):
        export_experts(adapted("experts", target_modules=["embed_tokens"]), tmp_path / "more")


@pytest.mark.parametrize("case", ["tied embedding", "convolutions", "attention", "experts", "tied tokens"])
def test_what_is_not_built_is_refused_by_name(case: str, tmp_path: Path) -> None:
    model = adapted(case)
    save_adapter(model, tmp_path / "a")
    text = r"LoRA on|training of token rows|`target_parameters` and `trainable_token_indices`"
    for use in (
        lambda: save_adapter(model, tmp_path / "p", layout="portable"),
        lambda: load_adapter(model, tmp_path / "a", name="second"),
        lambda: add_weighted_adapter(model, ["default"], [0.5], "sum"),
        lambda: mixed_batch(model, ["default", "default"]).__enter__(),
        lambda: refuse_adapters(model),  # DeepSpeed's
    ):
        with pytest.raises(UnsupportedError, match=text):
            use()
    for target in ("vllm", "sglang", "tgi", "llama.cpp"):
        rules = {problem.rule for problem in validate_adapter(tmp_path / "a", target).problems}
        own = {"embeddings", "convolutions", "experts", "token_rows"} & rules
        assert own or (case == "tied embedding" and target != "tgi"), target  # they take an embedding's factors
    assert validate_adapter(tmp_path / "a", "peft").ok
    if case != "tied tokens":
        with pytest.raises(UnsupportedError, match="`use_dora=True` is built for linear layers"):
            adapted(case, use_dora=True)
    summary, diagnostics = AdapterSummary(), AdapterDiagnostics(every_n_steps=1)
    module = LM(CASES[case].make())
    trainer = make_trainer(tmp_path, [LoRA(**{"r": 4, **CASES[case].config}), summary, diagnostics], max_steps=2)
    trainer.fit(module, loader(16))


def test_spectra_are_those_of_the_updates() -> None:
    for case in ("tied embedding", "convolutions", "attention"):
        model = adapted(case)
        set_adapter_scale(model, 0.5)
        found = adapter_spectra(model, base_norms(model))
        changed = merged_state_dict(model)
        start = CASES[case].make().state_dict()
        for name, spectrum in found.items():
            key = name if name in changed else f"{name}.weight"
            update = (changed[key] - start[key]).flatten(1)
            assert abs(spectrum.norm - float(update.norm())) < 1e-4 * spectrum.norm, name
            assert abs(spectrum.singular_values[0] - float(torch.linalg.matrix_norm(update, 2))) < 1e-4 * spectrum.norm
            assert abs(spectrum.base_norm - float(start[key].norm())) < 1e-4 * spectrum.base_norm
    assert {name.rpartition(".")[2] for name in adapter_spectra(adapted("experts"))} == {"q_proj"}


@pytest.mark.parametrize("case", PARAMS)
def test_folder_and_checkpoint_say_the_size_of_each_update(case: str, tmp_path: Path) -> None:
    module = LM(CASES[case].make())
    trainer = make_trainer(tmp_path, [LoRA(**{"r": 4, "lora_alpha": 6, **CASES[case].config})], max_steps=2)
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    save_adapter(module, tmp_path / "adapter")
    live = {} if case == "experts alone" else adapter_spectra(module.net)  # of which none is one product
    sizes = {name.replace(".in_proj_weight", ""): spectrum.norm for name, spectrum in live.items()}
    for place in (tmp_path / "adapter", tmp_path / "run.ckpt"):
        found = {name.removeprefix("net."): spectrum.norm for name, spectrum in adapter_facts(place).modules.items()}
        assert found == pytest.approx(sizes, rel=1e-5)


def test_merging_on_disk_is_refused_by_name(tmp_path: Path) -> None:
    for case, what in (
        ("tied embedding", "an embedding"),
        ("experts alone", "fused experts"),
        ("tied tokens", "trained token rows"),
    ):
        CASES[case].make().save_pretrained(tmp_path / case / "base")
        save_adapter(adapted(case), tmp_path / case / "a")
        with pytest.raises(UnsupportedError, match=f"is of {what}, which is not merged on disk"):
            merge_to_disk(tmp_path / case / "base", tmp_path / case / "a", tmp_path / case / "merged")


def test_a_convolution_with_groups_trains_and_is_not_merged(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(64, 8), nn.Conv1d(16, 16, 1, groups=4), nn.Linear(8, 64))

    model = net()
    apply_lora(model, LoRAConfig(r=4, target_modules=["1", "2"]))
    nn.init.normal_(model[1].adapter.lora_B)
    x = torch.randint(0, 64, (2, 16))
    trained = model(x)
    for merge in (merge_adapters, merged_state_dict):
        with pytest.raises(UnsupportedError, match="convolutions cannot be merged: with 4 groups it mixes"):
            merge(model)
    assert torch.equal(model(x), trained)  # nothing was merged
    save_adapter(model, tmp_path / "a")
    again = net()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again(x), trained)


def test_names_choose_and_all_linear_does_not() -> None:
    model = tiny_llama()
    assert not any("embed" in name for name in apply_lora(model, LoRAConfig(r=2)).adapted)
    said = notices(lambda: adapted("tied embedding"))
    assert any("'lm_head' shares its weight with the embedding 'model.embed_tokens'" in text for text in said)
    packed = tiny_llama()
    report = apply_lora(packed, LoRAConfig(r=2, target_modules=["embed_tokens", "q_proj"], quantize="nf4"))
    assert report.adapted[0] == "model.embed_tokens"
    assert report.packed_bytes < report.base_bytes


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"target_parameters": ["experts.nothing"]}, TargetError, "entry 'experts.nothing' names no parameter"),
    ({"target_parameters": ["q_proj.weight"]}, UnsupportedError, "`target_parameters` and .* by `target_modules`"),
    ({"trainable_token_indices": {"nothing": [1]}}, TargetError, "entry 'nothing' matches no module"),
    ({"trainable_token_indices": [99]}, TargetError, r"\[99\] are beyond the 64 rows"),
    ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, UnsupportedError, "in full"),
    ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, UnsupportedError, "choose one of the two"),
    ({"target_modules": ["embed_tokens"], "use_dora": True}, UnsupportedError, "'model.embed_tokens' is a Embedding"),
]


@pytest.mark.parametrize(("config", "kind", "text"), WRONG)
def test_wrong_choices_are_named(config: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        apply_lora(tiny_llama(), LoRAConfig(**config))


@pytest.mark.parametrize("ids", [[], [-1], [1, 1], [1.5], {"a": 3}, {"a": []}, "12", {1: [2]}])
def test_ids_are_checked(ids: Any) -> None:
    with pytest.raises(ConfigError, match="must be a list of different token ids of 0 or more"):
        LoRAConfig(trainable_token_indices=ids)
    with pytest.raises(ConfigError, match="`target_modules` must name something"):
        LoRAConfig(target_modules=[])
    with pytest.raises(ConfigError, match="`target_parameters` must be a list of names or null"):
        LoRAConfig(target_parameters="experts")  # type: ignore[arg-type]
    config = LoRAConfig(target_modules=[], target_parameters=["a.b"], trainable_token_indices={"c": [1, 2]})
    assert LoRAConfig.from_dict(config.to_dict()) == config


def test_experts_of_several_ranks_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="several ranks or scales: those of one module share theirs"):
        adapted("experts", rank_pattern={"experts.down_proj": 2})
