# SPDX-License-Identifier: Apache-2.0
"""VeRA's shared matrices: once in files, drawn again and compared, another file's, and modules that are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import VeRA, VeRAConfig, apply_adapters, load_adapter, load_from_checkpoint, save_adapter
from lightning_lora.errors import AdapterMismatchError, UnsupportedError
from lightning_lora.model.slots import adapter_modules
from tests.helpers import LM, loader, make_trainer, random_adapters, tiny_llama
from tests.io.merging import edit, logits

DRAWN = {"r": 16, "save_projection": False}


def vera(**config: Any) -> nn.Module:
    model = tiny_llama()
    apply_adapters(model, VeRAConfig(**{"r": 16, **config}))
    return random_adapters(model, std=0.1)


def test_files_hold_the_matrices_once_or_not_at_all(tmp_path: Path) -> None:
    for keep in (True, False):
        save_adapter(vera(save_projection=keep), tmp_path / str(keep))
        tensors = load_file(tmp_path / str(keep) / "adapter_model.safetensors")
        shared = {key: tuple(t.shape) for key, t in tensors.items() if "lambda" not in key}
        assert shared == ({"base_model.vera_A": (16, 128), "base_model.vera_B": (128, 16)} if keep else {})
        assert len(tensors) - len(shared) == 2 * 14


def test_what_is_drawn_otherwise_is_refused(tmp_path: Path) -> None:
    model = vera(save_projection=False)
    save_adapter(model, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "lightning_lora.json").read_text())
    assert set(record["drawn"]) == {"vera_A", "vera_B"}
    plain = tiny_llama()
    load_adapter(plain, tmp_path / "a")
    assert torch.equal(logits(plain), logits(model))
    edit(tmp_path / "a" / "lightning_lora.json", drawn={**record["drawn"], "vera_B": "0" * 32})
    for target in (tiny_llama(), model):  # converted by it, and in place
        with pytest.raises(AdapterMismatchError, match="were trained between vera_B that their seed does not give"):
            load_adapter(target, tmp_path / "a")


class Seeded(LM):
    """Builds its net from a seed."""

    def __init__(self) -> None:
        super().__init__(tiny_llama())


def test_a_checkpoint_whose_matrices_are_drawn_otherwise_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [VeRA(**DRAWN)], max_steps=2)
    trainer.fit(module := Seeded(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_from_checkpoint(Seeded, tmp_path / "a.ckpt")
    assert torch.equal(logits(again.net), logits(module.net))
    slot = next(m for _, m in adapter_modules(module) if m.drawn())
    slot.adapter.projections.vera_A += 1  # as if torch had drawn other numbers
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with pytest.raises(AdapterMismatchError, match="were trained between vera_A that their seed does not give"):
        load_from_checkpoint(Seeded, tmp_path / "b.ckpt")


def test_a_folder_from_a_base_in_bf16_holds_other_matrices_than_the_seed_gives(tmp_path: Path) -> None:
    config = peft.VeraConfig(r=16, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(tiny_llama().bfloat16(), config)
    for name, parameter in theirs.named_parameters():
        if "vera_lambda" in name:
            nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path / "a")
    mine = tiny_llama().bfloat16()
    load_adapter(mine, tmp_path / "a")
    keeper = next(m for _, m in adapter_modules(mine) if len(m.trained_names()) == 4)
    fresh = vera(target_modules=["q_proj", "up_proj"])
    own = next(m for _, m in adapter_modules(fresh) if len(m.trained_names()) == 4)
    assert keeper.vera_B.dtype == torch.float32
    assert not torch.equal(keeper.vera_B, own.vera_B)
    ids = torch.arange(32).view(2, 16)
    got, want = (m.eval()(input_ids=ids).logits.detach().float() for m in (mine, theirs))
    assert (got - want).norm() < 2e-2 * want.norm()


def test_modules_that_are_left_out_are_named_to_peft(tmp_path: Path) -> None:
    model = vera(exclude_modules=["1.mlp.up_proj"], modules_to_save=["lm_head"])
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert "exclude_modules" not in config  # PEFT's VeRA has no such word
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "a")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    again = tiny_llama()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    edit(tmp_path / "a" / "adapter_config.json", bias="all")
    with pytest.raises(UnsupportedError, match="`bias` is 'all'; this version trains and loads no biases"):
        load_adapter(tiny_llama(), tmp_path / "a")
