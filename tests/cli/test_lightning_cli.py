# SPDX-License-Identifier: Apache-2.0
"""A plain LightningCLI, unchanged: callbacks from YAML and shell, help, round trip, its own optimizer."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_lora
from lightning_lora.nn.linear import LoRALinear
from tests.cli.tiny import Tiny, TinyBase, TinyData

CALLBACKS = ("LoRA", "AdapterCheckpoint", "ForgettingMonitor", "MergeOnFitEnd", "BaseKL", "ReplayMix")
QUICK = [
    "--trainer.max_steps=4",
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
# In full: with bitsandbytes imported, as earlier tests may have done, "AdamW" has two meanings for jsonargparse.
ADAMW = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01"]


def run(*args: str, module: type = Tiny, **kwargs: Any) -> LightningCLI:
    return LightningCLI(module, TinyData, args=[*args], save_config_callback=None, **kwargs)


def adapters(cli: LightningCLI) -> list[LoRALinear]:
    return [m for m in cli.model.modules() if isinstance(m, LoRALinear)]


def test_callback_from_the_command_line_trains_adapters() -> None:
    cli = run("fit", *QUICK, "--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.r=8")
    assert [m.r for m in adapters(cli)] == [8, 8]
    assert all(m.lora_B.abs().sum() > 0 for m in adapters(cli))


def test_callbacks_from_yaml_run(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  max_steps: 4
  val_check_interval: 2
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: lightning_lora.LoRA
      init_args: {r: 4, lora_alpha: 8, target_modules: [net.0, net.2], quantize: none}
    - class_path: lightning_lora.AdapterCheckpoint
      init_args: {dirpath: adapters, monitor: val_loss, save_top_k: 1}
    - class_path: lightning_lora.MergeOnFitEnd
      init_args: {dirpath: merged}
"""
    )
    cli = run("fit", "--config", str(config))
    assert len(adapters(cli)) == 2
    assert list((tmp_path / "adapters").rglob("adapter_model.safetensors"))
    assert list((tmp_path / "merged").glob("*.safetensors"))


def test_optimizer_from_the_command_line_trains_adapters() -> None:
    """LightningCLI makes ``--optimizer`` before conversion: unrepaired, it has no adapter, B stays zero."""
    cli = run(
        "fit",
        *QUICK,
        *ADAMW,
        "--lr_scheduler=StepLR",
        "--lr_scheduler.step_size=1",
        "--trainer.callbacks+=lightning_lora.LoRA",
        "--trainer.callbacks.r=2",
        module=TinyBase,
    )
    (optimizer,) = cli.trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p) for m in adapters(cli) for p in (m.lora_A, m.lora_B)}
    assert trained
    assert held == trained
    assert all(m.lora_B.abs().sum() > 0 for m in adapters(cli))


def test_optimizer_from_the_command_line_gives_the_bits_of_a_configured_one() -> None:
    """The repaired optimizer is not merely alive: it does what the module's own would have done."""
    lora = ["--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.r=2", "--seed_everything=3"]
    given = run("fit", *QUICK, *ADAMW, *lora, module=TinyBase)
    own = run("fit", *QUICK, *lora, module=Tiny)
    for a, b in zip(adapters(given), adapters(own), strict=True):
        assert torch.equal(a.lora_B, b.lora_B)


def test_loraplus_from_yaml_parts_the_optimizer_and_its_schedule(tmp_path: Path) -> None:
    """LightningCLI makes optimizer and scheduler before there are adapters; both have a group of B's in the run."""
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  max_steps: 8
  callbacks:
    - class_path: lightning_lora.LoRA
      init_args: {r: 4, loraplus_lr_ratio: 16}
optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
lr_scheduler: {class_path: torch.optim.lr_scheduler.ExponentialLR, init_args: {gamma: 0.5}}
"""
    )
    cli = run("fit", "--config", str(config), *QUICK[1:], module=TinyBase)
    (optimizer,) = cli.trainer.optimizers
    assert [g["lr"] for g in optimizer.param_groups] == [0.005, 0.08]  # after one epoch
    held = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    assert held == [{id(m.lora_A) for m in adapters(cli)}, {id(m.lora_B) for m in adapters(cli)}]
    printed = yaml.safe_load(cli.parser.dump(cli.config))
    (entry,) = printed["fit"]["trainer"]["callbacks"] if "fit" in printed else printed["trainer"]["callbacks"]
    assert entry["init_args"]["loraplus_lr_ratio"] == 16


def test_optimizer_by_its_short_name_in_a_process_of_its_own() -> None:
    """``--optimizer=AdamW`` from a shell: nothing that is imported by then makes the name ambiguous."""
    code = """
