# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed: adapters in one file, optimizer shards beside it, resume bit for bit under ZeRO 1 to 3.

Runs need DeepSpeed, which the test tools do not install: ``make test-deepspeed`` does. They use its own engine on the
CPU, where Lightning's word that its strategy is for CUDA alone is left out; nothing else is.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_lora import AdapterDeepSpeedStrategy, LoRAConfig, adapter_state_dict, apply_lora, load_from_checkpoint
from lightning_lora.errors import CheckpointError, ConfigError, MissingDependencyError, Notice, UnsupportedError
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.zero_files import check_pickles
from lightning_lora.strategies.deepspeed import adapters_only
from lightning_lora.strategies.zero_options import refuse_adapters, refuse_options
from tests.helpers import LM, loader, tiny_llama

SCRIPT = Path(__file__).parent / "deepspeed_runs.py"
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="DeepSpeed is not installed: make test-deepspeed")

ALONE = ("1/nf4/32-true", "2/nf4/bf16-mixed", "3/none/bf16-mixed")
ZERO = {"zero_optimization": {"stage": 2}}


def launch(folder: Path, processes: int, device: str, cases: tuple[str, ...]) -> list[dict[str, Any]]:
    """What each rank found."""
    command = [sys.executable, str(SCRIPT), str(folder), str(processes), device, *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder, the cases, and what each rank found."""
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, ALONE, launch(folder, 1, "cpu", ALONE)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_resume(folder: Path, cases: tuple[str, ...], found: list[dict[str, Any]]) -> None:
    """Resumed runs, those of a user's own strategy among them, end with the bits of the uncut one."""
    for case in cases:
        saved = read_checkpoint(folder / case / "uncut" / "step=4.ckpt" / "adapters.ckpt")["state_dict"]
        for each in (rank[case] for rank in found):
            assert len(each["uncut"]) == each["held"] == 28
            assert same(each["uncut"], each["resumed"]), case
            assert same(each["uncut"], each["users"]), case
            assert not same(each["uncut"], each["loaded"]), case
            assert same(each["loaded"], {n: t.to(each["loaded"][n].dtype) for n, t in saved.items()}), case
            assert same(each["uncut"], found[0][case]["uncut"]), case
            assert each["excluded"] is True
            assert (each["spread"] > 0) == case.startswith("3")
            assert each["dtypes"] == ({"torch.float32"} if "nf4" in case else set())
        assert {t.dtype for t in saved.values()} == {torch.float32}
        merges = len(found) == 1 or not case.startswith("3")
        assert (folder / case / "merged" / "model.safetensors").is_file() == merges


@needs_deepspeed
@pytest.mark.slow
def test_resumed_runs_end_with_the_same_bits(runs: Any) -> None:
    check_resume(*runs)


@needs_deepspeed
@pytest.mark.slow
def test_deepspeeds_files_hold_adapters_only(runs: Any) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    folder, cases, _ = runs
    for case in cases:
        cut = folder / case / "uncut" / "step=4.ckpt"
        saved = read_checkpoint(cut / "adapters.ckpt")
        assert "optimizer_states" not in saved
        written = sorted((cut / "checkpoint").glob("*model_states.pt"))
        assert len(written) == (len(runs[2]) if case.startswith("3") else 1)
        for file in written:
            state = torch.load(file, weights_only=True)
            assert state["module"].keys() == saved["state_dict"].keys()
            assert state["frozen_param_fragments"] is None
        assert same(get_fp32_state_dict_from_zero_checkpoint(cut), saved["state_dict"])  # DeepSpeed's own way out


@needs_deepspeed
@pytest.mark.slow
def test_any_other_strategy_loads_the_adapters(runs: Any, tmp_path: Path) -> None:
    folder, cases, _ = runs
    file = folder / cases[0] / "uncut" / "step=4.ckpt" / "adapters.ckpt"
    loaded = load_from_checkpoint(LM, file, net=_start())
    saved = read_checkpoint(file)["state_dict"]
    assert same({n: p.detach() for n, p in loaded.named_parameters() if p.requires_grad}, dict(saved))


def _start() -> torch.nn.Module:
    L.seed_everything(7, verbose=False)
    return tiny_llama(vocab=64)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("stage", r"CheckpointError: .*step=4.ckpt holds ZeRO's .* setting \(stage: checkpoint 3, this run 2\)"),
        ("processes", r"CheckpointError: .*processes holds ZeRO's .* \(processes: checkpoint \d, this run \d\)"),
        ("rank", r"AdapterMismatchError: .*step=4.ckpt: .*another LoRA configuration \(r: checkpoint 4, model 8\)"),
        ("damaged", r"CheckpointError: .*damaged/checkpoint is damaged: '.*optim_states.pt' has changed since"),
        ("half", r"CheckpointError: .*half holds no 'adapters.ckpt': it was written by DeepSpeed without LoRA"),
        ("missing", r"FileNotFoundError: there is no checkpoint file at .*nowhere.ckpt"),
        ("lost", r"AdapterMismatchError: .*lost: the adapter does not fit the model: 1 of 28 tensors are missing"),
        ("evil", r"CheckpointError: .*optim_states.pt is no file of DeepSpeed's optimizer shards as it writes them"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_on_every_rank(runs: Any, case: str, text: str) -> None:
    import re

    folder, cases, found = runs
    for rank in found:
        assert re.search(text, rank["refusals"][case], re.DOTALL), rank["refusals"][case]
    assert not (folder / cases[-1] / "ran").exists()


@needs_deepspeed
@pytest.mark.slow
def test_a_save_that_fails_on_one_rank_fails_on_all_and_training_goes_on(runs: Any) -> None:
    folder, cases, found = runs
    for unlucky in range(len(found)):
        for rank, each in enumerate(found):
            told = each["refusals"]["full disk"][unlucky]
            assert ("File too large" in told) if rank == unlucky else (f"rank {unlucky} failed to save" in told), told
    left = folder / cases[-1] / "limited"
    assert [p.name for p in left.iterdir()] == ["own.ckpt"]  # no half-written folder beside it
    assert len(read_checkpoint(left / "own.ckpt" / "adapters.ckpt")["state_dict"]) == 28


@pytest.mark.gpu
@needs_deepspeed
def test_the_same_runs_on_gpus(tmp_path: Path) -> None:
    """Every CUDA device of the machine: ``python -m pytest -m gpu tests/strategies/test_deepspeed.py``."""
    devices = torch.cuda.device_count()
    if not devices:
        pytest.skip("no CUDA device")
    cases = ("1/nf4/bf16-mixed", "2/nf4/bf16-mixed", "3/none/bf16-mixed", "3/nf4/bf16-mixed")
    check_resume(tmp_path, cases, launch(tmp_path, devices, "cuda", cases))


@needs_deepspeed
def test_lightning_refuses_a_cpu(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy="lora_deepspeed", logger=False, max_steps=1)
    with pytest.raises(RuntimeError, match="DeepSpeed strategy is only supported on CUDA GPUs but `CPUAccelerator`"):
        trainer.fit(LM(tiny_llama()), loader())


@needs_deepspeed
def test_frozen_parameters_are_left_out_whatever_was_asked() -> None:
    with pytest.warns(Notice, match="`exclude_frozen_parameters=False` is not followed"):
        strategy = AdapterDeepSpeedStrategy(stage=3, exclude_frozen_parameters=False)
    assert strategy.exclude_frozen_parameters is True
    assert strategy.config["zero_optimization"]["stage"] == 3


@needs_deepspeed
@pytest.mark.parametrize("options", [{"load_full_weights": True}, {"remote_device": "nvme"}, {"config": {}}])
def test_options_are_refused_where_they_are_given(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        AdapterDeepSpeedStrategy(**options)


@pytest.mark.skipif(INSTALLED, reason="DeepSpeed is installed")
def test_without_deepspeed() -> None:
    with pytest.raises(MissingDependencyError, match="needs DeepSpeed: `pip install deepspeed`"):
        AdapterDeepSpeedStrategy()


def test_a_stage_that_is_none() -> None:
    with pytest.raises(ConfigError, match='`stage` must be 1, 2 or 3, got 0; without ZeRO use `strategy="lora_ddp"`'):
        AdapterDeepSpeedStrategy(stage=0)


def test_it_is_known_by_name() -> None:
    assert StrategyRegistry["lora_deepspeed"]["strategy"] is AdapterDeepSpeedStrategy


def test_options_that_go_with_adapters() -> None:
    offload = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    refuse_options(ZERO, full_weights=False, remote_device=None, packed=True)
    refuse_options(offload, full_weights=False, remote_device=None, packed=False)


def test_dora_does_not_go_with_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    apply_lora(model, LoRAConfig(r=2, use_dora=True))
    with pytest.raises(UnsupportedError, match=r"DoRA \(`use_dora`\) is not built for DeepSpeed: .*FSDP 2"):
        refuse_adapters(model)


@pytest.mark.parametrize(
    ("config", "given", "text"),
    [
        ({}, {}, 'set `stage` to 1, 2 or 3, or use `strategy="lora_ddp"`'),
        ({"zero_optimization": {"stage": 0}}, {}, "without ZeRO there is nothing"),
        (ZERO, {"full_weights": True}, "`load_full_weights=True` loads whole models"),
        (ZERO, {"remote_device": "nvme"}, "`remote_device='nvme'` builds the model in pieces"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {"packed": True},
            "`offload_parameters` moves parameters, and a packed base is none",
        ),
        ({**ZERO, "checkpoint": {"writer": {"type": "FAST"}}}, {}, "asks for another writer or form"),
        ({**ZERO, "checkpoint": {"load_universal": True}}, {}, "asks for another writer or form"),
    ],
)
def test_options_that_do_not(config: dict[str, Any], given: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        refuse_options(config, **{"full_weights": False, "remote_device": None, **given})
    assert text in str(caught.value)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_what_deepspeed_asks_for_inside_a_save(quantize: Any) -> None:
    """The adapters alone: DeepSpeed leaves frozen parameters out by itself, but no buffers, as packed codes are."""
    module = LM(tiny_llama(vocab=64))
    apply_lora(module, LoRAConfig(r=4, quantize=quantize))
    before = module.state_dict().keys()
    with adapters_only(module):
        assert module.state_dict().keys() == adapter_state_dict(module).keys()
    assert module.state_dict().keys() == before > adapter_state_dict(module).keys()


@needs_deepspeed
def test_a_truncated_file_of_deepspeeds(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "whole.pt")
    check_pickles(tmp_path)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cut.pt is no file of DeepSpeed's optimizer shards"):
        check_pickles(tmp_path)
