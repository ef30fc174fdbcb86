# SPDX-License-Identifier: Apache-2.0
"""Rows about checkpoint files that are read: each is resumed from, by a Trainer."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.errors import CheckpointError
from lightning_lora.io.checkpoint import KEY, VERSION
from lightning_lora.io.checkpoint_file import read_checkpoint, write_checkpoint
from tests.bad_input.row import Row, forked, raised, without_rights
from tests.helpers import LM, TinyNet, loader, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

A, B = "net.second.adapter.lora_A", "net.second.adapter.lora_B"
EARLIER = "Take an earlier checkpoint"


def module(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return LM(TinyNet())


def resume(path: Path, model: LM | None = None, **lora: Any) -> LM:
    model, weights_only = model or module(), lora.pop("weights_only", None)
    trainer = make_trainer(path.parent, [LoRA(**{"r": 4, **lora})], max_steps=3)
    trainer.fit(model, loader(), ckpt_path=path, weights_only=weights_only)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("good")
    trainer = make_trainer(folder, [LoRA(r=4)], max_steps=2)
    trainer.fit(module(), loader())
    trainer.save_checkpoint(folder / "run.ckpt")
    return (folder / "run.ckpt").read_bytes()


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A file that is whole and says something else."""

    def make(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        write_checkpoint(checkpoint, path)

    return make


def tensor(name: str, value: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    return edited(lambda c: c["state_dict"].update({name: value(c["state_dict"][name])}))


def flip(record: str) -> Callable[[Path], None]:
    """One bit changed in the middle of a record of the zip."""

    def make(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            info = next(i for i in archive.infolist() if i.filename.endswith(record))
            data = archive.read(info)
        raw = bytearray(path.read_bytes())
        raw[raw.index(data, info.header_offset) + len(data) // 2] ^= 4
        path.write_bytes(raw)

    return make


def add_record(path: Path) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/../../outside", b"x")


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def rename(c: dict[str, Any]) -> None:
    c["state_dict"]["net.second.adapter.lora_C"] = c["state_dict"].pop(B)


def saver_state(c: dict[str, Any]) -> None:
    c["callbacks"]["ModelCheckpoint{}"] = {"dirpath": "/runs", "best_k_models": {"/runs/../home/thesis.tex": 1.0}}


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


ROWS = [
    Row("checkpoint-missing", "FileNotFoundError",
        "there is no checkpoint file at ... name one that is there", lambda p: p.unlink()),
    Row("checkpoint-empty", "CheckpointError", f"is empty ... {EARLIER}", lambda p: p.write_bytes(b"")),
    Row("checkpoint-truncated", "CheckpointError", f"is no whole checkpoint file ... {EARLIER}",
        lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
    Row("checkpoint-zeros", "CheckpointError", f"is no whole checkpoint file ... {EARLIER}",
        lambda p: p.write_bytes(bytes(p.stat().st_size))),
    Row("checkpoint-bit-in-tensor", "CheckpointError", f"is damaged: 1 of ... {EARLIER}", flip("data/1")),
    Row("checkpoint-bit-in-description", "CheckpointError", f"is no whole checkpoint file (Bad CRC-32 ... {EARLIER}",
        flip("data.pkl")),
    Row("checkpoint-nan", "CheckpointError", "holds NaN or inf ... Take an earlier one",
        tensor(A, lambda t: t.fill_(float("nan")))),
    Row("checkpoint-inf", "CheckpointError", "holds NaN or inf ... Take an earlier one",
        tensor(B, lambda t: t.index_fill(0, torch.tensor([1]), float("-inf")))),
    Row("checkpoint-other-rank", "AdapterMismatchError",
        "another LoRA configuration (r: checkpoint 4, model 8) ... give `LoRA` the checkpoint's values"),
    Row("checkpoint-other-config", "AdapterMismatchError",
        "1 layers, 'net.second' first, only in the checkpoint ... give `LoRA` the checkpoint's values"),
    Row("checkpoint-wrong-shape", "AdapterMismatchError",
        "is (4, 5) in the file and (4, 128) in the model ... another rank or on another base?",
        tensor(A, lambda t: t[:, :5].clone())),
    Row("checkpoint-huge-shape", "AdapterMismatchError",
        "is (1000000000000, 128) in the file and (4, 128) in the model ... another rank or on another base?",
        tensor(A, lambda t: t[:1].expand(10**12, 128))),
    Row("checkpoint-wrong-dtype", "AdapterMismatchError", "is of torch.int64 in the file ... Save the adapter again",
        tensor(A, lambda t: t.long())),
    Row("checkpoint-no-tensor", "AdapterMismatchError", "is a list in the file and no tensor",
        tensor(A, lambda t: t.tolist())),
    Row("checkpoint-wrong-key", "AdapterMismatchError",
        f"1 of 4 tensors are missing, '{B}' first (nearest in the file: 'net.second.adapter.lora_C') ... use the "
        "`target_modules`", edited(rename)),
    Row("checkpoint-lacks-one", "AdapterMismatchError",
        f"1 of 4 tensors are missing, '{B}' first ... use the `target_modules`",
        edited(lambda c: c["state_dict"].pop(B))),
    Row("checkpoint-one-too-many", "AdapterMismatchError",
        "1 tensors are unknown to the model, 'net.third' first ... use the `target_modules`",
        edited(lambda c: c["state_dict"].update({"net.third": torch.zeros(3)}))),
    Row("checkpoint-other-base", "BaseMismatchError",
        "were trained on another base ... Load the same pretrained weights"),
    Row("checkpoint-newer", "CheckpointError", f"of version {VERSION + 1}, this package knows {VERSION}: update it",
        edited(lambda c: c[KEY].update(version=VERSION + 1))),
    Row("checkpoint-no-version", "CheckpointError", "which no package has written ... Take another checkpoint",
        edited(lambda c: c[KEY].update(version="new"))),
    Row("checkpoint-older", "-", "loads; there are no digests to compare", lambda p: as_version_1(p)),
    Row("checkpoint-without-adapters", "CheckpointError", "holds no adapters ... Load its weights into the module",
        edited(lambda c: (c.pop(KEY), c.update(state_dict=module().state_dict())))),
    Row("checkpoint-no-state", "CheckpointError",
        "holds no `state_dict`: it is no checkpoint of Lightning's. Take another file",
        lambda p: torch.save([1, 2], p)),
    Row("checkpoint-payload", "CheckpointError",
        "an object of 'posix.system', which only a pickle can make ... `torch.serialization.add_safe_globals`",
        edited(lambda c: c.update(hyper_parameters={"lr": Payload()}))),
    Row("checkpoint-raw-pickle", "CheckpointError", f"is no whole checkpoint file ... {EARLIER}",
        lambda p: p.write_bytes(pickle.dumps({"state_dict": Payload()}))),
    Row("checkpoint-asked-for-pickle", "UnsupportedError",
        "pickles are not loaded ... `torch.serialization.add_safe_globals`"),
    Row("checkpoint-record-outside", "CheckpointError", "which leads out of it: it is not opened", add_record),
    Row("checkpoint-path-outside", "CheckpointError",
        "names '/runs/../home/thesis.tex', which leads out of its folder ... Take a checkpoint that you trust",
        edited(saver_state)),
    Row("checkpoint-is-a-folder", "CheckpointError", "is a folder ... name the .ckpt file", folder_instead),
    Row("checkpoint-unreadable", "CheckpointError", "may not be read by this user ... Give it read permission",
        lambda p: p.chmod(0)),
]  # fmt: skip
HOW: dict[str, dict[str, Any]] = {
    "checkpoint-other-rank": {"r": 8},
    "checkpoint-other-config": {"target_modules": ["first"]},
    "checkpoint-other-base": {"model": 3},
    "checkpoint-asked-for-pickle": {"weights_only": False},
}


def as_version_1(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[KEY]["version"] = 1
    del checkpoint[KEY]["digests"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, good: bytes, tmp_path: Path) -> None:
    path, earlier = tmp_path / "run.ckpt", tmp_path / "earlier.ckpt"
    for file in (path, earlier):
        file.write_bytes(good)
    row.make(path)
    broken = path.read_bytes() if path.is_file() else None
    how = dict(HOW.get(row.name, {}))
    model = module(how.pop("model", 0))
    if row.error == "-":
        resume(path, model)
        assert not torch.equal(adapter_state_dict(model)[B], torch.zeros(64, 4))
        return
    if row.name == "checkpoint-unreadable":
        _, *found = forked(lambda: resume(path, model), without_rights)
    else:
        found = list(raised(lambda: resume(path, model, **how), row.error))
    row.check(*found, file=path)
    assert (path.read_bytes() if path.is_file() else None) == broken
    assert earlier.read_bytes() == good
    state = adapter_state_dict(model)
    assert not state or all(not t.any() for n, t in state.items() if n.endswith("lora_B"))  # nothing was half loaded
    assert not Path("ran").exists()
    resume(earlier)


class Notes(L.Callback):
    """A user's own state, which names no file that is removed."""

    def state_dict(self) -> dict[str, Any]:
        return {"note": "a/../b", "data": ["../data/train.jsonl"]}


@pytest.mark.parametrize("logger", [False, True], ids=["default_root_dir", "CSVLogger"])
@pytest.mark.filterwarnings("ignore")
def test_a_runs_own_paths_may_hold_two_dots(logger: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def fit(steps: int, ckpt: str | None = None) -> str:
        saver = ModelCheckpoint(every_n_train_steps=1)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[LoRA(r=4), saver, Notes()], default_root_dir="../out",
            logger=CSVLogger("../logs") if logger else False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module(), loader(), ckpt_path=ckpt)
        assert trainer.global_step == steps
        return saver.best_model_path

    first = fit(2)
    assert first.startswith("../")
    assert fit(4, first).endswith("step=4.ckpt")
    assert len(list(tmp_path.rglob("*.ckpt"))) == 2  # the one that was resumed, which Lightning keeps, and the newest


def test_no_flipped_bit_goes_unseen(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    path.write_bytes(good)
    whole, spec = torch.utils._pytree.tree_flatten(read_checkpoint(path))
    chance = random.Random(0)
    caught = 0
    for _ in range(80):
        raw = bytearray(good)
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
        try:
            found, same = torch.utils._pytree.tree_flatten(read_checkpoint(path))
        except CheckpointError:
            caught += 1
            continue
        pairs = zip(whole, found, strict=True)
        assert same == spec  # it was between the records: what is read is what was written
        assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    assert caught > 50
