# SPDX-License-Identifier: Apache-2.0
"""DoRA in files and merges: folders, checkpoints, strengths, merged weights, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import (
    LoRA,
    LoRAConfig,
    MergeOnFitEnd,
    add_weighted_adapter,
    apply_lora,
    disable_adapters,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
    mixed_batch,
    save_adapter,
    set_adapter,
    set_adapter_scale,
    use_adapter,
    validate_adapter,
)
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.errors import AdapterMismatchError, UnsupportedError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.spectrum import adapter_spectra
from lightning_lora.nn.dora import MAGNITUDE
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_gpt2, tiny_llama
from tests.io.merging import error, logits, merge, tensors_of, trained
from tests.model.many import adapter_folder

DORA = {"r": 4, "lora_alpha": 6, "use_dora": True}


def dora(make=tiny_llama, **config: object) -> torch.nn.Module:  # type: ignore[no-untyped-def]
    model = make()
    apply_lora(model, LoRAConfig(**{**DORA, **config}))
    return random_adapters(model, std=0.1)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_merged_in_memory_it_is_the_live_model(quantize: str) -> None:
    for make in (tiny_llama, tiny_gpt2):
        model = dora(make, quantize=quantize)
        for strength in (0.3, 1.0):
            set_adapter_scale(model, strength)
            live = logits(model)
        ids = torch.arange(32).view(2, 16) % 61
        report = merge_adapters(model, ids)
        assert report.logit_error is not None
        assert report.logit_error < 1e-5
        assert error(logits(model), live) < 1e-5


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merged_on_disk_it_is_the_live_model(make: object, quantize: str, tmp_path: Path) -> None:
    model = trained(tmp_path, make, quantize=quantize, use_dora=True)
    report = merge(tmp_path)
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-5
    assert max(report.layers.values()) < 1e-6
    written = tensors_of(tmp_path / "merged")
    name, module = next(adapter_modules(model))
    assert error(written[f"{name}.weight"], module.merged_weight(torch.float32)) < 1e-6
    merge(tmp_path, "over", base="original")  # m V / |V| over the base as it is
    over = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(over, without_packing(tmp_path / "adapter"))
    assert error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "over")), logits(over)) < 1e-5


def without_packing(folder: Path) -> Path:
    """The folder as PEFT would have written it."""
    (folder / "lightning_lora.json").unlink()
    return folder


def test_a_folder_holds_the_strength_in_alpha_and_magnitudes(tmp_path: Path) -> None:
    model = dora()
    set_adapter_scale(model, 0.4)
    weak = logits(model)
    save_adapter(model, tmp_path / "weak")
    assert json.loads((tmp_path / "weak" / "adapter_config.json").read_text())["lora_alpha"] == pytest.approx(2.4)
    plain = tiny_llama()
    load_adapter(plain, tmp_path / "weak")
    assert error(logits(plain), weak) < 1e-6
    with pytest.raises(AdapterMismatchError, match="load it under another name"):
        load_adapter(model, tmp_path / "weak")
    load_adapter(model, tmp_path / "weak", name="weak")
    with use_adapter(model, "weak"):
        assert error(logits(model), weak) < 1e-6
    assert torch.equal(logits(model), weak)


def test_residents_are_swapped_with_their_magnitudes(tmp_path: Path) -> None:
    wants = {
        name: adapter_folder(tmp_path / name, tiny_llama, seed, **DORA, target_modules=targets)
        for seed, (name, targets) in enumerate({"a": "all-linear", "b": "all-linear", "c": ["q_proj"]}.items())
    }
    model = tiny_llama().eval()
    base = model(torch.arange(48).view(3, 16) % 64).logits
    for name in wants:
        load_adapter(model, tmp_path / name, name=name)
    for name in ("b", "c", "a", "c", "b"):
        set_adapter(model, name)
        assert error(model(torch.arange(48).view(3, 16) % 64).logits, wants[name]) < 1e-6
    with disable_adapters(model):
        assert torch.equal(model(torch.arange(48).view(3, 16) % 64).logits, base)
    with (
        pytest.raises(UnsupportedError, match=r"DoRA \(`use_dora`\), which is not built for `mixed_batch`"),
        mixed_batch(model, ["a"]),
    ):
        pass
    with pytest.raises(UnsupportedError, match=r"is DoRA \(`use_dora`\), whose update has no two factors"):
        add_weighted_adapter(model, ["a", "b"], [0.5, 0.5], "sum")
    adapter_folder(tmp_path / "lora", tiny_llama, 5, r=4)
    with pytest.raises(UnsupportedError, match="the adapter is plain LoRA and the model's adapters are DoRA"):
        load_adapter(model, tmp_path / "lora", name="lora")


def test_what_loaders_say_of_it(tmp_path: Path) -> None:
    model = dora()
    save_adapter(model, tmp_path / "a")
    report = validate_adapter(tmp_path / "a", "all")
    rules = {name: [p.rule for p in found] for name, found in report.loaders.items()}
    assert rules == {
        "peft": [],
        "vllm": ["dora"],
        "sglang": ["dora"],
        "tgi": ["dora", "rank_step", "base_name"],
        "llama.cpp": ["dora", "base_name"],
    }
    with pytest.raises(UnsupportedError, match=r"is DoRA \(`use_dora`\), which is no low-rank update"):
        save_adapter(model, tmp_path / "p", layout="portable")
    facts = adapter_facts(tmp_path / "a")
    assert (len(facts.modules), facts.saved, facts.config["use_dora"]) == (14, [], True)
    saved = save_adapter(model, tmp_path / "b", dtype="bf16")
    assert 1e-4 < saved.delta_error < 1e-2


def test_a_run_is_resumed_to_the_same_bits_and_merged(tmp_path: Path) -> None:
    def run(name: str, steps: int, ckpt: Path | None = None) -> LM:
        torch.manual_seed(0)
        module = LM(tiny_llama())
        lora = LoRA(**DORA, lora_dropout=0.1, loraplus_lr_ratio=4)
        kept = AdapterCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(tmp_path, [lora, kept, MergeOnFitEnd(tmp_path / f"{name}-merged")], max_steps=steps)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return module

    uncut = run("uncut", 6)
    cut = tmp_path / "uncut" / "step=3.ckpt"
    state = read_checkpoint(cut)["state_dict"]
    assert {key.rpartition(".")[2] for key in state} == {"lora_A", "lora_B", "lora_magnitude_vector"}
    on = run("on", 6, cut)
    for (_, a), (_, b) in zip(adapter_modules(uncut), adapter_modules(on), strict=True):
        assert all(torch.equal(a.live(name), b.live(name)) for name in a.own_names())
        assert not torch.equal(a.live(MAGNITUDE), a.magnitudes() * 0 + a.adapter.base_norm)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "uncut-merged")
    assert error(logits(merged), logits(uncut.net)) < 1e-5
    beside = tiny_llama()
    load_adapter(beside, adapter_path(str(last := cut.with_name("step=6.ckpt"))))
    assert error(logits(beside), logits(uncut.net)) < 1e-6
    other = tiny_llama()
    load_adapter(other, last)
    assert torch.equal(logits(other), logits(uncut.net))
    load_adapter(other, cut, name="earlier")
    set_adapter(other, "earlier")
    assert not torch.equal(logits(other), logits(uncut.net))


def test_a_module_from_a_checkpoint_and_spectra(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net()
    trainer = make_trainer(tmp_path, [LoRA(**DORA, quantize="nf4")], max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(Net, tmp_path / "a.ckpt")
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(again.eval()(ids), module.eval()(ids))
    assert all(len(s.singular_values) == 4 for s in adapter_spectra(module).values())


class Net(LM):
    """Builds its net from a seed."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(TinyNet())
