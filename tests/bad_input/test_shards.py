# SPDX-License-Identifier: Apache-2.0
"""Rows about checkpoints of several processes' shards: each is given to `trainer.fit(ckpt_path=...)`."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest

from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.io.checkpoint_file import read_checkpoint
from lightning_lora.io.distributed import INDEX, write_distributed
from tests.bad_input.row import Row, raised
from tests.bad_input.test_checkpoints import module, resume
from tests.helpers import loader, make_trainer
from tests.io.test_distributed import SHARDS, Payload, put_index

pytestmark = pytest.mark.filterwarnings("ignore")


def truncated(folder: Path) -> None:
    content = (folder / SHARDS).read_bytes()
    (folder / SHARDS).write_bytes(content[: len(content) // 2])


ROWS = [
    Row("shards-truncated", "CheckpointError", f"is damaged: '{SHARDS}' has changed ... Take an earlier", truncated),
    Row("shards-one-missing", "CheckpointError", f"is damaged: '{SHARDS}' is missing ... Take an earlier",
        lambda folder: (folder / SHARDS).unlink()),
    Row("shards-forged-index", "CheckpointError", "names posix.system: it is not read",
        lambda folder: put_index(folder, Payload(folder.parent / "ran"))),
    Row("shards-index-of-something-else", "CheckpointError", "holds a dict and no index of shards",
        lambda folder: put_index(folder, {"a": 1})),
]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint, as shards."""
    folder = tmp_path_factory.mktemp("good")
    trainer = make_trainer(folder, [LoRA(r=4)], max_steps=2)
    trainer.fit(module(), loader())
    trainer.save_checkpoint(folder / "file.ckpt")
    (folder / "run.ckpt").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_distributed(read_checkpoint(folder / "file.ckpt"), folder / "run.ckpt")
    return folder / "run.ckpt"


def test_the_shards_as_they_are_resume(good: Path) -> None:
    assert any(t.any() for n, t in adapter_state_dict(resume(good)).items() if n.endswith("lora_B"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, good: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    shutil.copytree(good, path)
    row.make(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    model = module()
    kind, text = raised(lambda: resume(path, model), row.error)
    row.check(kind, text, file=path if "forged" not in row.name else "the index of a distributed checkpoint")
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    state = adapter_state_dict(model)
    assert not state or all(not t.any() for n, t in state.items() if n.endswith("lora_B"))  # nothing was half loaded
    assert not (tmp_path / "ran").exists()
    assert (path / INDEX).exists()
