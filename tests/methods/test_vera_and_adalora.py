# SPDX-License-Identifier: Apache-2.0
"""VeRA and AdaLoRA in runs, files and merges, and what is refused by name for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import (
    AdaLoRA,
    AdaLoRAConfig,
    AdapterDiagnostics,
    AdapterSummary,
    LoRA,
    MergeOnFitEnd,
    VeRA,
    VeRAConfig,
    add_weighted_adapter,
    disable_adapters,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
    merge_to_disk,
    mixed_batch,
    save_adapter,
    set_adapter_scale,
    validate_adapter,
)
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.errors import AdapterMismatchError, ConfigError, UnsupportedError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.model.apply import apply_adapters
from lightning_lora.model.sharding import shard_model
from lightning_lora.model.slots import adapter_modules
from lightning_lora.strategies.zero_options import refuse_adapters
from tests.cli.tiny import Tiny, TinyData
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_gpt2, tiny_llama
from tests.io.merging import error, logits

WORDS: dict[str, dict[str, Any]] = {
    "vera": {"r": 16, "vera_dropout": 0.1},
    "vera-drawn": {"r": 16, "save_projection": False, "projection_prng_key": 3},
    "adalora": {"init_r": 6, "target_r": 3, "lora_alpha": 8.0, "lora_dropout": 0.1, "tinit": 1, "tfinal": 2},
}
METHODS = pytest.mark.parametrize("method", list(WORDS))
BOTH = pytest.mark.parametrize("method", ["vera", "adalora"])


def config(method: str, **changes: Any) -> VeRAConfig | AdaLoRAConfig:
    kind = AdaLoRAConfig if method == "adalora" else VeRAConfig
    return kind(**{**WORDS[method], **changes})


def callback(method: str, **changes: Any) -> VeRA | AdaLoRA:
    kind = AdaLoRA if method == "adalora" else VeRA
    return kind(**{**WORDS[method], **changes})


def adapted(method: str, make: Any = tiny_llama, **changes: Any) -> nn.Module:
    model = make()
    apply_adapters(model, config(method, **changes))
    return random_adapters(model, std=0.2).eval()


@METHODS
def test_a_run_is_resumed_to_the_same_bits_and_merged(method: str, tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None) -> LM:
        torch.manual_seed(0)
        module = LM(tiny_llama())
        kept = AdapterCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        merged = MergeOnFitEnd(tmp_path / f"{name}-merged")
        trainer = make_trainer(tmp_path, [callback(method), kept, merged], max_steps=8, accumulate_grad_batches=2)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return module

    uncut = run("uncut")
    cut = tmp_path / "uncut" / "step=4.ckpt"
    checkpoint = torch.load(cut, weights_only=True)
    names = {key.rpartition(".")[2] for key in checkpoint["state_dict"]}
    assert (
        names
        == {
            "vera": {"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"},
            "vera-drawn": {"vera_lambda_b", "vera_lambda_d"},
            "adalora": {"lora_A", "lora_B", "lora_E"},
        }[method]
    )
    assert sum(key.endswith("vera_A") for key in checkpoint["state_dict"]) == (method == "vera")
    on = run("on", cut)
    for (_, a), (_, b) in zip(adapter_modules(uncut), adapter_modules(on), strict=True):
        assert all(torch.equal(a.live(name), b.live(name)) for name in a.own_names())
        assert not a.untrained() or method == "adalora"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "uncut-merged")
    assert error(logits(merged), logits(uncut.net)) < 1e-5
    last = cut.with_name("step=8.ckpt")
    for source in (last, adapter_path(str(last))):
        other = tiny_llama()
        load_adapter(other, source)
        assert error(logits(other), logits(uncut.net)) < 1e-6
    before = torch.load(cut, weights_only=True)["lightning_lora"]["config"]
    assert before["method"] == method.partition("-")[0]


@METHODS
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_off_it_is_the_base_and_merged_it_is_the_live_model(method: str, quantize: str) -> None:
    for make in (tiny_llama, tiny_gpt2):
        plain = make()
        apply_adapters(plain, config(method, quantize=quantize))
        base = logits(plain)
        model = adapted(method, make, quantize=quantize)
        live = logits(model)
        assert error(live, base) > 1e-3
        with disable_adapters(model):
            assert torch.equal(logits(model), base)
        set_adapter_scale(model, 0)
        assert torch.equal(logits(model), base)
        set_adapter_scale(model, 0.3)
        assert error(logits(model), base) < error(live, base)
        live = logits(model)
        report = merge_adapters(model, torch.arange(32).view(2, 16) % 61)
        assert report.logit_error is not None
        assert report.logit_error < 1e-5
        assert error(logits(model), live) < 1e-5


@METHODS
def test_a_folder_holds_the_strength(method: str, tmp_path: Path) -> None:
    model = adapted(method, quantize="nf4")
    set_adapter_scale(model, 0.4)
    weak = logits(model)
    save_adapter(model, tmp_path / "weak")
    plain = tiny_llama()
    load_adapter(plain, tmp_path / "weak")
    assert error(logits(plain), weak) < 1e-6
    load_adapter(model, tmp_path / "weak")
    assert error(logits(model), weak) < 1e-6
    assert {module.strength for _, module in adapter_modules(model)} == {1.0}
    saved = save_adapter(model, tmp_path / "bf16", dtype="bf16")
    assert 1e-4 < saved.delta_error < 1e-2
    set_adapter_scale(model, 0)
    with pytest.raises(ConfigError, match="an adapter file needs one above zero"):
        save_adapter(model, tmp_path / "none")
    other = adapted(method, target_modules=["q_proj"])
    with pytest.raises(AdapterMismatchError, match="does not fit the model"):
        load_adapter(other, tmp_path / "weak")


@METHODS
def test_a_module_from_a_checkpoint(method: str, tmp_path: Path) -> None:
    module = Net()
    trainer = make_trainer(tmp_path, [callback(method, quantize="nf4")], max_steps=5)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(again.eval()(ids), module.eval()(ids))
    with pytest.raises(AdapterMismatchError, match="made with another"):
        make_trainer(tmp_path, [LoRA(r=4, quantize="nf4")], max_steps=6).fit(
            Net(), loader(), ckpt_path=tmp_path / "a.ckpt"
        )


class Net(LM):
    """Builds its net from a seed."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(TinyNet())


