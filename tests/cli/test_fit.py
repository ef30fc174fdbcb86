# SPDX-License-Identifier: Apache-2.0
"""``lightning-lora fit``: what it makes of a configuration, that it trains, and how it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_lora import (
    AdapterCheckpoint,
    CausalLMModule,
    ForgettingMonitor,
    InstructionDataModule,
    LoRA,
    MergeOnFitEnd,
)
from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.cli.fit_cli import FitCLI
from lightning_lora.cli.main import main
from lightning_lora.errors import ConfigError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from small_base.data import MODEL_DIR
from tests.cli.test_commands import run
from tests.cli.tiny import TinyBase
from tests.methods.table import ROWS, Row
from tests.test_readme import write_tasks

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/fit/config.yaml"
QUIET = ["accelerator=cpu", "logger=false", "enable_progress_bar=false", "enable_model_summary=false"]
QUICK = [*(f"--trainer.{word}" for word in QUIET), "--trainer.max_steps=4"]
TINY = ["--model=tests.cli.tiny.Tiny", "--data=tests.cli.tiny.TinyData"]
# In full: with bitsandbytes imported, as earlier tests may have done, "AdamW" has two meanings for jsonargparse.
ADAMW = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.01"]


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example's configuration where the repository has it, its run cut short."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_tasks(tmp_path / "tasks")
    config = yaml.safe_load(CONFIG.read_text().replace("examples/small_base/tasks/", "tasks/"))
    config["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "logger": False, "enable_progress_bar": False}
    config["forgetting"] |= {"at_steps": [1], "items_per_eval": 4}
    config["data"] |= {"batch_size": 2, "max_length": 64, "validation_share": 0.01}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "config.yaml"


def trained(cli: FitCLI) -> list[LoRALinear]:
    adapters = [m for m in cli.model.modules() if isinstance(m, LoRALinear)]
    assert adapters
    assert all(m.lora_B.abs().sum() > 0 for m in adapters)
    return adapters


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_help_is_a_page_without_torch(tmp_path: Path) -> None:
    done = run(tmp_path, "fit", "--help")
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert "--lora.r" in done.stdout
    assert len(done.stdout.splitlines()) < 60


def test_page_of_help_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option of the short page is one of the real parser, with the default that it has there."""
    from argparse import SUPPRESS

    from lightning_lora.cli.fit import _PAGE

    config = yaml.safe_load(printed(capsys, "--model.base=base", "--data.train=a.jsonl"))
    for name, default, _ in _PAGE:
        value: Any = config
        for part in name.removeprefix("--").split("."):
            inside = value.get("init_args", value) if isinstance(value, dict) else {}
            assert part in inside or name == "--config", name
            value = inside.get(part)
        if default is not SUPPRESS:
            assert default in (value, (value or {}).get("class_path") if isinstance(value, dict) else None), name


def test_every_option_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--help_all"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in ("--lora.lora_alpha", "--checkpoint.save_top_k", "--forgetting.every_n_steps", "--merge.weights"):
        assert option in said


def test_printed_configuration_fed_back_prints_itself(example: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once = printed(capsys, "--config", str(example), "--lora.r=4", "--merge.dirpath=here")
    (example.parent / "once.yaml").write_text(once)
    assert printed(capsys, "--config", str(example.parent / "once.yaml")) == once
    values = yaml.safe_load(once)
    assert values["model"]["class_path"] == "lightning_lora.CausalLMModule"
    assert (values["lora"]["r"], values["lora"]["lora_alpha"], values["lora"]["quantize"]) == (4, 32.0, "nf4")
    assert values["merge"]["dirpath"] == "here"


@pytest.mark.parametrize("measured", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_example_fits_and_merges(example: Path, measured: bool) -> None:
    assert main(["fit", "--config", str(example), *([] if measured else ["--forgetting.tasks=null"])]) == 0
    outputs = example.parent / "outputs/fit"
    assert list((outputs / "adapters").rglob("adapter_model.safetensors"))
    assert (outputs / "merged/merge_report.json").is_file()
    kept = yaml.safe_load((outputs / "config.yaml").read_text())
    assert kept["lora"]["quantize"] == "nf4"
    assert bool(kept["forgetting"]["tasks"]) == measured


def test_first_line_of_the_example_is_its_command() -> None:
    assert CONFIG.read_text().splitlines()[0] == f"# lightning-lora fit --config {CONFIG.relative_to(ROOT)}"


def test_callbacks_are_there_when_they_are_asked_for() -> None:
    cli = FitCLI([*TINY, *QUICK])
    assert [type(c) for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_lora")] == [
        LoRA, AdapterCheckpoint,
    ]  # fmt: skip
    assert cli.trainer.accumulate_grad_batches == 8
    more = ["--forgetting.tasks=[a.yaml]", "--forgetting.every_n_steps=5", "--merge.dirpath=merged"]
    cli = FitCLI([*TINY, *QUICK, *more, "--trainer.enable_checkpointing=false", "--trainer.accumulate_grad_batches=1"])
    own = [c for c in cli.trainer.callbacks if type(c).__module__.startswith("lightning_lora")]
    assert [type(c) for c in own] == [LoRA, ForgettingMonitor, MergeOnFitEnd]
    assert own[1].tasks == ["a.yaml"]  # type: ignore[attr-defined]
    assert cli.trainer.accumulate_grad_batches == 1


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("ia3", "full")], ids=str)
def test_any_method_is_one_key(row: Row) -> None:
    method = {"method": {"class_path": f"lightning_lora.{row.callback}", "init_args": row.settings}}
    cli = FitCLI([*TINY, *QUICK, "--method", json.dumps(method["method"]), "--checkpoint.save_top_k=1"])
    (made,) = [c for c in cli.trainer.callbacks if isinstance(c, AdapterCallback)]  # type: ignore[attr-defined]
    assert made.config == row.config()
    saver = cli.trainer.checkpoint_callback
    assert isinstance(saver, AdapterCheckpoint) == (row.peft or row.own_folder)
    assert saver.monitor == "val_loss"  # type: ignore[union-attr]


