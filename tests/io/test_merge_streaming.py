# SPDX-License-Identifier: Apache-2.0
"""A merge from files to files needs less than two shards of memory, and gives PEFT's fp32 merge rounded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.streaming import SHAPES, compare, different, make_folders, measure, merge_ours
from lightning_lora.io.tensor_files import parse_size

SHARD = "30MB"


def test_memory_of_a_small_merge(tmp_path: Path) -> None:
    make_folders(tmp_path, SHAPES["tiny"], SHARD)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    run = measure("ours", tmp_path, SHARD)
    assert run["looks"] > 20
    assert run["above"] <= 1.3 * parse_size(SHARD)
    assert different(tmp_path, SHARD)[0] == 0


def test_a_merge_that_is_another_is_found(tmp_path: Path) -> None:
    make_folders(tmp_path, {**SHAPES["tiny"], "num_hidden_layers": 1}, "1GB", r=4)
    merge_ours(tmp_path, "1GB")
    assert different(tmp_path, "1GB")[0] == 0
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert different(tmp_path, "1GB")[0] > 0


@pytest.mark.slow
def test_two_gigabytes_in_shards_of_300_megabytes(tmp_path: Path) -> None:
    found = compare("2gb", "300MB", rounds=3, scratch=str(tmp_path))
    assert found["bytes"] > 2e9
    assert found["peak"]["ours"] <= 1.3 * found["shard"]
    assert found["seconds"]["ours"] <= found["seconds"]["peft"]
    assert found["different"] == 0
