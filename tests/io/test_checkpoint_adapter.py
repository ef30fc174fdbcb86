# SPDX-License-Identifier: Apache-2.0
"""A run's checkpoint as a source of adapters for any model of the same base, whatever attribute holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import LoRA, list_adapters, set_adapter, set_adapter_scale
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, CheckpointError
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.slots import adapter_modules
from tests.helpers import LM, TinyNet, loader, make_trainer, tiny_llama

IDS = torch.arange(32).view(2, 16) % 61

CASES: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "a list and patterns": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {r"layers\.1\.mlp\.up_proj": 3}},
    "a regular expression with the attribute in it": {"target_modules": r"net\.model\.layers\.1\..*(q|v)_proj"},
    "a head kept": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "packed": {"quantize": "nf4", "target_modules": ["o_proj"]},
}


class Other(L.LightningModule):
    """Holds the transformers model elsewhere, beside something of its own."""

    def __init__(self, language: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"language": language, "scorer": nn.Linear(3, 3)})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(tmp_path: Path, **config: Any) -> tuple[nn.Module, Path]:
    module = LM(tiny_llama())
    checkpoint = ModelCheckpoint(tmp_path, filename="run")
    make_trainer(tmp_path, [LoRA(r=4, **config), checkpoint], max_steps=3).fit(module, loader())
    return module.net, tmp_path / "run.ckpt"


@pytest.mark.parametrize("case", CASES)
def test_it_loads_into_the_model_alone_and_into_another_module(case: str, tmp_path: Path) -> None:
    live, path = trained(tmp_path, **CASES[case])
    expected = logits(live)
    assert not torch.equal(expected, logits(tiny_llama()))
    alone = tiny_llama()
    load_adapter(alone, path)
    assert torch.equal(logits(alone), expected)
    held = tiny_llama()
    load_adapter(Other(held), path)
    assert torch.equal(logits(held), expected)
    same = LM(tiny_llama())
    load_adapter(same, path)
    assert torch.equal(logits(same.net), expected)
    assert [name for name, _ in adapter_modules(alone)] == [name for name, _ in adapter_modules(live)]
    save_adapter(alone, tmp_path / "a")
    again = tiny_llama()
    load_adapter(again, tmp_path / "a")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("held_elsewhere", [False, True])
def test_it_waits_beside_the_adapter_in_use(case: str, held_elsewhere: bool, tmp_path: Path) -> None:
    live, path = trained(tmp_path, **CASES[case])
    set_adapter_scale(live, 0.5)
    expected, model = logits(live), tiny_llama()
    whole = Other(model) if held_elsewhere else model
    apply_lora(model, LoRAConfig(r=8, target_modules=["k_proj"], quantize=CASES[case].get("quantize", "none")))
    before = logits(model)
    load_adapter(whole, path, name="second")
    assert torch.equal(logits(model), before)
    path.write_bytes(bytes(path.stat().st_size))  # what waits is no part of the file
    set_adapter(whole, "second")
    set_adapter_scale(whole, 0.5)
    torch.testing.assert_close(logits(model), expected)
    set_adapter(whole, "default")
    assert torch.equal(logits(model), before)


def test_what_cannot_wait_is_said_and_changes_nothing(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    model = tiny_llama(seed=1)
    apply_lora(model, LoRAConfig(r=8))
    with pytest.raises(BaseMismatchError, match=r"run\.ckpt: .*trained on another base"):
        load_adapter(model, path, name="second")
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=8))
    checkpoint = torch.load(path, weights_only=True)
    key = next(iter(checkpoint["state_dict"]))
    checkpoint["lightning_lora"].pop("digests")
    checkpoint["lightning_lora"]["version"] = 1
    for name, change in {
        "unknown": lambda state: state | {"x": torch.ones(1)},
        "shape": lambda state: state | {key: state[key][..., :1]},
        "NaN": lambda state: state | {key: state[key] * float("nan")},
        "int64, adapters are floats": lambda state: state | {key: state[key].long()},
        "missing": lambda state: state | {key: "text"},
    }.items():
        torch.save({**checkpoint, "state_dict": change(checkpoint["state_dict"])}, tmp_path / "bad.ckpt")
        with pytest.raises((AdapterMismatchError, CheckpointError), match=name):
            load_adapter(model, tmp_path / "bad.ckpt", name="second")
    for change, text in (
        ({"version": 99}, "is of version 99, this package knows"),
        ({"version": -1}, "which no package has written"),
        ({"targets": [], "saved": []}, "names no adapted module"),
    ):
        torch.save({**checkpoint, "lightning_lora": checkpoint["lightning_lora"] | change}, tmp_path / "bad.ckpt")
        for other in (model, tiny_llama()):
            with pytest.raises(CheckpointError, match=text):
                load_adapter(other, tmp_path / "bad.ckpt", name="second")
    assert list_adapters(model) == ["default"]


def test_names_that_wrappers_wrote_can_wait(tmp_path: Path) -> None:
    live, path = trained(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["lightning_lora"].pop("digests")
    checkpoint["lightning_lora"]["version"] = 1
    state = checkpoint["state_dict"]
    for wrap in ("module.{}", "_orig_mod.{}"):
        wrapped = {wrap.format(name): tensor for name, tensor in state.items()}
        torch.save({**checkpoint, "state_dict": wrapped}, tmp_path / "wrapped.ckpt")
        model = tiny_llama()
        apply_lora(model, LoRAConfig(r=8))
        load_adapter(model, tmp_path / "wrapped.ckpt", name="second")
        set_adapter(model, "second")
        torch.testing.assert_close(logits(model), logits(live))


def test_another_rank_takes_the_place_of_the_adapter_that_is_named(tmp_path: Path) -> None:
    live, path = trained(tmp_path)
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=8))
    load_adapter(model, path, name="default")
    assert list_adapters(model) == ["default"]
    torch.testing.assert_close(logits(model), logits(live))


def test_it_loads_into_a_converted_model(tmp_path: Path) -> None:
    live, path = trained(tmp_path)
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4))
    load_adapter(model, path)
    assert torch.equal(logits(model), logits(live))
    other = tiny_llama()
    apply_lora(other, LoRAConfig(r=8))
    with pytest.raises(AdapterMismatchError, match="r: checkpoint 4, model 8"):
        load_adapter(other, path)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        load_adapter(tiny_llama(seed=1), path)
    with pytest.raises(
        AdapterMismatchError, match=r"the model has no module for 'net.model.layers.0.self_attn.q_proj'"
    ):
        load_adapter(TinyNet(), path)
    plain = LM(tiny_llama())
    make_trainer(tmp_path, [ModelCheckpoint(tmp_path, filename="plain")], max_steps=1).fit(plain, loader())
    with pytest.raises(CheckpointError, match="holds no adapters of this package"):
        load_adapter(tiny_llama(), tmp_path / "plain.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(CheckpointError):
        load_adapter(tiny_llama(), tmp_path / "text.ckpt")
