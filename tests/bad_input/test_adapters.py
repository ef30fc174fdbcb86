# SPDX-License-Identifier: Apache-2.0
"""Rows about adapter folders, and the folders of models, that are read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, apply_lora, load_adapter, merge_to_disk, save_adapter
from lightning_lora.io.folder import CONFIG, FORMAT, PREFIX, RECORD, WEIGHTS
from lightning_lora.io.integrity import digests, first_not_finite
from lightning_lora.model.slots import is_adapted
from lightning_lora.model.state import adapter_state_dict
from tests.bad_input.row import Row, forked, raised, without_rights
from tests.helpers import TinyNet, random_adapters

pytestmark = pytest.mark.filterwarnings("ignore")

A, B = (f"{PREFIX}second.lora_{x}.weight" for x in "AB")
EARLIER = "Take an earlier adapter"
WHICH = "Is it the base it was trained on?"


def base(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TinyNet()


def saved(folder: Path, **config: Any) -> Path:
    model = base()
    apply_lora(model, LoRAConfig(**{"r": 4, **config}))
    save_adapter(random_adapters(model), folder)
    return folder


def raw(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """The file of tensors with other bytes."""
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A folder that is whole and holds other tensors, as they are written when a model has them."""

    def make(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)
        finite = first_not_finite({name: t for name, t in state.items() if t.is_floating_point()}) is None
        fields(RECORD, digests=digests(state.items()), finite=finite)(folder)

    return make


