# SPDX-License-Identifier: Apache-2.0
"""What holds of every method beside linears: runs, exact resume, files, switching off, and refusals by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_lora
from lightning_lora import (
    AdapterCheckpoint,
    BaseKL,
    ForgettingMonitor,
    MergeOnFitEnd,
    adapter_state_dict,
    add_weighted_adapter,
    apply_adapters,
    disable_adapters,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
    merge_to_disk,
    mixed_batch,
    save_adapter,
    set_adapter_scale,
    validate_adapter,
)
from lightning_lora.config import AdapterConfig, config_from_dict
from lightning_lora.errors import UnsupportedError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.unbuilt import refuse_unbuilt
from tests.cli.tiny import Tiny, TinyData
from tests.forgetting import tiny
from tests.helpers import LM, loader, make_trainer, random_adapters, tiny_gpt2, tiny_llama
from tests.methods.table import ROWS

IDS = torch.arange(32).view(2, 16) % 61


@dataclass(frozen=True)
class Case:
    """One method: its callback's name, arguments, and what it has."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    starts_as_base: bool = True
    merges: bool = False
    between: bool = True  # has strengths other than 0 and 1
    files: bool = True
    packs: bool = True
    rate: float = 1e-2

    @property
    def config(self) -> AdapterConfig:
        """Its configuration."""
        return getattr(lightning_lora, f"{self.name}Config")(**self.values)

    def callback(self, **values: Any) -> L.Callback:
        """Its callback."""
        return getattr(lightning_lora, self.name)(**self.values, **values)


CASES = {
    "prompt": Case("PromptTuning", {"num_virtual_tokens": 4}, starts_as_base=False, between=False),
    "prefix": Case("PrefixTuning", {"num_virtual_tokens": 4}, starts_as_base=False, between=False),
    "projected": Case(
        "PrefixTuning", {"num_virtual_tokens": 4, "prefix_projection": True}, starts_as_base=False, between=False
    ),
    "houlsby": Case("Bottleneck", {"placement": "houlsby", "bottleneck_size": 6}),
    "parallel": Case("Bottleneck", {"mode": "parallel", "reduction_factor": 8.0, "scaling": 2.0}),
    "norms": Case("NormTuning", merges=True),
    "full": Case("FullTuning", merges=True, files=False, packs=False, rate=1e-3),
}
SLOW = ("projected", "parallel")
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)


def converted(name: str, make: Callable[[], nn.Module] = tiny_llama, **changes: Any) -> nn.Module:
    model = make().eval()
    apply_adapters(model, config_from_dict({**CASES[name].config.to_dict(), **changes}))
    return random_adapters(model, std=0.05)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@EACH
def test_strengths_lead_from_the_base_to_what_was_trained(name: str) -> None:
    base = logits(tiny_gpt2())
    model = tiny_gpt2().eval()
    report = apply_adapters(model, CASES[name].config)
    assert report.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(logits(model), base) == CASES[name].starts_as_base
    random_adapters(model)
    on = logits(model)
    assert not torch.allclose(on, base)
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    set_adapter_scale(model, 0.0)
    assert torch.equal(logits(model), base)
    if CASES[name].between:
        set_adapter_scale(model, 0.5)
        assert (logits(model) - base).norm() < (on - base).norm()
    else:
        with pytest.raises(UnsupportedError, match="nothing lies between"):
            set_adapter_scale(model, 0.5)
    set_adapter_scale(model, 1.0)
    assert torch.equal(logits(model), on)


