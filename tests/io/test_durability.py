# SPDX-License-Identifier: Apache-2.0
"""Write, sync of the file, rename, sync of the folder, in that order; cut after any of them, old or new is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from safetensors.torch import load_file
from torch import nn

from lightning_lora import AdapterCheckpoint, LoRA, LoRAConfig, MergeOnFitEnd, apply_lora, merge_to_disk, save_adapter
from lightning_lora.io.atomic import atomic_folder, atomic_link, recover
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint, write_checkpoint
from lightning_lora.io.folder import AdapterFolder
from lightning_lora.io.merged_folder import REPORT, write_merged
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters
from tests.io.traced import check_order, removed, traced


def small() -> nn.Module:
    torch.manual_seed(0)
    model = TinyNet(vocab=16, width=16)
    apply_lora(model, LoRAConfig(r=2))
    return model


def checkpoint(value: float) -> dict[str, Any]:
    return {"state_dict": {"a": torch.full((50,), value)}, KEY: {"version": 2}}


class Target:
    """Something that is written twice: `write(folder, value)`, and `read(folder)` gives the value of a whole one."""

    def __init__(self, name: str, write: Callable[[Path, float], object], read: Callable[[Path], float]) -> None:
        self.name, self.write, self.read = name, write, read


def write_adapter(folder: Path, value: float) -> None:
    model = small()
    nn.init.constant_(model.first.adapter.lora_B, value)
    save_adapter(model, folder / "target")


def read_adapter(folder: Path) -> float:
    recover(folder / "target")
    return float(AdapterFolder.open(folder / "target").tensors()["base_model.model.first.lora_B.weight"][0, 0])


def write_merge(folder: Path, value: float) -> None:
    model = small()
    nn.init.constant_(model.first.base_layer.bias, value)
    write_merged(model, folder / "target")


def read_merge(folder: Path) -> float:
    recover(folder / "target")
    assert (folder / "target" / REPORT).is_file()
    return float(load_file(folder / "target" / "model.safetensors")["first.bias"][0])


TARGETS = {
    "checkpoint": Target(
        "checkpoint",
        lambda folder, value: write_checkpoint(checkpoint(value), folder / "target"),
        lambda folder: float(read_checkpoint(folder / "target")["state_dict"]["a"][0]),
    ),
    "adapter": Target("adapter", write_adapter, read_adapter),
    "merged": Target("merged", write_merge, read_merge),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_a_write_cut_after_any_call_leaves_the_old_or_the_new(name: str, tmp_path: Path) -> None:
    target, log = TARGETS[name], tmp_path / "log"

    def fresh() -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        target.write(tmp_path / "out", 1.0)
        return tmp_path / "out"

    folder = fresh()
    calls = traced(lambda: target.write(folder, 2.0), log)
    assert check_order(calls, folder) == ["target"]
    assert target.read(folder) == 2.0
    values = []
    for count in range(1, len(calls) + 1):
        folder = fresh()
        traced(lambda: target.write(folder, 2.0), log, die_after=count)  # noqa: B023 (done before the next turn)
        values.append(target.read(folder))
    assert values == sorted(values)  # old, and from the rename on new
    assert set(values) == {1.0, 2.0}
    target.write(folder, 3.0)
    assert target.read(folder) == 3.0
    assert [p.name for p in folder.iterdir()] == ["target"]  # what the killed ones left is gone


def test_the_folders_on_the_way_to_a_new_file_are_synced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "target"
    calls = traced(lambda: write_checkpoint(checkpoint(1.0), path), tmp_path / "log")
    assert [c.path for c in calls if c.kind == "fsync"][:2] == [str(tmp_path / "a"), str(tmp_path)]
    assert check_order(calls, path.parent) == ["target"]


@pytest.mark.filterwarnings("ignore")
def test_a_merge_on_disk_is_in_that_order_too(tmp_path: Path) -> None:
    from tests.helpers import tiny_llama

    tiny_llama().save_pretrained(tmp_path / "base")
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=2))
    save_adapter(random_adapters(model), tmp_path / "adapter")
    work = lambda: merge_to_disk(tmp_path / "base", tmp_path / "adapter", tmp_path / "out" / "merged")  # noqa: E731
    calls = traced(work, tmp_path / "log")
    assert check_order(calls, tmp_path / "out") == ["merged"]


def test_a_link_is_replaced_at_once(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with atomic_folder(tmp_path / name) as part:
            (part / "a").write_text(name)
    atomic_link(tmp_path / "link", tmp_path / "one")
    calls = traced(lambda: atomic_link(tmp_path / "link", tmp_path / "two"), tmp_path / "log")
    assert [c.kind for c in calls] == ["link", "fsync"]
    assert (tmp_path / "link" / "a").read_text() == "two"
    with atomic_folder(tmp_path / "folder") as part:
        (part / "a").write_text("folder")
    atomic_link(tmp_path / "folder", tmp_path / "one")
    assert (tmp_path / "folder").is_symlink()


SAVERS: dict[str, Callable[[Path], L.Callback]] = {
    "ModelCheckpoint": lambda folder: ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=True
    ),
    "AdapterCheckpoint": lambda folder: AdapterCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, keep_last_n=1, save_last="link"
    ),
}


def fit(saver: str, later: bool, folder: Path, steps: int = 3) -> None:
    plugins = [AsyncCheckpointIO()] if later else None
    callbacks = [LoRA(r=2), SAVERS[saver](folder)]
    trainer = make_trainer(folder, callbacks, max_steps=steps, plugins=plugins)
    trainer.fit(LM(TinyNet(vocab=16, width=16)), loader(16, vocab=16))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("saver", "later"), [(saver, later) for saver in SAVERS for later in (False, True)])
def test_a_run_removes_the_old_only_after_the_new_is_durable(saver: str, later: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    calls = traced(lambda: fit(saver, later, folder), tmp_path / "log")
    appeared = check_order(calls, folder)
    assert {"step=1.ckpt", "step=2.ckpt", "step=3.ckpt"} <= set(appeared)
    gone = removed(calls, folder)
    assert {"step=1.ckpt", "step=2.ckpt"} <= {name for _, name in gone}
    for place, name in gone:
        if not name.startswith("step="):
            continue
        next_one = f"step={int(name[5]) + 1}{name[6:]}"
        renamed = next(i for i, c in enumerate(calls) if c.kind == "rename" and Path(c.other).name == next_one)
        synced = next(i for i, c in enumerate(calls) if i > renamed and c.kind == "fsync" and c.path == str(folder))
        assert synced < place, f"{name} was removed before {next_one} was durable"
    assert read_checkpoint(folder / "step=3.ckpt")["global_step"] == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("later", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("saver", SAVERS)
def test_a_run_cut_after_any_call_keeps_the_newest_checkpoint(saver: str, later: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    calls = traced(lambda: fit(saver, later, tmp_path / "whole", steps=2), log)
    for count in range(1, len(calls) + 1):
        folder = tmp_path / str(count)
        done = traced(lambda: fit(saver, later, folder, steps=2), log, die_after=count)  # noqa: B023
        there = list(folder.glob("*.ckpt"))
        if later and saver == "ModelCheckpoint":  # Lightning links to a file to come; `AdapterCheckpoint` waits for it
            there = [path for path in there if path.exists()]
        steps = [read_checkpoint(path)["global_step"] for path in there]
        durable = [i for i, c in enumerate(done) if c.kind == "rename" and c.other.endswith(".ckpt")]
        assert bool(steps) == bool(durable)
        if durable:
            names = [Path(done[i].other).name for i in durable]
            assert max(steps) >= max((int(n[5]) for n in names if n.startswith("step=")), default=1)
        for path in folder.glob("step=*"):
            if path.is_dir():
                AdapterFolder.open(path).tensors()


@pytest.mark.filterwarnings("ignore")
def test_an_asynchronous_save_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    class InTheWay(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 1:
                (tmp_path / "run" / "step=2.ckpt").mkdir(parents=True)

    folder = tmp_path / "run"
    saver = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=1, enable_version_counter=False
    )
    trainer = make_trainer(folder, [LoRA(r=2), saver, InTheWay()], max_steps=2, plugins=[AsyncCheckpointIO()])
    with pytest.raises(ValueError, match="a folder stands there"):
        trainer.fit(LM(TinyNet(vocab=16, width=16)), loader(16, vocab=16))
    assert read_checkpoint(folder / "step=1.ckpt")["global_step"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_merge_at_the_end_of_fit_is_in_that_order(tmp_path: Path) -> None:
    def work() -> None:
        callbacks = [LoRA(r=2), MergeOnFitEnd(tmp_path / "out" / "merged")]
        make_trainer(tmp_path, callbacks, max_steps=1).fit(LM(TinyNet(vocab=16, width=16)), loader(16, vocab=16))

    calls = traced(work, tmp_path / "log")
    assert check_order(calls, tmp_path / "out") == ["merged"]
