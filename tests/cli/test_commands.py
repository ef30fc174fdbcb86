# SPDX-License-Identifier: Apache-2.0
"""The command ``lightning-lora``: what it says, its exit codes, and that asking for help costs nothing."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lightning_lora
from lightning_lora.cli.main import main
from lightning_lora.config import LoRAConfig
from lightning_lora.io import merge_disk
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.merge import merge_adapters
from lightning_lora.model.apply import apply_lora
from tests.helpers import random_adapters, tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from lightning_lora.cli.main import main
try:
    sys.exit(main())
finally:
    print([m for m in ("torch", "lightning", "transformers") if m in sys.modules], file=sys.stderr)
"""


def run(tmp_path: Path, *args: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: as pip's script of that name, or by ``python -m``."""
    script = tmp_path / "lightning-lora"
    script.write_text(SCRIPT)
    start = ["-m", "lightning_lora"] if module else [str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, *start, *args], capture_output=True, text=True, env=environment, timeout=900, check=False
    )


def folder(tmp_path: Path, **config: object) -> Path:
    """An adapter folder of a tiny Llama that names its base."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_lora(model, LoRAConfig(**{"r": 8, **config}))  # type: ignore[arg-type]
    save_adapter(random_adapters(model), tmp_path / "a")
    return tmp_path / "a"


def test_help_imports_neither_torch_nor_lightning(tmp_path: Path) -> None:
    for module in (False, True):
        done = run(tmp_path, "--help", module=module)
        assert done.returncode == 0, done.stderr
        assert "inspect" in done.stdout
        assert "merge" in done.stdout
        assert module or done.stderr.strip() == "[]"
    assert "--max_rank" in run(tmp_path, "inspect", "--help").stdout


def test_the_script_that_pip_installs_is_this_one() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["lightning-lora"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_version_and_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip().endswith(lightning_lora.__version__)
    for shell in ("bash", "zsh"):
        assert main(["completion", shell]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in ("fail_on_forgetting", "--layout", "inspect"))
        if shell == "bash":
            (tmp_path / "completion").write_text(said)
    ask = f"source {tmp_path}/completion; COMP_WORDS=(lightning-lora ev); COMP_CWORD=1; COMP_LINE='lightning-lora ev'; "
    ask += "$(complete -p lightning-lora | sed 's/.*-F \\([^ ]*\\).*/\\1/') lightning-lora ev lightning-lora; "
    done = subprocess.run(["bash", "-c", ask + "echo ${COMPREPLY[@]}"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "eval"


def test_an_interrupted_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal in the midst of a merge."""
    adapter = folder(tmp_path)
    monkeypatch.setattr(merge_disk, "copy_companions", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores the signal
    try:
        assert main(["merge", str(tmp_path / "base"), str(adapter), str(tmp_path / "merged")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1] == "lightning-lora merge: interrupted"
    assert not (tmp_path / "merged").exists()


def test_inspect_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", str(folder(tmp_path, use_rslora=True)))
    assert done.returncode == 1
    assert "vllm: ok" in done.stdout
    assert "sglang: no" in done.stdout
    assert 'Write it with `save_adapter(model, dir, layout="portable")`' in done.stdout
    nowhere = run(tmp_path, "inspect", str(tmp_path / "nowhere"), module=True)
    assert nowhere.returncode == 2
    assert nowhere.stdout == ""
    (line,) = nowhere.stderr.splitlines()
    assert line.startswith(f"lightning-lora inspect: error: there is no adapter folder at {tmp_path}/nowhere")


def test_inspect_says_ok_or_what_is_wrong_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(folder(tmp_path, r=32))
    assert main(["inspect", path, "--target", "peft"]) == 0
    assert main(["inspect", path, "--target", "vllm"]) == 1
    assert main(["inspect", path, "--target=vllm", "--max_rank=32"]) == 0
    capsys.readouterr()
    assert main(["inspect", path, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False
    assert report["loaders"]["peft"] == []
    assert {problem["rule"] for problem in report["loaders"]["vllm"]} == {"rank"}
    assert main(["inspect", path, "--target", "ollama"]) == 2
    assert "`target` must be one of" in capsys.readouterr().err


def test_merge_writes_the_live_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = folder(tmp_path)
    paths = [str(tmp_path / "base"), str(adapter), str(tmp_path / "merged")]
    assert main(["merge", *paths, "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(model, adapter)
    merge_adapters(model)
    state = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert main(["merge", *paths, "--dtype", "int3"]) == 2
    assert "`dtype` must be" in capsys.readouterr().err


def test_what_the_system_refuses_is_a_line_and_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    adapter = folder(tmp_path)
    assert main(["merge", str(tmp_path / "base"), str(adapter), str(tmp_path / "file" / "out"), "--quiet"]) == 2
    assert "lightning-lora merge: error: " in capsys.readouterr().err


@pytest.mark.parametrize("args", [[], ["inspect"], ["unknown"], ["inspect", "a", "--rank", "3"]])
def test_a_wrong_line_is_usage_and_exit_code_two(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert "lightning-lora" in capsys.readouterr().err
