# SPDX-License-Identifier: Apache-2.0
"""Swaps at the wrong moment: inside `mixed_batch`, cut by Ctrl-C, in inference mode, while a folder is replaced."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import list_adapters, load_adapter, mixed_batch, save_adapter, set_adapter, use_adapter
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.io import folder as folder_module
from lightning_lora.io.folder import AdapterFolder
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import tiny_llama
from tests.model.many import IDS, adapter_folder, logits

Many = tuple[nn.Module, dict[str, Tensor]]


def test_a_swap_inside_a_mixed_batch_changes_no_row(many: Many) -> None:
    model, wanted = many
    names = ["plain", "twin", "wide"]
    with torch.no_grad(), mixed_batch(model, names):
        for name in ("plain", "twin", "wide", "plain"):
            set_adapter(model, name)
            found = model(IDS).logits
            for row, own in enumerate(names):
                torch.testing.assert_close(found[row], wanted[own][row], msg=f"row {row} with {name!r} in use")


@pytest.mark.parametrize("how", ["set", "use"])
@pytest.mark.parametrize("name", ["twin", "scaled", "head", "patterns"])
def test_a_swap_that_is_cut_leaves_the_adapter_that_was_in_use(
    name: str, how: str, many: Many, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C cuts it, before the third of the layers."""
    model, wanted = many
    count = [0]
    method = {"set": "exchange", "use": "hold"}[how]
    whole = getattr(LoRALinear, method)

    def cut(self: LoRALinear, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(LoRALinear, method, cut)
    with pytest.raises(KeyboardInterrupt):
        if how == "set":
            set_adapter(model, name)
        else:
            with use_adapter(model, name):
                pass
    monkeypatch.setattr(LoRALinear, method, whole)
    assert torch.equal(logits(model), wanted["plain"])
    for other in (name, "wide", "plain"):
        set_adapter(model, other)
        assert torch.equal(logits(model), wanted[other]), other


def test_a_copy_a_part_and_a_model_that_grew_are_not_taken_for_the_model(many: Many, tmp_path: Path) -> None:
    """Where the adapter modules are is remembered from swap to swap."""
    model, wanted = many
    set_adapter(model, "twin")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_adapter(other, "wide")
        assert torch.equal(logits(other), wanted["wide"])
        assert torch.equal(logits(model), wanted["twin"])
    with pytest.raises(ConfigError, match="give the whole model that was converted"):
        set_adapter(model.model, "plain")
    expected = adapter_folder(tmp_path / "more", tiny_llama, 9, r=2, target_modules=["lm_head", "gate_proj"])
    load_adapter(model, tmp_path / "more", name="more")
    for name, found in (("more", expected), ("plain", wanted["plain"]), ("more", expected)):
        set_adapter(model, name)
        torch.testing.assert_close(logits(model), found)


def test_what_was_loaded_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        adapter_folder(tmp_path / name, tiny_llama, seed, r=2 + seed)
    model = tiny_llama()
    load_adapter(model, tmp_path / "a", name="a")
    with torch.inference_mode():
        load_adapter(model, tmp_path / "b", name="b")
    set_adapter(model, "b")
    model(IDS).logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_a_link_that_moves_while_a_folder_is_read_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale of one folder with the weights of another would load without a word."""
    wanted = {n: adapter_folder(tmp_path / n, tiny_llama, 1, r=2, lora_alpha=a) for n, a in (("a", 4), ("b", 16))}
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    whole, moves = folder_module.read_json, iter("ba")

    def moving(path: Path) -> Any:
        found = whole(path)
        if path.name == "adapter_config.json" and (to := next(moves, None)):
            link.unlink()
            link.symlink_to(tmp_path / to)
        return found

    monkeypatch.setattr(folder_module, "read_json", moving)
    model = tiny_llama().eval()
    load_adapter(model, link)
    torch.testing.assert_close(logits(model), wanted["a"])

    def restless(path: Path) -> Any:
        os.utime(tmp_path / "a" / "adapter_model.safetensors")
        return whole(path)

    monkeypatch.setattr(folder_module, "read_json", restless)
    with pytest.raises(CheckpointError, match=r"changes while it is read: load it again when the program that writes"):
        AdapterFolder.open(tmp_path / "a")


def test_a_folder_that_was_replaced_is_checked_anew(tmp_path: Path) -> None:
    """Found whole once, changed since: the bytes of another adapter do not pass for those that were checked."""
    model = tiny_llama().eval()
    adapter_folder(tmp_path / "a", tiny_llama, 1, r=2)
    load_adapter(model, tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"is damaged: 1 of 28 tensors"):
        load_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a")
    load_adapter(model, tmp_path / "a")
    assert list_adapters(model) == ["default"]
