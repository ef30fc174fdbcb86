# SPDX-License-Identifier: Apache-2.0
"""``lightning-lora export`` and ``inspect``: what an adapter is, and as what it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import AdapterCheckpoint, LoRA
from lightning_lora.cli.main import main
from lightning_lora.io.adapter import load_adapter
from lightning_lora.io.loaders import validate_adapter
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.spectrum import adapter_spectra, base_norms
from tests.cli.small import BASE, write_adapter
from tests.helpers import LM, loader, make_trainer, tiny_llama

IDS = torch.arange(24).reshape(2, 12) + 40


def logits(adapter: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    load_adapter(model, adapter)
    with torch.no_grad():
        return model(IDS).logits


def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """A base folder, and a checkpoint of a run over it."""
    torch.manual_seed(0)
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    net = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    folder = AdapterCheckpoint(dirpath=tmp_path / "run", filename="{step}")
    trainer = make_trainer(tmp_path, [LoRA(r=4, alpha_pattern={"layers.1.mlp.up_proj": 7}), folder], max_steps=2)
    trainer.fit(LM(net), loader(16))
    return tmp_path / "base", next((tmp_path / "run").glob("*.ckpt"))


def test_a_target_gets_a_folder_that_it_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = write_adapter(tmp_path / "a", rank_pattern={"q_proj": 2}, use_rslora=True)
    assert not validate_adapter(adapter, "all").ok
    assert main(["export", adapter, str(tmp_path / "out"), "--base", BASE, "--target=all", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["layout"] == "portable"
    assert set(said["loaders"]) == {"peft", "vllm", "sglang", "tgi", "llama.cpp"}
    assert validate_adapter(tmp_path / "out", "all").ok
    assert torch.allclose(logits(tmp_path / "out"), logits(adapter), atol=1e-5)


def test_what_the_target_does_not_load_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = write_adapter(tmp_path / "a", r=32), tmp_path / "out"
    given = ["export", adapter, str(out), "--base", BASE, "--layout=peft", "--target=vllm", "--quiet"]
    assert main(given) == 1
    shown = capsys.readouterr().out
    assert "not written" in shown
    assert "rank" in shown
    assert not out.exists()
    assert main([*given, "--max_rank=64"]) == 0
    assert (out / "adapter_model.safetensors").is_file()


def test_a_checkpoint_becomes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, saved = checkpoint(tmp_path)
    assert main(["export", str(saved), str(tmp_path / "out"), "--base", str(base), "--quiet"]) == 0
    assert "tensors" in capsys.readouterr().out
    of_run, of_folder = (AutoModelForCausalLM.from_pretrained(base) for _ in range(2))
    load_adapter(of_run, saved)
    load_adapter(of_folder, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(of_run(IDS % 64).logits, of_folder(IDS % 64).logits)


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_spectra_are_those_of_the_loaded_model(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, source = checkpoint(tmp_path)
    if kind == "folder":
        source = source.parent / source.stem
        assert source.is_dir()
    code = main(["inspect", str(source), "--base", str(base), "--json"])
    said = json.loads(capsys.readouterr().out)
    assert code == (0 if said.get("ok", True) else 1)
    model = AutoModelForCausalLM.from_pretrained(base)
    load_adapter(model, source)
    expected = adapter_spectra(model, base_norms(model))
    found = {name.removeprefix("net." if kind == "checkpoint" else ""): s for name, s in said["modules"].items()}
    assert sorted(found) == sorted(expected)
    for name, spectrum in expected.items():
        assert found[name]["singular_values"] == pytest.approx(spectrum.singular_values, rel=1e-5, abs=1e-9)
        assert found[name]["relative_update"] == pytest.approx(spectrum.relative_update, rel=1e-4)
    assert said["step"] == (2 if kind == "checkpoint" else None)
    assert said["fingerprint"]["tensors"] == 21
    assert said["config"]["r"] == 4


def test_the_table_shows_the_worst_first_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(tmp_path / "a", quantize="nf4")
    main(["inspect", adapter, "--base", BASE, "--sort=relative_update", "--limit=3"])
    lines = capsys.readouterr().out.splitlines()
    assert "rank 4" in lines[1]
    assert "quantize nf4" in lines[1]
    top = next(i for i, line in enumerate(lines) if line.startswith("module "))
    shares = [float(line.split()[3]) for line in lines[top + 1 : top + 4]]
    assert shares == sorted(shares, reverse=True)
    assert lines[top + 4] == "... and 5 more: --limit 0 shows all"
    assert max(map(len, lines[top : top + 4])) <= 100
    assert main(["inspect", adapter, "--sort=beauty"]) == 2
    assert main(["inspect", adapter, "--limit=-1"]) == 2


def test_a_method_that_is_not_built_is_still_judged_for_loaders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = Path(write_adapter(tmp_path / "a"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    assert main(["inspect", str(adapter), "--target=vllm"]) == 1
    shown = capsys.readouterr().out
    assert "`init_lora_weights` is 'pissa'" in shown
    assert "vllm: no" in shown


def test_names_of_one_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    from lightning_lora import LoRAConfig, save_adapter

    apply_lora(model, LoRAConfig(r=2, target_modules=["layers.0.mlp.up_proj"]))
    save_adapter(model, tmp_path / "a")
    main(["inspect", str(tmp_path / "a"), "--target=peft"])
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.up_proj  2" in shown
    assert "1 low-rank modules, 384 parameters" in shown
