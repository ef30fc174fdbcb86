# SPDX-License-Identifier: Apache-2.0
"""A mapped file gives what safetensors gives, and the digests that each tensor has alone."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lightning_lora import load_adapter, set_adapter
from lightning_lora.errors import CheckpointError
from lightning_lora.io.integrity import digests
from lightning_lora.io.mapped_file import MappedFile
from tests.helpers import tiny_llama
from tests.model.many import adapter_folder, logits

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
#: Sizes around the block of a digest, and none at all.
SHAPES = ((), (0,), (3, 0), (7,), (16, 64), (32, 64), (64, 64), (65, 64), (1024,), (4096,), (2, 3, 512), (4097,))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES)), max_size=9), st.integers(0, 7))
def test_values_and_digests_are_those_of_the_tensors(kinds: list[tuple], padding: int) -> None:
    torch.manual_seed(0)
    tensors = {f"t{i}": torch.randint(0, 2, shape).to(dtype) for i, (dtype, shape) in enumerate(kinds)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(tensors, path)
        raw = path.read_bytes()  # other programs do not pad the header, so that nothing is aligned
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length].rstrip() + b" " * padding
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
        mapped, expected = MappedFile(path), load_file(path)
        assert mapped.entries.keys() == expected.keys()
        for name, tensor in expected.items():
            found = mapped.tensor(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape == mapped.shape(name)
            assert torch.equal(found, tensor)
        assert mapped.digests() == digests(expected.items())


def test_a_changed_bit_changes_the_digest_of_its_tensor_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(64, 64) for name in "abc"}, path)
    before = MappedFile(path).digests()
    raw = bytearray(path.read_bytes())
    raw[-(64 * 64 * 4) - 1] ^= 1  # the last byte of the second
    path.write_bytes(raw)
    after = MappedFile(path).digests()
    assert [name for name in before if before[name] != after[name]] == ["b"]


def test_an_unknown_dtype_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"odd": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"'odd' has the unknown dtype C64. Save the adapter again"):
        MappedFile(path).tensor("odd")


def test_what_waits_does_not_change_with_its_file(tmp_path: Path) -> None:
    """As `cp other/adapter_model.safetensors folder/` changes it: in place."""
    model = tiny_llama().eval()
    adapter_folder(tmp_path / "a", tiny_llama, seed=1, r=2)
    expected = adapter_folder(tmp_path / "b", tiny_llama, seed=2, r=2)
    load_adapter(model, tmp_path / "a", name="a")
    load_adapter(model, tmp_path / "b", name="b")
    file = tmp_path / "b" / "adapter_model.safetensors"
    with file.open("r+b") as raw:
        raw.seek(-256, 2)
        raw.write(bytes(256))
    set_adapter(model, "b")
    torch.testing.assert_close(logits(model), expected)
