# SPDX-License-Identifier: Apache-2.0
"""`MergeOnFitEnd` over a base that was loaded from a local folder: merged from its files, while they are the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lightning_lora.callbacks.lora import LoRA
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.errors import ConfigError
from lightning_lora.io.merge_disk import DiskMergeReport
from lightning_lora.model.apply import set_adapter_scale
from lightning_lora.model.slots import adapter_modules
from tests.callbacks.test_merge_on_fit_end import error, logits
from tests.helpers import LM, loader, make_trainer, tiny_llama


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_original_base_is_merged_from_its_folder(quantize: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    model = LM(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    merge = MergeOnFitEnd(tmp_path / "m", base="original")
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize=quantize), merge], max_steps=8)
    trainer.fit(model, loader())
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    for name, module in adapter_modules(model.net):
        weight = tiny_llama().get_submodule(name).weight + module.delta_weight()
        assert error(loaded.get_submodule(name).weight, weight) < 1e-6
    found = error(logits(loaded), logits(model))
    assert (found > 1e-3) is (quantize != "none")  # another model than the one that was trained, by q
    assert merge.report is not None
    assert merge.report.logit_limit is None
    assert (merge.report.logit_error > 1e-3) is (quantize != "none")
    assert bool(merge.report.q_over_dw) is (quantize != "none")
    written = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert (written["weights"], written["base"], written["checked_on"]) == ("last", "original", "a training batch")


def test_the_original_base_needs_its_folder(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [LoRA(r=4), MergeOnFitEnd(tmp_path / "m", base="original")], max_steps=1)
    with pytest.raises(ConfigError, match=r"load it with `from_pretrained\(folder\)`"):
        trainer.fit(LM(tiny_llama()), loader())


class AtTheEnd(L.Callback):
    """Does something to the module when training is over."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do it."""
        self.work(pl_module)


def from_folder(folder: Path) -> LM:
    """A module around a base that was loaded from a folder."""
    tiny_llama().save_pretrained(folder)
    return LM(AutoModelForCausalLM.from_pretrained(folder).train())


def test_a_base_that_changed_in_training_is_merged_as_it_is(tmp_path: Path) -> None:
    def change(module: Any) -> None:
        with torch.no_grad():
            module.net.model.norm.weight.mul_(1.03)

    module, merge = from_folder(tmp_path / "base"), MergeOnFitEnd(tmp_path / "m")
    callbacks = [LoRA(r=2), merge, AtTheEnd(change)]
    make_trainer(tmp_path, callbacks, precision="bf16-true").fit(module, loader())
    assert not isinstance(merge.report, DiskMergeReport)
    written = load_file(tmp_path / "m" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(written.float(), module.net.model.norm.weight.float())


def test_adapters_at_a_strength_of_zero(tmp_path: Path) -> None:
    """PEFT's format cannot say that; the live model can be merged all the same."""
    module, merge = from_folder(tmp_path / "base"), MergeOnFitEnd(tmp_path / "m")
    make_trainer(tmp_path, [LoRA(r=2), merge, AtTheEnd(lambda m: set_adapter_scale(m, 0.0))]).fit(module, loader())
    assert merge.report is not None
    written = load_file(tmp_path / "m" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())


@pytest.mark.parametrize("base", ["dequantized", "original"])
def test_the_folder_of_the_base_is_not_written_over(base: Any, tmp_path: Path) -> None:
    merge = MergeOnFitEnd(tmp_path / "first")
    make_trainer(tmp_path, [LoRA(r=2), merge]).fit(LM(tiny_llama()), loader())
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    module = LM(AutoModelForCausalLM.from_pretrained(tmp_path / "first").train())
    again = MergeOnFitEnd(tmp_path / "x" / ".." / "first", base=base)
    with pytest.raises(ConfigError, match="is the folder that the base was loaded from.*choose another folder"):
        make_trainer(tmp_path, [LoRA(r=2), again]).fit(module, loader())
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("known", [True, False])
def test_the_size_of_files(known: bool, tmp_path: Path) -> None:
    module = from_folder(tmp_path / "base") if known else LM(tiny_llama())
    merge = MergeOnFitEnd(tmp_path / "m", max_shard_size="100KB")
    make_trainer(tmp_path, [LoRA(r=2), merge]).fit(module, loader())
    assert isinstance(merge.report, DiskMergeReport) == known
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 2
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
@pytest.mark.parametrize("changed", [False, True])
def test_a_base_from_a_folder_is_merged_from_its_files(quantize: str, changed: bool, tmp_path: Path) -> None:
    """Unless the live one has become another since: then from the live one."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="60KB")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base").train()
    if changed:
        net.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    module = LM(net)
    merge = MergeOnFitEnd(tmp_path / "m")
    make_trainer(tmp_path, [LoRA(r=2, quantize=quantize), merge]).fit(module, loader())  # type: ignore[arg-type]
    assert merge.report is not None
    assert isinstance(merge.report, DiskMergeReport) == (not changed)
    assert merge.report.logit_error < 1e-5
    assert merge.report.logit_limit == 1e-4
    shards = len(list((tmp_path / "m").glob("*.safetensors")))
    assert shards == 1  # `max_shard_size` is of the files to write, not of those that were read
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.eval()(ids), rtol=1e-4, atol=1e-4)
