# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of shards: what goes in comes out, damage is told, and the index's pickle can do nothing."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lightning_lora.errors import CheckpointError
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint, write_checkpoint
from lightning_lora.io.distributed import INDEX, META, is_distributed, read_distributed, read_either, write_distributed

SHARDS = "__0_0.distcp"


def checkpoint() -> dict[str, Any]:
    """A checkpoint of Lightning's kind."""
    torch.manual_seed(0)
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4, 8)}, 1: {"step": torch.tensor(3.0)}}
    return {
        "epoch": 1,
        "state_dict": {"net.a.adapter.lora_A": torch.randn(4, 8), "net.a.adapter.lora_B": torch.randn(8, 4)},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}],
        KEY: {"version": 2, "rng": [{"torch": torch.arange(5, dtype=torch.uint8)}]},
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of shards."""
    path = tmp_path / "a.ckpt"
    path.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_distributed(checkpoint(), path)
    return path


def index_of(folder: Path) -> Metadata:
    with (folder / INDEX).open("rb") as file:
        return pickle.load(file)  # just written


def put_index(folder: Path, index: object) -> None:
    """Write an index as somebody who knows the format would: digests, which only find damage, are left out."""
    (folder / INDEX).write_bytes(pickle.dumps(index))
    meta = read_checkpoint(folder / META)
    del meta[KEY]["files"]
    write_checkpoint(meta, folder / META)


def test_what_goes_in_comes_out(folder: Path) -> None:
    before = checkpoint()
    assert is_distributed(folder)
    found = read_either(folder)
    assert found["epoch"] == 1
    assert found["state_dict"].keys() == before["state_dict"].keys()
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in before["state_dict"].items())
    (state,), (expected,) = found["optimizer_states"], before["optimizer_states"]
    assert state["param_groups"] == expected["param_groups"]
    for number, values in expected["state"].items():
        assert state["state"][number].keys() == values.keys()
        assert all(torch.equal(state["state"][number][key], value) for key, value in values.items())
    assert torch.equal(found[KEY]["rng"][0]["torch"], torch.arange(5, dtype=torch.uint8))


def test_without_optimizers(folder: Path) -> None:
    found = read_distributed(folder, optimizers=False)
    assert len(found["state_dict"]) == 2
    assert found["optimizer_states"][0]["state"] == {0: {}, 1: {}}


def test_a_file_is_no_folder_of_shards(tmp_path: Path) -> None:
    write_checkpoint(checkpoint(), tmp_path / "a.ckpt")
    assert not is_distributed(tmp_path / "a.ckpt")
    assert read_either(tmp_path / "a.ckpt")["epoch"] == 1


@pytest.mark.parametrize("name", [SHARDS, INDEX])
def test_a_changed_bit(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"a.ckpt is damaged: '{name}' has changed since it was written. Take an"):
        read_distributed(folder)


def test_a_shard_that_is_missing_or_added(folder: Path) -> None:
    (folder / "__1_0.distcp").write_bytes(b"more")
    with pytest.raises(CheckpointError, match="is damaged: '__1_0.distcp' was added since it was written"):
        read_distributed(folder)
    (folder / "__1_0.distcp").unlink()
    (folder / SHARDS).unlink()
    with pytest.raises(CheckpointError, match=f"is damaged: '{SHARDS}' is missing since it was written"):
        read_distributed(folder)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def test_a_payload_in_the_index_is_not_run(folder: Path, tmp_path: Path) -> None:
    put_index(folder, Payload(tmp_path / "ran"))
    with pytest.raises(
        CheckpointError, match="the index of a distributed checkpoint names posix.system: it is not read"
    ):
        read_distributed(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "..", ""])
def test_a_path_that_leads_out_is_not_followed(folder: Path, name: str) -> None:
    index = index_of(folder)
    for info in index.storage_data.values():
        info.relative_path = name
    put_index(folder, index)
    with pytest.raises(CheckpointError, match="outside its folder: it is not read"):
        read_distributed(folder)


def test_nothing_is_made_of_a_size_that_the_files_do_not_have(folder: Path) -> None:
    index = index_of(folder)
    for entry in index.state_dict_metadata.values():
        entry.size = torch.Size([10**12])  # type: ignore[union-attr]
    put_index(folder, index)
    with pytest.raises(CheckpointError, match=r"tells of [\d,]+ bytes of tensors, its files have [\d,]+. Take an"):
        read_distributed(folder)


def test_an_index_of_something_else(folder: Path) -> None:
    put_index(folder, {"a": 1})
    with pytest.raises(CheckpointError, match="holds a dict and no index of shards"):
        read_distributed(folder)
    (folder / INDEX).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is no whole distributed checkpoint \(EOFError.*Take an earlier"):
        read_distributed(folder)


def test_bytes_in_place_of_tensors(folder: Path) -> None:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    index = index_of(folder)
    index.state_dict_metadata["state_dict.net.a.adapter.lora_A"] = BytesStorageMetadata()
    put_index(folder, index)
    with pytest.raises(CheckpointError, match="holds 'state_dict.net.a.adapter.lora_A', which is no tensor"):
        read_distributed(folder)
