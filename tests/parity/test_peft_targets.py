# SPDX-License-Identifier: Apache-2.0
"""PEFT as the oracle for targets that are no linear layers: logits, gradients, and folders both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.kinds import places
from lightning_lora.model.apply import disable_adapters, set_adapter_scale
from tests.model.kinds import CASES, PARAMS, adapted, logits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _no_fast_path() -> Iterator[None]:
    """PEFT leaves torch's fast path of encoders open, which passes its adapters by."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def theirs(case: str, folder: Path) -> nn.Module:
    """PEFT's model with the adapter of a folder, trainable."""
    return peft.PeftModel.from_pretrained(CASES[case].make().eval(), folder, is_trainable=True)


def gradients(model: nn.Module) -> None:
    out = logits(model)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).detach().norm() / want.detach().norm())


@pytest.mark.parametrize("case", PARAMS)
def test_peft_loads_our_folder_and_computes_the_same_logits_and_gradients(case: str, tmp_path: Path) -> None:
    ours = adapted(case)
    save_adapter(ours, tmp_path / "ours")
    other = theirs(case, tmp_path / "ours")
    base = logits(CASES[case].make().eval())
    assert relative(logits(other), base) > 1e-2  # the adapter does something
    assert relative(logits(ours), logits(other)) < 1e-5
    gradients(ours)
    gradients(other)
    found = {key.removeprefix("base_model.model."): p for key, p in _trained(other).items()}
    compared = 0
    for key, _, module, own in places(ours):
        parameter = found.pop(key.removeprefix("base_model.model."))
        grad, times = module.live(own).grad, 2 if "out_proj" in key else 1  # PEFT's own gradient misses one of its two
        assert relative(grad, times * parameter.grad) < 1e-5, key
        compared += 1
    assert compared
    assert not found


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's trained parameters by the names of its files."""
    return {
        name.replace(".default.weight", ".weight").removesuffix(".default"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("case", PARAMS)
def test_we_load_pefts_folder(case: str, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 6, **CASES[case].config}
    other = peft.get_peft_model(CASES[case].make().eval(), peft.LoraConfig(**config))
    for parameter in _trained(other).values():
        nn.init.normal_(parameter, std=0.2)
    other.save_pretrained(tmp_path / "theirs")
    ours = CASES[case].make().eval()
    base = logits(ours.requires_grad_(False))  # torch's attention sums in another order over a weight that learns
    load_adapter(ours, tmp_path / "theirs")
    assert relative(logits(ours), logits(other)) < 1e-5
    with disable_adapters(ours):
        assert torch.equal(logits(ours), base)


@pytest.mark.parametrize("case", ["tied embedding", "attention", "experts", "tied tokens"])
def test_our_folder_comes_back_at_any_strength(case: str, tmp_path: Path) -> None:
    model = adapted(case)
    set_adapter_scale(model, 0.4)
    save_adapter(model, tmp_path / "weak")
    again = CASES[case].make().eval()
    load_adapter(again, tmp_path / "weak")
    assert relative(logits(again), logits(model)) < 1e-5
    assert relative(logits(theirs(case, tmp_path / "weak")), logits(model)) < 1e-5
    before = logits(model)
    load_adapter(model, tmp_path / "weak")  # in place
    assert relative(logits(model), before) < 1e-5


def test_ranks_of_experts_are_pefts(tmp_path: Path) -> None:
    model = adapted("experts", rank_pattern={"experts.gate_up_proj": 2, "experts.down_proj": 2})
    save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert config["rank_pattern"] == {"q_proj": 4} or set(config["rank_pattern"].values()) == {4}
    assert relative(logits(model), logits(theirs("experts", tmp_path / "ours"))) < 1e-5
    again = CASES["experts"].make().eval()
    load_adapter(again, tmp_path / "ours")
    assert relative(logits(again), logits(model)) < 1e-6