from tests.cli.test_lightning_cli import QUICK, TinyBase, adapters, run
lora = ["--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.r=2", "--trainer.callbacks.quantize=nf4"]
cli = run("fit", *QUICK, "--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01", *lora, module=TinyBase)
assert len(adapters(cli)) == 2
assert all(m.lora_B.abs().sum() > 0 for m in adapters(cli))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", CALLBACKS)
def test_help_has_a_line_for_every_argument(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", f"--trainer.callbacks.help=lightning_lora.{name}")
    assert stop.value.code == 0
    helped = help_lines(capsys.readouterr().out)
    assert arguments_of(getattr(lightning_lora, name)) <= set(helped)
    for argument, text in helped.items():  # also those that come from a parent class
        assert len(text.split()) >= 3, f"{name}.{argument} has no line of help: {text!r}"


def test_help_check_can_fail() -> None:
    shown = "  --trainer.callbacks.r R  (type: int, default: 16)\n"
    shown += "  --trainer.callbacks.s S, --trainer.callbacks.s+ S\n       What s is for. (type: int, default: 1)\n"
    assert help_lines(shown) == {"r": "", "s": "What s is for."}


def arguments_of(cls: type) -> set[str]:
    """The named arguments of a constructor."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)} - {"self"}
    assert named, f"{cls.__name__} has no named argument to check"
    return named


def help_lines(shown: str) -> dict[str, str]:
    """Argument -> its help text, without jsonargparse's own note on type and default."""
    option = r"--trainer\.callbacks\.(\w+)\+? (?:[[{]\S+[]}]|[^\s,]+)"
    helped = {}
    for entry in re.split(r"\n  (?=--)", "\n" + shown):
        match = re.match(rf"{option}(?:, {option})*\s+(.*)", entry, re.DOTALL)
        if match:
            text = " ".join(match.group(3).split())
            helped[match.group(1)] = re.sub(r"\((?:required, )?type: .*", "", text).strip()
    return helped


@pytest.mark.parametrize("name", CALLBACKS)
def test_printed_config_round_trips(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {
        "AdapterCheckpoint": ["--trainer.callbacks.dirpath=adapters"],
        "ForgettingMonitor": ["--trainer.callbacks.tasks=[tasks/speech.yaml]"],
        "MergeOnFitEnd": ["--trainer.callbacks.dirpath=merged"],
        "ReplayMix": ["--trainer.callbacks.data=my.general_rows"],
    }
    callback = [f"--trainer.callbacks+=lightning_lora.{name}", *needed.get(name, [])]
    first = printed_config(capsys, "fit", *callback, "--print_config")
    (tmp_path / "printed.yaml").write_text(first)
    second = printed_config(capsys, "fit", "--config", str(tmp_path / "printed.yaml"), "--print_config")
    assert yaml.safe_load(first) == yaml.safe_load(second)
    (entry,) = yaml.safe_load(first)["trainer"]["callbacks"]
    assert entry["class_path"] in (
        f"lightning_lora.{name}",
        getattr(lightning_lora, name).__module__ + f".{name}",
    )
    assert all(is_primitive(value) for value in entry["init_args"].values()), entry


def printed_config(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 0
    return capsys.readouterr().out


def is_primitive(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(is_primitive(v) for v in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float | bool)


def test_misspelt_argument_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", *QUICK, "--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.rank=8")
    assert "rank" in capsys.readouterr().err


def test_wrong_choice_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", *QUICK, "--trainer.callbacks+=lightning_lora.LoRA", "--trainer.callbacks.quantize=nf5")
    said = capsys.readouterr().err
    assert "nf5" in said
    assert "nf4" in said


def test_every_argument_of_the_monitor_can_be_written_in_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "tasks": ["tasks/speech.yaml", "arc_easy"], "tokenizer": "base/", "every_n_steps": 100, "every_n_epochs": 2,
        "at_steps": [10, 20], "at_fractions": [0.1, 0.5], "max_time_fraction": 0.05, "on_fit_start": False,
        "on_fit_end": True, "items_per_eval": 50, "batch_tokens": 4096, "num_fewshot": 2, "include_path": "tasks/",
        "tolerance": 0.01, "alpha": 0.1, "on_forgetting": "rollback", "seed": 3, "target_tasks": ["tasks/domain.yaml"],
    }  # fmt: skip
    callback = {"class_path": "lightning_lora.ForgettingMonitor", "init_args": given}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    printed = printed_config(capsys, "fit", "--config", str(config), "--print_config")
    (entry,) = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert {name: entry["init_args"][name] for name in given} == given