@pytest.mark.slow
@EACH
def test_a_run_beside_a_pull_to_the_base_is_resumed(name: str, tmp_path: Path) -> None:
    case = CASES[name]

    def run(folder: str, steps: int, ckpt: Path | None = None) -> LM:
        torch.manual_seed(0)
        module = LM(tiny_llama(), lr=case.rate)
        kept = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(tmp_path, [case.callback(), BaseKL(0.1, forward="net"), kept], max_steps=steps)
        trainer.fit(module, loader(), ckpt_path=ckpt)
        return module

    uncut = run("uncut", 6)
    cut = tmp_path / "uncut" / "step=3.ckpt"
    state = read_checkpoint(cut)["state_dict"]
    assert set(state) == set(adapter_state_dict(uncut))
    assert not any(".original." in key or ".base_layer." in key or ".decoder." in key for key in state)
    on = run("on", 6, cut)
    earlier, last = adapter_state_dict(uncut), adapter_state_dict(on)
    assert all(torch.equal(tensor, last[key]) for key, tensor in earlier.items())
    assert any(not torch.equal(tensor, state[key]) for key, tensor in earlier.items())
    with disable_adapters(uncut):
        assert torch.equal(logits(uncut.net), logits(tiny_llama()))
    other = tiny_llama()
    load_adapter(other, tmp_path / "uncut" / "step=6.ckpt")
    assert torch.equal(logits(other), logits(uncut.net))
    again = load_from_checkpoint(LM, cut)
    assert {k: v.shape for k, v in adapter_state_dict(again).items()} == {k: v.shape for k, v in state.items()}


@EACH
def test_folders_are_written_and_loaded(name: str, tmp_path: Path) -> None:
    model = converted(name)
    if not CASES[name].files:
        with pytest.raises(UnsupportedError, match="full fine-tuning leaves no adapter to write: merge the model"):
            save_adapter(model, tmp_path / "a")
        with pytest.raises(UnsupportedError, match="leaves no adapter to write"):
            trainer = make_trainer(tmp_path, [CASES[name].callback(), AdapterCheckpoint(tmp_path / "b")])
            trainer.fit(LM(tiny_llama()), loader())
        return
    if CASES[name].between:
        set_adapter_scale(model, 0.5)
    want = logits(model)
    saved = save_adapter(model, tmp_path / "a")
    assert saved.delta_error < 1e-6
    assert adapter_facts(tmp_path / "a").config["method"] == CASES[name].config.method
    other = tiny_llama().eval()
    load_adapter(other, tmp_path / "a")
    assert (logits(other) - want).abs().max() < 1e-6
    if name == "projected":
        with pytest.raises(UnsupportedError, match=r"an MLP \(`prefix_projection`\) takes no adapter folder in"):
            load_adapter(model, tmp_path / "a")
    else:
        random_adapters(model, seed=3)
        load_adapter(model, tmp_path / "a")
        assert (logits(model) - want).abs().max() < 1e-6
    set_adapter_scale(model, 0.0)
    if name != "norms":
        with pytest.raises(lightning_lora.errors.ConfigError, match="an adapter file needs one above zero"):
            save_adapter(model, tmp_path / "b")


@EACH
def test_what_programs_load_it(name: str, tmp_path: Path) -> None:
    if not CASES[name].files:
        return
    save_adapter(converted(name), tmp_path / "a")
    report = validate_adapter(tmp_path / "a", "all")
    ours_alone = CASES[name].name == "Bottleneck"
    assert bool(report.loaders["peft"]) == ours_alone
    for server in ("vllm", "sglang", "tgi", "llama.cpp"):
        assert "method" in [problem.rule for problem in report.loaders[server]]
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert ("peft_type" in written) != ours_alone


