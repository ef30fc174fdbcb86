# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are kept, and that each has its adapter folder beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.errors import CheckpointError, ConfigError, Notice, UnsupportedError
from lightning_lora.io.adapter import load_adapter
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import LM, loader, make_trainer, tiny_llama

#: The quantity that ranks checkpoints, by step: steps 2 and 5 are the best.
SCORES = {1: 5.0, 2: 1.0, 3: 6.0, 4: 7.0, 5: 2.0, 6: 8.0, 7: 9.0}


class Scored(LM):
    """Logs a score that the test chooses."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("score", SCORES[self.global_step + 1])
        return super().training_step(batch, batch_idx)


def fit(tmp_path: Path, steps: int = 6, ckpt_path: str | None = None, **kwargs: Any) -> AdapterCheckpoint:
    values = {"dirpath": tmp_path / "a", "filename": "{step}", "every_n_train_steps": 1, **kwargs}
    callback = AdapterCheckpoint(**values)
    trainer = make_trainer(tmp_path, [LoRA(r=2), callback], max_steps=steps)
    trainer.fit(Scored(tiny_llama()), loader(), ckpt_path=ckpt_path)
    return callback


def steps_on_disk(tmp_path: Path) -> list[int]:
    """Steps of the checkpoints that are there; each must have its folder, and no folder stands alone."""
    names = os.listdir(tmp_path / "a")
    files = {n.removesuffix(".ckpt") for n in names if n.endswith(".ckpt")}
    folders = {n for n in names if not n.endswith(".ckpt")}
    assert files == folders
    for folder in folders:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path / "a" / folder))
    return sorted(int(m[1]) for n in files if (m := re.fullmatch(r"step=(\d+)", n)))


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"monitor": "score", "save_top_k": 2}, [2, 5]),
        ({"monitor": "score", "save_top_k": 2, "keep_last_n": 1}, [2, 5, 6]),
        ({"monitor": "score", "save_top_k": 2, "keep_last_n": 3}, [2, 4, 5, 6]),
        ({"monitor": "score", "save_top_k": 1, "mode": "max", "keep_last_n": 2}, [5, 6]),
        ({"monitor": "score", "save_top_k": 0, "keep_last_n": 2}, [5, 6]),
        ({"monitor": "score", "save_top_k": -1, "keep_last_n": 2}, [1, 2, 3, 4, 5, 6]),
        ({"keep_last_n": 3}, [4, 5, 6]),
        ({}, [6]),
        ({"save_top_k": -1, "save_weights_only": True}, [1, 2, 3, 4, 5, 6]),
        ({"monitor": "score", "save_top_k": 1, "keep_last_n": 1, "save_last": True}, [2, 6]),
        ({"monitor": "score", "save_top_k": 1, "keep_last_n": 1, "save_last": "link"}, [2, 6]),
    ],
)
def test_the_best_and_the_most_recent_are_kept(arguments: dict, kept: list[int], tmp_path: Path) -> None:
    callback = fit(tmp_path, **arguments)
    assert steps_on_disk(tmp_path) == kept
    if arguments.get("save_last"):
        assert (tmp_path / "a" / "last").is_dir()
        assert callback.last_adapter_path == str(tmp_path / "a" / "last")
        assert os.path.realpath(tmp_path / "a" / "last") == os.path.realpath(
            adapter_path(os.path.realpath(tmp_path / "a" / "last.ckpt"))
        )
    if arguments.get("monitor") and arguments["save_top_k"] > 0:
        assert callback.best_adapter_path == adapter_path(callback.best_model_path)


@pytest.mark.parametrize("save_weights_only", [False, True])
def test_folder_and_checkpoint_hold_the_same_adapters(tmp_path: Path, save_weights_only: bool) -> None:
    callback = fit(tmp_path, save_weights_only=save_weights_only)
    state = torch.load(callback.best_model_path, weights_only=True)["state_dict"]
    model = LM(tiny_llama())
    load_adapter(model, callback.best_adapter_path)
    assert {k: v.tolist() for k, v in adapter_state_dict(model).items()} == {k: v.tolist() for k, v in state.items()}


def test_a_resumed_run_remembers_the_best_and_the_most_recent(tmp_path: Path) -> None:
    arguments = {"monitor": "score", "save_top_k": 1, "keep_last_n": 2}
    fit(tmp_path, steps=4, **arguments)
    assert steps_on_disk(tmp_path) == [2, 3, 4]
    fit(tmp_path, steps=7, ckpt_path=str(tmp_path / "a" / "step=4.ckpt"), **arguments)
    # as ModelCheckpoint does, the checkpoint that was resumed from is never removed
    assert steps_on_disk(tmp_path) == [2, 4, 6, 7]


def test_its_state_loads_under_weights_only(tmp_path: Path) -> None:
    callback = fit(tmp_path, keep_last_n=2)
    state = torch.load(callback.best_model_path, weights_only=True)["callbacks"]
    (own,) = [value for key, value in state.items() if key.startswith("AdapterCheckpoint")]
    assert [Path(p).name for p in own["recent"]] == ["step=4.ckpt", "step=5.ckpt", "step=6.ckpt"]


def test_validation_metrics_rank_too(tmp_path: Path) -> None:
    callback = AdapterCheckpoint(tmp_path / "a", monitor="val_loss", keep_last_n=2)
    trainer = make_trainer(tmp_path, [LoRA(r=2), callback], max_steps=-1, max_epochs=3)
    trainer.fit(LM(tiny_llama()), loader(8), loader(8))
    assert len(list((tmp_path / "a").glob("*.ckpt"))) in (2, 3)
    assert os.path.isdir(callback.best_adapter_path)


def test_without_adapters_it_refuses_at_fit_start(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [AdapterCheckpoint(tmp_path / "a")])
    with pytest.raises(CheckpointError, match="no adapters; add the `LoRA` callback"):
        trainer.fit(LM(tiny_llama()), loader())


def test_a_remote_folder_is_refused_by_name(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [LoRA(r=2), AdapterCheckpoint("memory://bucket")])
    with pytest.raises(UnsupportedError, match="'memory://bucket': adapter folders are written to local disks"):
        trainer.fit(LM(tiny_llama()), loader())


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_wrong_keep_last_n_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="`keep_last_n` must be an integer of at least 0"):
        AdapterCheckpoint(keep_last_n=value)


def test_it_takes_every_argument_of_model_checkpoint() -> None:
    callback = AdapterCheckpoint("a", "{step}", "loss", mode="max", save_top_k=4, train_time_interval=None)
    plain = ModelCheckpoint("a", "{step}", "loss", mode="max", save_top_k=4, train_time_interval=None)
    names = ("dirpath", "filename", "monitor", "mode", "save_top_k")
    assert [getattr(callback, n) for n in names] == [getattr(plain, n) for n in names]


def test_adapter_path_never_is_the_checkpoint() -> None:
    assert adapter_path("") == ""
    assert adapter_path("a/step=1-loss=0.12.ckpt") == "a/step=1-loss=0.12"
    assert adapter_path("a/step=1.pt") == "a/step=1.pt.adapter"


def test_a_save_at_an_exception_has_its_folder_too(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("stop here")

    callback = AdapterCheckpoint(
        tmp_path / "a", "{step}", save_on_exception=True, every_n_train_steps=100, keep_last_n=1
    )
    trainer = make_trainer(tmp_path, [LoRA(r=2), Fails(), callback])
    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(LM(tiny_llama()), loader())
    assert steps_on_disk(tmp_path) == [3]


@pytest.mark.parametrize("save_last", [False, True, "link"])
def test_a_folder_of_the_users_in_the_way_is_not_replaced(save_last: Any, tmp_path: Path) -> None:
    mine = tmp_path / "a" / ("last" if save_last else "step=1")
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds 'thesis.tex': it is not replaced"):
        fit(tmp_path, steps=2, save_last=save_last)
    assert (mine / "thesis.tex").read_text() == "years of work"


def test_what_a_user_put_into_an_adapter_folder_is_not_removed_with_it(tmp_path: Path) -> None:
    class Writes(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                (tmp_path / "a" / "step=2" / "notes.txt").write_text("the one for the paper")

    callback = AdapterCheckpoint(tmp_path / "a", "{step}", save_top_k=0, keep_last_n=2, every_n_train_steps=1)
    trainer = make_trainer(tmp_path, [LoRA(r=2), callback, Writes()], max_steps=5)
    with pytest.warns(Notice, match="step=2 is kept though its checkpoint is removed"):
        trainer.fit(LM(tiny_llama()), loader())
    assert sorted(p.name for p in (tmp_path / "a").glob("*")) == [
        *("step=2", "step=4", "step=4.ckpt", "step=5", "step=5.ckpt"),
    ]
