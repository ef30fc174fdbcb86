# SPDX-License-Identifier: Apache-2.0
"""Counts: what is packed stands for what it was, what is shared counts once, and bytes are those that are there."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.errors import ConfigError
from lightning_lora.model.summary import summarize
from lightning_lora.reporting.summary import print_summary
from tests.helpers import LM, TinyNet, tiny_gpt2, tiny_llama


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, lambda: tiny_llama(tie_word_embeddings=True)])
def test_counts_are_those_of_the_model_before_and_of_what_conversion_says(build, quantize: str) -> None:
    model = build()
    params = sum(p.numel() for p in model.parameters())
    before = summarize(model)
    assert (before.total.logical_params, before.total.trainable_params, before.adapter_params) == (params, params, 0)
    report = apply_lora(model, LoRAConfig(r=4, quantize=quantize))
    found = summarize(LM(model), -1)
    assert found.base_params == params == report.logical_params
    assert found.total.trainable_params == found.adapter_params == report.trainable_params
    assert found.total.nbytes - found.adapter_nbytes == report.packed_bytes
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    assert found.total.nbytes == sum(t.numel() * t.element_size() for t in tensors)
    assert found.trainable_share == report.trainable_params / params


def test_rows_go_down_to_the_depth_and_add_up() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    assert [row.name for row in summarize(model, 0).rows] == []
    rows = summarize(model).rows
    assert [(row.name, row.kind, row.logical_params, row.nbytes) for row in rows] == [
        ("0", "Linear", 15, 60), ("1", "Sequential", 8 + 4, 4 * 12 + 2 * 2 * 4 + 8)
    ]  # fmt: skip
    assert [row.name for row in summarize(model, -1).rows] == ["0", "1", "1.0", "1.1"]


def test_modules_trained_in_full_are_no_part_of_the_base() -> None:
    model = TinyNet()
    params = sum(p.numel() for p in model.parameters())
    apply_lora(model, LoRAConfig(r=2, modules_to_save=["head"]))
    found = summarize(model)
    assert found.base_params == params
    assert found.adapter_params == found.total.trainable_params == 2 * (64 + 128) * 2 + 64 * 64


def test_a_wrong_depth_is_refused() -> None:
    for depth in (-2, 1.5, True, "all"):
        with pytest.raises(ConfigError, match=r"`max_depth` must be a whole number of -1 \(all modules\) or more"):
            summarize(nn.Linear(1, 1), depth)  # type: ignore[arg-type]


def test_the_table_is_printed_with_rich_and_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4, quantize="nf4"))
    print_summary(summarize(model, 1))
    rich = capsys.readouterr().out
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else found(name, *rest))
    print_summary(summarize(model, 1))
    plain = capsys.readouterr().out
    assert "━" in rich
    assert "━" not in plain
    for text in (rich, plain):
        for part in ("model", "LlamaModel", "parameters", "trainable", "bits each)", "8,704 trainable (9.62 %)"):
            assert part in text


def test_a_model_on_the_meta_device_is_counted_too() -> None:
    with torch.device("meta"):
        model = TinyNet()
    assert summarize(model).total.nbytes == 4 * summarize(model).total.logical_params
