# SPDX-License-Identifier: Apache-2.0
"""Sixteen architectures: adapters to PEFT and back, and merged folders that transformers loads and generates with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lightning import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.merge_disk import merge_to_disk
from lightning_lora.io.merged_folder import write_merged
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import random_adapters
from tests.parity.architectures import ARCHITECTURES, Architecture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
every = pytest.mark.parametrize("name", ARCHITECTURES)
# Modules trained in full have no portable form.
LAYOUTS = [(n, x) for n, a in ARCHITECTURES.items() for x in ("peft", "portable") if x == "peft" or not a.lora]


class Holder(LightningModule):
    """An ordinary module that holds the transformers model two attributes down."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"network": network})


def adapted(case: Architecture, base: nn.Module) -> nn.Module:
    """`base` with random adapters, converted from the module that holds it."""
    holder = Holder(base)
    apply_lora(holder, LoRAConfig(r=4, lora_alpha=8, **case.lora))
    random_adapters(holder, std=0.1)
    return holder.parts["network"].eval()


def assert_same(actual: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).norm() > 0.01 * base.norm()  # the adapters do something
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def adapted_names(model: nn.Module) -> set[str]:
    return {name for name, module in adapter_modules(model) if isinstance(module, LoRALinear)}


def pefts_names(model: PeftModel) -> set[str]:
    return {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_peft_loads_ours(name: str, layout: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    base = case.outputs(case.build())
    model = adapted(case, case.build())
    report = save_adapter(model, tmp_path / "a", layout=layout)
    assert report.delta_error < 1e-6
    oracle = PeftModel.from_pretrained(case.build(), tmp_path / "a")
    assert_same(case.outputs(oracle), case.outputs(model), base)
    assert pefts_names(oracle) == adapted_names(model)


@every
def test_we_load_pefts(name: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    base = case.outputs(case.build())
    words = copy.deepcopy({"target_modules": "all-linear", **case.lora, **case.pefts})  # PEFT changes lists in place
    oracle = get_peft_model(case.build(), LoraConfig(r=4, lora_alpha=8, task_type=case.task, **words))
    generator = torch.Generator().manual_seed(0)
    for parameter in oracle.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    oracle.save_pretrained(tmp_path / "p")
    holder = Holder(case.build())
    load_adapter(holder, tmp_path / "p")
    model = holder.parts["network"]
    assert_same(case.outputs(model), case.outputs(oracle), base)
    assert adapted_names(model) == pefts_names(oracle)
    save_adapter(holder, tmp_path / "again")  # and what we then write, PEFT reads
    again = PeftModel.from_pretrained(case.build(), tmp_path / "again")
    assert_same(case.outputs(again), case.outputs(oracle), base)


@every
def test_transformers_loads_the_merged_folders_and_generates_the_same(name: str, tmp_path: Path) -> None:
    case = ARCHITECTURES[name]
    case.build().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    base = case.model_class.from_pretrained(tmp_path / "base")
    before = case.outputs(base)
    model = adapted(case, base)
    save_adapter(model, tmp_path / "adapter")
    merge_to_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "streamed", max_shard_size="40KB")
    write_merged(model, tmp_path / "live")
    for folder in ("streamed", "live"):
        merged, info = case.model_class.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert_same(case.outputs(merged), case.outputs(model), before)
        if case.prompt is not None:
            assert torch.equal(case.generated(merged), case.generated(model))