@BOTH
def test_what_is_not_built_is_refused_by_name(method: str, tmp_path: Path) -> None:
    title = config(method).title
    model = adapted(method)
    tiny_llama().save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "a")
    for where, use in {
        "FSDP 2": lambda: shard_model(model, None),
        "DeepSpeed": lambda: refuse_adapters(model),
        "`mixed_batch`": lambda: mixed_batch(model, ["default"]).__enter__(),
    }.items():
        with pytest.raises(UnsupportedError, match=f"{title}.* is not built for {where}"):
            use()
    with pytest.raises(UnsupportedError, match=f"{title}"):
        add_weighted_adapter(model, ["default"], [1.0], "sum")
    with pytest.raises(UnsupportedError, match=f"{title}"):
        save_adapter(model, tmp_path / "portable", layout="portable")
    with pytest.raises(UnsupportedError, match=f"{title} is not merged on disk"):
        merge_to_disk(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    with pytest.raises(UnsupportedError, match=f"{title}"):
        load_adapter(model, tmp_path / "a", name="other")


@BOTH
def test_what_loaders_and_facts_say(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    save_adapter(model, tmp_path / "a")
    report = validate_adapter(tmp_path / "a", "all")
    rules = {name: [p.rule for p in found] for name, found in report.loaders.items()}
    assert rules["peft"] == []
    assert all("method" in found for name, found in rules.items() if name != "peft")
    facts = adapter_facts(tmp_path / "a")
    assert facts.config["peft_type"] == method.upper()
    assert facts.parameters == save_adapter(model, tmp_path / "a").nbytes // 4


@BOTH
def test_the_size_of_an_update_is_summed_up_and_diagnosed(method: str, tmp_path: Path) -> None:
    summary = AdapterSummary()
    diagnostics = AdapterDiagnostics(every_n_steps=6)
    run = make_trainer(tmp_path, [callback(method), summary, diagnostics], max_steps=6)
    run.fit(module := LM(tiny_llama()), loader())
    assert summary.summary is not None
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert summary.summary.total.trainable_params == trained
    assert diagnostics.report is not None
    spectra = diagnostics.report.modules
    for name, layer in adapter_modules(module):
        size = torch.linalg.matrix_norm(layer.delta_weight()).item()
        assert spectra[name].norm == pytest.approx(size, rel=1e-4, abs=1e-9)
        if method == "adalora":  # what was taken away is no wasted rank
            assert spectra[name].r == max(1, int((layer.triplets.E != 0).sum()))
    assert method != "adalora" or "wasted rank" not in diagnostics.report.advice()


@BOTH
def test_from_yaml_and_back(method: str, tmp_path: Path) -> None:
    words = {**WORDS[method], "target_modules": ["net.0", "net.2"]}
    file = tmp_path / "config.yaml"
    entry = {"class_path": f"lightning_lora.{type(callback(method)).__name__}", "init_args": words}
    trainer = {"max_steps": 6, "accelerator": "cpu", "logger": False, "callbacks": [entry], "max_epochs": 1}
    file.write_text(yaml.safe_dump({"trainer": {**trainer, "enable_progress_bar": False}}))
    cli = LightningCLI(Tiny, TinyData, args=["fit", "--config", str(file)], save_config_callback=None)
    assert [m.title for _, m in adapter_modules(cli.model)] == [config(method).title] * 2
    printed = yaml.safe_load(cli.parser.dump(cli.config))["fit"]["trainer"]["callbacks"][0]
    assert {key: printed["init_args"][key] for key in words} == words
    assert type(config(method)).from_dict(config(method).to_dict()) == config(method)


@pytest.mark.parametrize(
    ("method", "words", "text"),
    [
        ("vera", {"r": 0}, "`r` must be an integer of at least 1, got 0"),
        ("vera", {"d_initial": 0}, "`d_initial` must be a positive number, got 0"),
        ("vera", {"projection_prng_key": -1}, "`projection_prng_key` must be an integer of 0 or more, got -1"),
        ("vera", {"save_projection": "no"}, "`save_projection` must be true or false, got 'no'"),
        ("vera", {"vera_dropout": 1.0}, r"`vera_dropout` must be a number in \[0, 1\), got 1.0"),
        ("vera", {"target_modules": []}, "`target_modules` must name something"),
        ("adalora", {"init_r": 0}, "`init_r` must be an integer of at least 1, got 0"),
        ("adalora", {"target_r": 7}, "`target_r=7` is above `init_r=6`: ranks are taken away, never added"),
        ("adalora", {"lora_alpha": 0}, "`lora_alpha` must be a positive number, got 0"),
        ("adalora", {"lora_dropout": -0.1}, r"`lora_dropout` must be a number in \[0, 1\), got -0.1"),
        ("adalora", {"tinit": -1}, "`tinit` must be a number of optimizer steps, 0 or more, got -1"),
        ("adalora", {"tfinal": 0.5}, "`tfinal` must be a number of optimizer steps, 0 or more, got 0.5"),
        ("adalora", {"deltaT": 0}, "`deltaT` must be an integer of at least 1, got 0"),
        ("adalora", {"beta1": 1}, "`beta1` must be a number between 0 and 1, got 1"),
        ("adalora", {"beta2": 0.0}, "`beta2` must be a number between 0 and 1, got 0.0"),
        ("adalora", {"orth_reg_weight": -1}, "`orth_reg_weight` must be a number of 0 or more, got -1"),
        ("adalora", {"total_step": 0}, "`total_step` must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(method: str, words: dict[str, Any], text: str) -> None:
    for make in (config, callback):
        with pytest.raises(ConfigError, match=text):
            make(method, **words)