def fields(name: str, **changes: Any) -> Callable[[Path], None]:
    """Other values in one of the JSON files; None leaves a field out."""

    def make(folder: Path) -> None:
        values = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return make


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def claims_more(data: bytes) -> bytes:
    """A header by which a tensor is larger than the file."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    start = header[A]["data_offsets"][0]
    header[A] = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [start, start + 4 * 10**12]}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def folder_of_tensors(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def file_instead(folder: Path) -> None:
    gone(folder)
    folder.write_text("a file")


def gone(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


ROWS = [
    Row("adapter-missing", "CheckpointError",
        "there is no adapter folder at ... name the folder that holds adapter_config.json", gone),
    Row("adapter-is-a-file", "CheckpointError", "is no whole checkpoint file ... Take an earlier checkpoint",
        file_instead),
    Row("adapter-empty", "CheckpointError", f"is no whole safetensors file ... {EARLIER}", raw(lambda d: b"")),
    Row("adapter-truncated", "CheckpointError", f"is no whole safetensors file ... {EARLIER}",
        raw(lambda d: d[: len(d) // 2])),
    Row("adapter-zeros", "CheckpointError", f"is no whole safetensors file ... {EARLIER}",
        raw(lambda d: bytes(len(d)))),
    Row("adapter-bit-in-tensor", "CheckpointError", f"is damaged: 1 of 4 tensors ... {EARLIER}", raw(flipped)),
    Row("adapter-claims-more", "CheckpointError", f"is no whole safetensors file ... {EARLIER}", raw(claims_more)),
    Row("adapter-broken-json", "CheckpointError", f"is no JSON ... {EARLIER}",
        lambda p: (p / CONFIG).write_text((p / CONFIG).read_text()[:40])),
    Row("adapter-nan", "CheckpointError", "holds NaN or inf ... Take an earlier one",
        tensors(lambda t: t[A].fill_(float("nan")))),
    Row("adapter-wrong-rank", "AdapterMismatchError",
        "'first' has rank 2 there and 4 in the model: convert it with the same `r`", lambda p: saved(p, r=2)),
    Row("adapter-rank-unlike-its-config", "CheckpointError",
        "has rank 1000000000 in adapter_config.json and 4 in adapter_model.safetensors ... Save the adapter again",
        fields(CONFIG, r=10**9)),
    Row("adapter-wrong-shape", "AdapterMismatchError",
        "has shape (4, 5), the model needs (4, 128) ... Convert the model as the folder says",
        tensors(lambda t: t.update({A: torch.ones(4, 5)}))),
    Row("adapter-wrong-dtype", "CheckpointError", "is of I64, adapters are floats. Save the adapter again",
        tensors(lambda t: t.update({A: t[A].long()}))),
    Row("adapter-wrong-key", "AdapterMismatchError",
        f"1 of 4 tensors are missing, first '{B}' (nearest there: ... {WHICH}",
        tensors(lambda t: t.update({B.replace("second", "secund"): t.pop(B)}))),
    Row("adapter-lacks-one", "AdapterMismatchError", f"1 of 4 tensors are missing, first '{B}' ... {WHICH}",
        tensors(lambda t: t.pop(B))),
    Row("adapter-one-too-many", "AdapterMismatchError", f"1 are unknown to the model, first ... {WHICH}",
        tensors(lambda t: t.update({f"{PREFIX}third.lora_B.weight": torch.ones(4, 4)}))),
    Row("adapter-name-outside", "AdapterMismatchError",
        f"1 are unknown to the model, first 'base_model.model.../../outside' ... {WHICH}",
        tensors(lambda t: t.update({f"{PREFIX}../../outside": torch.ones(4)}))),
    Row("adapter-other-base", "BaseMismatchError", "were trained on another base ... Load the same pretrained weights"),
    Row("adapter-newer", "CheckpointError", f"is of format {FORMAT + 1}, this package knows {FORMAT}: update it",
        fields(RECORD, format=FORMAT + 1)),
    Row("adapter-no-format", "CheckpointError", "is none that was written ... save the folder again",
        fields(RECORD, format="x")),
    Row("adapter-older", "-", "loads; there are no digests to compare", fields(RECORD, format=None, digests=None)),
    Row("adapter-pickled", "CheckpointError",
        "its .bin is a pickle, which is not opened: save it again as safetensors", pickled),
    Row("adapter-weights-are-a-folder", "CheckpointError",
        "has no adapter_model.safetensors; save the adapter again", folder_of_tensors),
    Row("adapter-unreadable", "CheckpointError", "cannot be read ... Give this user read permission",
        lambda p: (p / CONFIG).chmod(0)),
]  # fmt: skip


def contents(folder: Path) -> Any:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} if folder.is_dir() else folder.exists()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row(row: Row, tmp_path: Path) -> None:
    earlier, path = saved(tmp_path / "earlier"), saved(tmp_path / "adapter")
    kept = contents(earlier)
    row.make(path)
    broken = contents(path) if row.name != "adapter-unreadable" else None
    seed = 3 if row.name == "adapter-other-base" else 0
    for converted in (False, True):
        model = base(seed)
        if converted:
            apply_lora(model, LoRAConfig(r=4))
        elif row.name == "adapter-wrong-rank":
            continue  # a plain model takes the folder's own rank
        if row.error == "-":
            load_adapter(model, path)
            assert adapter_state_dict(model)["second.adapter.lora_B"].any()
            continue
        before = {name: t.clone() for name, t in model.state_dict().items()}
        work = lambda m=model: load_adapter(m, path)  # noqa: E731
        if row.name == "adapter-unreadable":
            _, *found = forked(work, without_rights)
        else:
            found = list(raised(work, row.error))
        if converted or row.name not in ("adapter-wrong-shape", "adapter-wrong-key", "adapter-lacks-one"):
            row.check(*found, file=path)
        else:
            assert found[0] in (row.error, "CheckpointError")  # without adapters to compare with, other words
            assert str(path) in found[1]
        after = model.state_dict()
        assert is_adapted(model) == converted
        assert after.keys() == before.keys()
        assert all(torch.equal(t, after[name]) for name, t in before.items())
    if broken is not None:
        assert contents(path) == broken
    assert contents(earlier) == kept
    load_adapter(base(), earlier)


MODELS = [
    Row("model-index-outside", "CheckpointError",
        "names '../outside.safetensors', which is no file of this folder: save the model again",
        lambda p: (p / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"first.weight": "../outside.safetensors"}}))),
    Row("model-truncated", "CheckpointError", "is no whole safetensors file ... Save or fetch the model again",
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1])),
    Row("model-missing", "CheckpointError", "there is no model folder at ... name the one that `save_pretrained` wrote",
        lambda p: ((p / "model.safetensors").unlink(), p.rmdir())),
    Row("model-other", "MergeError", "in the adapter and (9, 9) in the base",
        lambda p: save_file({f"{n}.weight": torch.ones(9, 9) for n in ("first", "second")}, p / "model.safetensors")),
]  # fmt: skip


@pytest.mark.parametrize("row", MODELS, ids=lambda row: row.name)
def test_model_row(row: Row, tmp_path: Path) -> None:
    adapter, path = saved(tmp_path / "adapter"), tmp_path / "base"
    path.mkdir()
    save_file(dict(base().state_dict()), path / "model.safetensors")
    merge_to_disk(path, adapter, tmp_path / "merged")
    kept = contents(tmp_path / "merged")
    row.make(path)
    found = raised(lambda: merge_to_disk(path, adapter, tmp_path / "merged"), row.error)
    row.check(*found, file=path if row.error == "CheckpointError" else "second" if "second" in found[1] else "first")
    assert contents(tmp_path / "merged") == kept
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter", "base", "merged"}