@EACH
def test_what_is_not_built_is_refused_by_name(name: str, tmp_path: Path) -> None:
    case, model = CASES[name], converted(name)
    title = case.config.title
    for use in ("fsdp1", "fsdp2", "deepspeed", "tensor_parallel"):
        with pytest.raises(UnsupportedError, match=f"{title} is not built for the strategy: do that"):
            refuse_unbuilt(model, use, "the strategy", {}, "do that")  # type: ignore[arg-type]
    text = f"is {title}, which is not built for `mixed_batch`"
    with pytest.raises(UnsupportedError, match=text), mixed_batch(model, ["default", "default"]):
        pass
    with pytest.raises(UnsupportedError):
        add_weighted_adapter(model, ["default"], [1.0], "sum")
    if case.files:
        way = ": merge the model" if case.merges else "update: write layout="
        with pytest.raises(UnsupportedError, match=way):
            save_adapter(model, tmp_path / "p", layout="portable")
        save_adapter(model, tmp_path / "a")
        with pytest.raises(UnsupportedError, match=f"several adapters in one model .* not for {title}"):
            load_adapter(model, tmp_path / "a", name="second")
        tiny_llama().save_pretrained(tmp_path / "base")
        with pytest.raises(
            UnsupportedError,
            match=f"{title} is not merged on disk: {'load it' if case.merges else 'it has no merged form'}",
        ):
            merge_to_disk(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    if case.merges:
        return
    with pytest.raises(UnsupportedError, match=f"{title} cannot be merged: "):
        merge_adapters(model)
    with pytest.raises(UnsupportedError, match=f"{title} cannot be merged: "):
        trainer = make_trainer(tmp_path, [case.callback(), MergeOnFitEnd(tmp_path / "m")])
        trainer.fit(LM(tiny_llama()), loader())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.merges])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_merged(name: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for strength in (1.0, 0.5):
        model = converted(name, make)
        set_adapter_scale(model, strength)
        want = logits(model)
        report = merge_adapters(model, IDS)
        assert report.logit_error is not None
        assert report.logit_error < 1e-6
        assert (logits(model) - want).abs().max() < 1e-5
        assert not list(adapter_modules(model))
    torch.manual_seed(0)
    module = LM(make(), lr=1e-3)
    trainer = make_trainer(tmp_path, [CASES[name].callback(), MergeOnFitEnd(tmp_path / "merged")], max_steps=3)
    trainer.fit(module, loader())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert (logits(merged) - logits(module.net)).abs().max() < 1e-5


@EACH
def test_from_yaml_and_round(name: str, tmp_path: Path) -> None:
    import yaml
    from lightning.pytorch.cli import LightningCLI

    case = CASES[name]
    assert config_from_dict(case.config.to_dict()) == case.config
    assert case.config.to_dict()["method"] == case.config.method
    entry = {"class_path": f"lightning_lora.{case.name}", "init_args": case.values}
    trainer = {"max_steps": 1, "accelerator": "cpu", "logger": False, "callbacks": [entry]}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"trainer": {**trainer, **quiet}}))
    args = ["--config", str(tmp_path / "c.yaml")]
    cli = LightningCLI(Tiny, TinyData, args=args, run=False, save_config_callback=None)
    (callback,) = [c for c in cli.trainer.callbacks if type(c).__name__ == case.name]
    assert callback.config == case.config
    written = yaml.safe_load(cli.parser.dump(cli.config, skip_check=True))["trainer"]["callbacks"][0]
    assert {k: v for k, v in written["init_args"].items() if k in case.values} == case.values


@pytest.mark.slow
@EACH
def test_forgetting_is_measured_beside_it(name: str, tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "tasks", "alpha", tiny.items(12, seed=1))
    monitor = ForgettingMonitor(str(path), tiny.tokenizer(), every_n_steps=2, items_per_eval=6)
    trainer = make_trainer(tmp_path, [CASES[name].callback(), monitor], max_steps=2)
    module = tiny.Student(tiny.gpt2())
    trainer.fit(module, tiny.loader())
    assert [(r.kind, r.step) for r in monitor.history][0][1] == 0
    changed = [r for r in monitor.history if r.step == 2]
    assert changed
    with disable_adapters(module):
        ids = torch.arange(2, 12)[None]
        assert torch.equal(module.net.eval()(ids).logits, tiny.gpt2().eval()(ids).logits)


@pytest.mark.slow
def test_two_ranks_train_alike_and_what_spreads_a_model_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("beside_ranks.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert set(first["trained"]) == {"prompt", "prefix", "bottleneck", "norms", "full"}
    for row in (row for row in ROWS if row.name in first["trained"]):
        mine, other = first["trained"][row.name], second["trained"][row.name]
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
        title = row.config().title
        assert f'{title} is not built for FSDP 1: use the strategy "lora_ddp"' in first["fsdp1"][row.name]
        assert f"{title} is not built for FSDP 2" in first["fsdp2"][row.name]
        assert f"{title} is not built for tensor parallelism" in first["tensor_parallel"][row.name]
