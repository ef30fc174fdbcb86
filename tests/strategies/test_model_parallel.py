# SPDX-License-Identifier: Apache-2.0
"""FSDP 2 over two gloo processes: adapters are units of their own, checkpoints hold them alone and resume exactly."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_lora import AdapterModelParallelStrategy, LoRAConfig, apply_lora, load_from_checkpoint
from lightning_lora.errors import ConfigError, TargetError, UnsupportedError
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.distributed import INDEX, META, is_distributed, read_either
from lightning_lora.model.sharding import check_plan, find_blocks, shard_model
from tests.e2e.test_older_runs import older
from tests.helpers import LM, TinyNet, tiny_llama
from tests.strategies.sharded_runs import CUT, STEPS, adapters, fit

SCRIPT = Path(__file__).parent / "sharded_runs.py"
KINDS = [f"{quantize}-{form}" for quantize in ("none", "nf4") for form in ("file", "shards")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one launch of two processes left, and a checkpoint of an older run from which they go on."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.save(older(folder, only_trained=False)[1], folder / "moments.pt")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def cut(folder: Path, kind: str) -> Path:
    """A checkpoint from the middle of an uncut run."""
    quantize, form = kind.split("-")
    return folder / f"{quantize}-{form == 'shards'}" / "uncut" / f"step={CUT}.ckpt"


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a tensor."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-6)) for n in a)


def test_the_strategy_has_a_name() -> None:
    assert "lora_model_parallel" in StrategyRegistry.available_strategies()


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uncut(found: list[dict[str, Any]], kind: str) -> None:
    first, second = (rank[kind] for rank in found)
    assert same(first["uncut"], second["uncut"])
    assert same(first["uncut"], first["resumed"])
    assert any(tensor.abs().max() > 0 for name, tensor in first["uncut"].items() if "lora_B" in name)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_trained_parameters_share_no_unit(found: list[dict[str, Any]], kind: str) -> None:
    first = found[0][kind]
    assert len(first["units"]) == 14 + 2 + 1  # linears, blocks, root
    assert first["mixed"] == []


def test_packed_codes_are_spread(found: list[dict[str, Any]]) -> None:
    codes = found[0]["nf4-file"]["codes"]
    assert len(codes) == 14
    assert all(local == (whole[0] // 2,) for local, whole in codes.values())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_trains_what_ddp_trains(found: list[dict[str, Any]], quantize: str) -> None:
    """Equal but for the order of sums; both forms of checkpoint leave the run alone."""
    sharded = found[0][f"{quantize}-file"]["uncut"]
    assert same(sharded, found[0][f"{quantize}-shards"]["uncut"])
    assert distance(sharded, found[0][f"{quantize}-ddp"]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_hold_adapters_alone(folder: Path, kind: str) -> None:
    path = cut(folder, kind)
    assert is_distributed(path) == kind.endswith("shards")
    if is_distributed(path):
        assert {f.name for f in path.iterdir()} == {META, INDEX, "__0_0.distcp", "__1_0.distcp"}
    checkpoint = read_either(path)
    assert len(checkpoint["state_dict"]) == 28
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert len(checkpoint["optimizer_states"][0]["state"]) == 28
    assert len(checkpoint["lightning_lora"]["rng"]) == 2
    assert [p for p in path.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_from_two(folder: Path, found: list[dict[str, Any]], kind: str, tmp_path: Path) -> None:
    config = {"quantize": kind.split("-")[0], "lora_dropout": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module, _ = fit(tmp_path, "auto", config, cut(folder, kind), steps=CUT, devices=1)
    state = read_either(cut(folder, kind))
    assert same(adapters(module), state["state_dict"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, after = fit(tmp_path, "auto", config, cut(folder, kind), steps=STEPS, devices=1)
    assert not same(after, state["state_dict"])


@pytest.mark.parametrize("kind", KINDS)
def test_load_from_checkpoint_reads_both_forms(folder: Path, kind: str) -> None:
    module = load_from_checkpoint(LM, cut(folder, kind), net=tiny_llama())
    state = read_either(cut(folder, kind))
    assert same(adapters(module), state["state_dict"])


def test_a_module_that_shards_itself(found: list[dict[str, Any]]) -> None:
    assert same(found[0]["own-False"], found[0]["own-True"])
    assert distance(found[0]["own-True"], found[0]["named"]) < 1e-5
    assert "already sharded" in found[0]["late"]
    assert "before `fully_shard`" in found[0]["late"]


@pytest.mark.parametrize("shards", [False, True])
def test_tensor_parallel_plans(found: list[dict[str, Any]], shards: bool) -> None:
    """Trains what the whole model trains, and resumes exactly."""
    runs = found[0][f"tensor-{shards}"]
    assert same(runs["uncut"], runs["resumed"])
    assert same(runs["uncut"], found[1][f"tensor-{shards}"]["uncut"])
    assert distance(runs["uncut"], found[0]["tensor-ddp"]) < 1e-4


@pytest.mark.slow
def test_both_at_once_over_four_processes(tmp_path: Path) -> None:
    """Pairs cut by a plan, the pairs sharing out by FSDP 2."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "grid"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(4)]
    for form in ("False", "True"):
        assert all(same(rank[form]["uncut"], ranks[0][form]["uncut"]) for rank in ranks)
        assert all(same(rank[form]["uncut"], rank[form]["resumed"]) for rank in ranks)
        assert distance(ranks[0][form]["uncut"], ranks[0]["ddp"]) < 1e-4
        assert ranks[0][form]["units"] == 14 + 2 + 1


