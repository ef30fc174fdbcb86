# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors: what is written is what others read, one tensor in memory at a time."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.io.tensor_files import DTYPES, INDEX, Entry, TensorFolder, parse_size, write_file, write_shards


def values() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {str(dtype): (torch.randn(3, 5) * 3).abs().to(dtype) for dtype in DTYPES.values()}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "odd": torch.ones(7, dtype=torch.int8)}


def entries(tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    bits = [
        {k: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).tolist()) for k, t in x.items()} for x in (first, second)
    ]
    return bits[0] == bits[1]


def test_a_file_of_every_dtype_is_read_by_safetensors(tmp_path: Path) -> None:
    tensors = values()
    write_file(tmp_path / "model.safetensors", entries(tensors), tensors.__getitem__)
    assert same(load_file(tmp_path / "model.safetensors"), tensors)
    with TensorFolder(tmp_path) as folder:
        assert folder.entries == entries(tensors)
        assert same({key: folder.tensor(key) for key in folder.entries}, tensors)


def test_shards_have_their_index_and_one_tensor_lives_at_a_time(tmp_path: Path) -> None:
    shapes = {f"t{i}": Entry(torch.float32, (i + 1, 8)) for i in range(6)}
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def make(key: str) -> Tensor:
        counts.append(sum(ref() is not None for ref in alive))
        tensor = torch.full(shapes[key].shape, float(key[1:]))
        alive.append(weakref.ref(tensor))
        return tensor

    said: list[Any] = []
    names = write_shards(tmp_path, shapes, make, 200, lambda *given: said.append(given))
    assert max(counts) <= 1
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    assert said == [(name, i + 1, len(names)) for i, name in enumerate(names)]
    assert sum(len(load_file(tmp_path / name)) for name in names) == 6
    with TensorFolder(tmp_path) as folder:
        assert sorted(folder.entries) == sorted(shapes)
        assert all(bool((folder.tensor(key) == float(key[1:])).all()) for key in shapes)


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5 * 10**9), ("300MB", 300 * 10**6), ("1.5 KiB", 1536), ("2gib", 2**31), (1000, 1000), ("77", 77)],
)
def test_sizes(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "5 apples", 0, True, None])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(ConfigError, match="`max_shard_size` must be bytes or a text"):
        parse_size(text)


def test_folders_that_are_none(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            TensorFolder(tmp_path / "base")

    refused("there is no model folder")
    base = tmp_path / "base"
    base.mkdir()
    refused("no safetensors files")
    save_file({"a": torch.ones(2)}, base / "one.safetensors")
    with TensorFolder(base) as folder:
        assert list(folder.entries) == ["a"]
    save_file({"b": torch.ones(2)}, base / "two.safetensors")
    refused("2 safetensors files and no model.safetensors.index.json")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "../two.safetensors"}}))
    refused("which is no file of this folder")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "two.safetensors"}}))
    refused(r"names tensors that are not in their file: \['a'\]")
    (base / INDEX).write_text("{}")
    refused("is no index of safetensors")
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    (base / "one.safetensors").write_bytes((base / "one.safetensors").read_bytes()[:-3])
    refused("is no whole safetensors file")


def test_another_tensor_than_was_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was announced"):
        write_file(tmp_path / "x", {"a": Entry(torch.float32, (2,))}, lambda key: torch.ones(3))
