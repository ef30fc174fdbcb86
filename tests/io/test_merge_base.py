# SPDX-License-Identifier: Apache-2.0
"""Whether a folder is the base of the training: known in whatever dtype, refused otherwise, or said to be unknown."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import BaseMismatchError, Notice
from lightning_lora.io.adapter import save_adapter
from lightning_lora.model.apply import apply_lora
from tests.helpers import tiny_gpt2, tiny_llama
from tests.io.merging import edit, merge, tied_llama, trained

FAMILIES: dict[str, Any] = {"llama": tiny_llama, "tied": tied_llama, "gpt2": tiny_gpt2}


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32 file", "bf16 file"])
@pytest.mark.parametrize("make", FAMILIES)
def test_the_base_of_the_training_is_known_whatever_it_was_loaded_in(
    make: str, stored: torch.dtype, loaded: torch.dtype, tmp_path: Path
) -> None:
    FAMILIES[make]().to(stored).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=loaded)
    apply_lora(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        merge(tmp_path)
    FAMILIES[make](seed=1).to(stored).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    with pytest.raises(BaseMismatchError, match=r"trained on another base .*give the folder of that base"):
        merge(tmp_path, "other")
    assert not (tmp_path / "other").exists()
    assert merge(tmp_path, "other", check_base=False).layers


def test_a_classifiers_base_is_known_by_its_class_without_its_head(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    apply_lora(model, LoRAConfig(r=2, modules_to_save=["score"]))
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        merge(tmp_path)
    tiny_llama(seed=1).save_pretrained(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match="LlamaForSequenceClassification"):
        merge(tmp_path)


def test_a_base_that_cannot_be_compared_is_said_and_pefts_folders_are_not(tmp_path: Path) -> None:
    trained(tmp_path)
    edit(tmp_path / "adapter" / "lightning_lora.json", fingerprint={"version": 1, "digest": "x", "tensors": 1})
    with pytest.warns(Notice, match="could not be compared with the one"):
        merge(tmp_path)
    (tmp_path / "adapter" / "lightning_lora.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        merge(tmp_path)