def test_what_tensor_parallelism_refuses(found: list[dict[str, Any]]) -> None:
    packed, dropout, dora = found[0]["tensor-refused"]
    assert "a packed base cannot be cut by tensor parallelism" in packed
    assert "`lora_dropout` is not built for tensor parallelism: set it to 0" in dropout
    assert "DoRA (`use_dora`) is not built for tensor parallelism" in dora


def test_dora_resumes_merges_and_trains_what_ddp_trains(found: list[dict[str, Any]]) -> None:
    assert same(found[0]["dora"], found[0]["dora-resumed"])
    assert same(found[0]["dora"], found[1]["dora"])
    assert any(name.endswith("lora_magnitude_vector") for name in found[0]["dora"])
    assert distance(found[0]["dora"], found[0]["dora-ddp"]) < 1e-4
    assert distance(found[0]["dora"], found[0]["dora-file"]) < 1e-4
    assert found[0]["dora-merge"]["logit_error"] < 1e-5


def test_adapter_folders_and_merged_models_are_written(folder: Path, found: list[dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    written = load_file(folder / "kept" / "a" / "adapter_model.safetensors")
    state = read_checkpoint(folder / "kept" / "a.ckpt")["state_dict"]
    names = {n.replace("net.", "base_model.model.", 1).replace(".adapter", "") + ".weight": n for n in state}
    assert same({names[n]: t for n, t in written.items()}, state)
    report = found[0]["merge"]
    assert report["logit_error"] < 1e-5
    assert report["checked_on"] == "a training batch"
    assert (folder / "merged" / "model.safetensors").is_file()
    assert same(found[0]["kept"], found[1]["kept"])


def test_a_part_trained_in_full(found: list[dict[str, Any]]) -> None:
    assert any(name.endswith("head.trained.weight") for name in found[0]["saved"])
    assert same(found[0]["saved"], found[1]["saved"])


def test_the_moments_of_a_run_whose_optimizer_held_the_whole_model(folder: Path, found: list[dict[str, Any]]) -> None:
    moments = torch.load(folder / "moments.pt")
    assert len(moments) == 4
    assert all(torch.equal(a, b) for a, b in zip(moments, found[0]["older"], strict=True))


def test_a_plan_of_names(found: list[dict[str, Any]]) -> None:
    assert found[0]["unknown"].startswith("TargetError: `fsdp_plan` names 'layer.0', which matches no module")


@pytest.mark.parametrize("shards", [False, True])
def test_a_save_gathers_no_base(found: list[dict[str, Any]], shards: bool) -> None:
    """Adapters and their optimizer state (3x) are what a save may hold, and less than a shard of the base beside."""
    for rank in found:
        seen = rank[f"memory-{shards}"]
        assert seen["peak"] < 2 * 3 * seen["adapters"] + 0.1 * seen["base"] / 2, seen


@pytest.mark.parametrize("shards", [False, True])
def test_a_writer_of_the_user_s(found: list[dict[str, Any]], shards: bool) -> None:
    """`AsyncCheckpointIO` writes files later, and shards not at all: either way the checkpoint is there after fit."""
    assert same(found[0][f"async-{shards}"]["live"], found[0][f"async-{shards}"]["written"])


def test_no_room_on_one_process(found: list[dict[str, Any]]) -> None:
    """Both hear of it, and the checkpoint before is as it was."""
    for rank in found:
        seen = rank["full"]
        assert re.search(rf"WriteError: \S+/step={CUT}.ckpt could not be written \(rank 1", seen["text"])
        assert same(seen["after"], seen["before"])
        assert seen["left"] == [f"step={CUT}.ckpt"]


def test_blocks_are_found() -> None:
    model = LM(tiny_llama())
    apply_lora(model, LoRAConfig(r=2))
    assert find_blocks(model) == ["net.model.layers.0", "net.model.layers.1"]
    plain = LM(TinyNet())
    apply_lora(plain, LoRAConfig(r=2))
    assert find_blocks(plain) == []


@pytest.mark.parametrize("plan", ["layers", 3, [""], [1]])
def test_a_plan_that_is_none(plan: Any) -> None:
    with pytest.raises(ConfigError, match=r'`fsdp_plan` must be "auto" or a list of module names'):
        AdapterModelParallelStrategy(fsdp_plan=plan)
    with pytest.raises(ConfigError, match="`fsdp_plan` must be"):
        check_plan(plan)


def test_what_is_refused_without_processes() -> None:
    with pytest.raises(UnsupportedError, match="only a model with adapters is sharded here: call `apply_lora"):
        shard_model(TinyNet(), None)  # type: ignore[arg-type]
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=2))
    with pytest.raises(TargetError, match="matches no module; there are, for one"):
        shard_model(model, None, ["blocks"])  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="`fsdp_plan` names 'second', an adapted layer.*name the module around it"):
        shard_model(model, None, ["second"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="which is no regular expression"):
        shard_model(model, None, ["("])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`tensor_parallel_size` must be an integer of at least 1, got 0"):
        AdapterModelParallelStrategy(tensor_parallel_size=0)


def test_sizes_that_do_not_divide(tmp_path: Path) -> None:
    how = AdapterModelParallelStrategy(tensor_parallel_size=3, process_group_backend="gloo")
    with pytest.raises(ConfigError, match="`tensor_parallel_size=3` does not divide the 1 devices"):
        fit(tmp_path, how, {}, devices=1)


def test_the_yaml_of_a_plan_is_a_list() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(AdapterModelParallelStrategy, "strategy")
    given = parser.parse_object({"strategy": {"fsdp_plan": ["layers.*"], "data_parallel_size": 2}})
    assert parser.instantiate(given).strategy.fsdp_plan == ["layers.*"]
