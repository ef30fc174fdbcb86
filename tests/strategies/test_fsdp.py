# SPDX-License-Identifier: Apache-2.0
"""FSDP 1 in two CPU processes: each adapter is a unit, checkpoints hold adapters alone and resume exactly."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lightning_lora import AdapterFSDPStrategy
from lightning_lora.errors import ConfigError
from lightning_lora.io.distributed import is_distributed, read_either
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.strategies.fsdp import _with_units
from tests.e2e.test_older_runs import older
from tests.strategies.sharded_runs import CUT
from tests.strategies.test_model_parallel import distance, same

SCRIPT = Path(__file__).parent / "fsdp_runs.py"
KINDS = [f"{quantize}-{shards}" for quantize in ("none", "nf4") for shards in (False, True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one launch of two processes left, and a checkpoint of an older run from which they go on."""
    folder = tmp_path_factory.mktemp("fsdp")
    torch.save(older(folder, only_trained=False)[1], folder / "moments.pt")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def adapters(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Whole adapters from a run's checkpoint."""
    return read_either(folder / name / f"step={CUT}.ckpt")["state_dict"]


def test_the_strategy_has_a_name() -> None:
    assert "lora_fsdp" in StrategyRegistry.available_strategies()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uncut(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:  # each rank's own part
        assert same(rank[kind]["uncut"], rank[kind]["resumed"])
        assert sum(t.numel() for t in rank[kind]["uncut"].values()) == 8704 / 2


@pytest.mark.parametrize("kind", KINDS)
def test_each_adapter_is_a_unit(found: list[dict[str, Any]], kind: str) -> None:
    assert found[0][kind]["units"] == {"adapters": 14, "others": 2}  # and the root around the module


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_whole_adapters_alone(folder: Path, kind: str) -> None:
    path = folder / kind / f"step={CUT}.ckpt"
    assert is_distributed(path) == kind.endswith("True")
    checkpoint = read_either(path)
    assert {tuple(t.shape) for t in checkpoint["state_dict"].values()} == {(4, 64), (64, 4), (128, 4), (4, 128)}
    assert len(checkpoint["optimizer_states"][0]["state"]) == 28
    moments = checkpoint["optimizer_states"][0]["state"]
    assert [tuple(m["exp_avg"].shape) for m in moments.values()] == [
        tuple(t.shape) for t in checkpoint["state_dict"].values()
    ]
    assert same(checkpoint["state_dict"], adapters(folder, kind.replace("True", "False")))


def test_a_strategy_of_lightning_s_trains_what_ddp_trains(folder: Path, found: list[dict[str, Any]]) -> None:
    assert found[0]["attached"] == {"adapters": 14, "others": 0}
    assert distance(adapters(folder, "attached"), adapters(folder, "ddp")) < 1e-4


@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "int8"])
def test_packed_bases_train_what_ddp_trains(folder: Path, quantize: str) -> None:
    assert distance(adapters(folder, quantize), adapters(folder, f"{quantize}-ddp")) < 1e-4


def test_adapter_folders_and_merged_models_are_written(folder: Path, found: list[dict[str, Any]]) -> None:
    assert (folder / "kept" / "a" / "adapter_model.safetensors").is_file()
    assert (folder / "merged" / "model.safetensors").is_file()
    assert found[0]["merge"]["logit_error"] < 1e-5


def test_what_is_refused(found: list[dict[str, Any]]) -> None:
    assert "`use_orig_params=False` hides the adapters from optimizers: leave it out" in found[0]["original"]
    assert '`modules_to_save` is not built for FSDP 1: use the strategy "lora_model_parallel"' in found[0]["saved"]
    assert 'DoRA (`use_dora`) is not built for FSDP 1: use the strategy "lora_model_parallel"' in found[0]["dora"]
    assert "a packed base under FSDP 1 must be of one dtype that is not cast" in found[0]["mixed"]
    with pytest.raises(ConfigError, match='`fsdp_plan` must be "auto" or a list of module names'):
        AdapterFSDPStrategy(fsdp_plan="blocks")  # type: ignore[arg-type]


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "fp4", "int8"])
def test_codes_stored_as_floats_keep_their_bits(quantize: str, storage: torch.dtype) -> None:
    packed = PackedWeight(torch.randn(33, 65), quantize)
    before, size = packed.dequantize(torch.float32), packed.nbytes
    packed.as_parameters(storage=storage)
    assert {p.dtype for p in packed.parameters()} == {storage}
    assert torch.equal(packed.dequantize(torch.float32), before)
    assert packed.nbytes <= size + 3 * storage.itemsize


def test_a_policy_of_the_user_s_stays() -> None:
    linear, norm, other = nn.Linear(2, 2), nn.LayerNorm(2), nn.ReLU()
    root = nn.Sequential(linear, norm, other)
    classes = _with_units(ModuleWrapPolicy({nn.LayerNorm}), {linear})._run_policy(root, set(), {})
    assert set(classes) == {linear, norm}
    own = _with_units(lambda module, recurse, nonwrapped_numel: recurse or isinstance(module, nn.ReLU), {linear})
    chosen = [m for m in root if own(module=m, recurse=False, nonwrapped_numel=1)]
    assert chosen == [linear, other]
    assert own(module=linear, recurse=True, nonwrapped_numel=1)
    assert set(_with_units(None, {linear})._run_policy(root, set(), {})) == {linear}


def test_the_moments_of_a_run_whose_optimizer_held_the_whole_model(folder: Path, found: list[dict[str, Any]]) -> None:
    moments = torch.load(folder / "moments.pt")
    assert len(moments) == 4
    assert all(torch.equal(a, b) for a, b in zip(moments, found[0]["older"], strict=True))