def test_another_method_trains_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "method: {class_path: lightning_lora.VeRA, init_args: {r: 4, target_modules: ['net.0']}}\n"
    )
    cli = FitCLI([*TINY, *QUICK, "--config=run.yaml", "--checkpoint.dirpath=adapters"])
    cli.fit()
    assert [type(m).__name__ for _, m in adapter_modules(cli.model)] == ["VeRALinear"]
    assert list((tmp_path / "adapters").glob("*/adapter_model.safetensors"))


def test_a_run_of_fit_has_one_method() -> None:
    method = "--method=lightning_lora.IA3"
    with pytest.raises(ConfigError, match=r"`lora\.r` is given, and `method` IA3: a run has one method"):
        FitCLI([*TINY, *QUICK, method, "--lora.r=4"])
    with pytest.raises(ConfigError, match="`fit` adds IA3 itself: write its arguments under `method`, not `trainer`"):
        FitCLI([*TINY, *QUICK, "--trainer.callbacks=[{'class_path': 'lightning_lora.IA3'}]"])


def test_any_module_and_data_train_adapters(tmp_path: Path) -> None:
    cli = FitCLI([*TINY, *QUICK, "--lora.r=2", "--lora.target_modules=[net.0]", "--checkpoint.dirpath=adapters"])
    cli.fit()
    assert [m.r for m in trained(cli)] == [2]
    assert list((tmp_path / "adapters").glob("*/adapter_model.safetensors"))


@pytest.mark.parametrize("late", [False, True])
def test_optimizer_of_the_command_line_holds_the_adapters(late: bool) -> None:
    """Also of a model that is loaded in ``configure_model``: LightningCLI would fail over no parameters at all."""
    data = [{"question": f"{i}?", "answer": f"it is {i}"} for i in range(8)]
    own = (
        [f"--model.base={MODEL_DIR}", f"--data.train={data}", "--data.max_length=32"]
        if late
        else ["--model=tests.cli.tiny.TinyBase", "--data=tests.cli.tiny.TinyData"]
    )
    schedule = [
        "--lr_scheduler=torch.optim.lr_scheduler.StepLR",
        "--lr_scheduler.step_size=1",
        "--lr_scheduler.gamma=.5",
    ]
    cli = FitCLI([*own, *QUICK, *ADAMW, *schedule, "--lora.r=2", "--trainer.max_steps=1"])
    assert isinstance(cli.model, CausalLMModule if late else TinyBase)
    assert isinstance(cli.datamodule, InstructionDataModule) == late
    cli.fit()
    (optimizer,) = cli.trainer.optimizers
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for m in trained(cli) for p in (m.lora_A, m.lora_B)}
    assert optimizer.param_groups[0]["initial_lr"] == 0.01


def test_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    args = [*TINY, *QUICK, "--lora.r=2", "--checkpoint.dirpath=a", "--trainer.accumulate_grad_batches=1"]
    saved = [
        *args,
        "--checkpoint.every_n_train_steps=2",
        "--checkpoint.monitor=null",
        "--checkpoint.filename=at-{step}",
    ]
    whole = FitCLI([*saved, "--checkpoint.save_top_k=-1"])
    whole.fit()
    (middle,) = tmp_path.rglob("*step=2.ckpt")
    resumed = FitCLI([*args, f"--ckpt_path={middle}", "--checkpoint.dirpath=b"])
    resumed.fit()
    for a, b in zip(trained(whole), trained(resumed), strict=True):
        assert torch.equal(a.lora_B, b.lora_B)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.callbacks=lightning_lora.LoRA"], "`fit` adds LoRA itself: write its arguments under `lora`"),
        (["--lr_scheduler=torch.optim.lr_scheduler.StepLR", "--lr_scheduler.step_size=1"], "needs `optimizer`"),
    ],
)
def test_what_does_not_go_together_is_a_line_and_exit_code_two(
    args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *TINY, *QUICK, *args]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-lora fit: error: ")]
    assert said in line


def test_malformed_data_is_a_line_and_exit_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    assert main(["fit", f"--model.base={MODEL_DIR}", "--data.train=a.jsonl", *QUICK]) == 2
    assert "lightning-lora fit: error: a.jsonl, line 2: `text` must be a text, got int 3" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--lora.rank=8"], ["--lora.quantize=nf5"], ["--model.bas=x"], []])
def test_a_wrong_line_is_usage_and_exit_code_two(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    assert stop.value.code == 2
    assert "lightning-lora fit" in capsys.readouterr().err


def test_warnings_are_a_line_each_and_bars_are_for_terminals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f'{{"prompt": "what is {i}?", "completion": " it is {i}"}}\n' for i in range(30))
    (tmp_path / "a.jsonl").write_text(rows)
    words = [f"--model.base={MODEL_DIR}", f"--data.train={tmp_path}/a.jsonl", "--data.validation_share=0", *QUICK]
    assert main(["fit", *words, "--trainer.enable_checkpointing=false", f"--trainer.default_root_dir={tmp_path}"]) == 0
    said = capsys.readouterr().err
    assert "Notice: Training data: 30 examples are few" in said
    assert ".py:" not in said
    assert "Loading weights" not in said
