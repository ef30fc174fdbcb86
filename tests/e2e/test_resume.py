# SPDX-License-Identifier: Apache-2.0
"""A run that is cut and resumed ends with the same bits as one that is not, wherever it is cut."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.io.checkpoint_file import read_checkpoint, write_checkpoint
from tests.e2e.matrix import assert_resumed, played
from tests.e2e.runs import Scenario, cut_path, fit, play

EXACT: dict[str, dict[str, Any]] = {
    # inside an epoch, whichever hook writes the checkpoint
    "step": {},
    "step_nf4": {"quantize": "nf4"},
    "stopped_by_max_steps": {"save": "epoch_end"},
    "save_last": {"save": "last"},
    "trainer_save_in_a_hook": {"save": "inside"},
    "trainer_save_after_fit": {"save": "after"},
    "second_epoch": {"size": 32},
    # what else draws
    "items_draw": {"noisy": True},
    "hooks_draw": {"drawing": True},
    "validation_draws_at_the_cut": {"drawing": True, "validation": True, "trainer": {"val_check_interval": 11}},
    "validation_monitored": {"drawing": True, "validation": True, "save": "monitor", "steps": 16, "cut": 10,
                             "size": 80, "trainer": {"val_check_interval": 5}},
    "workers": {"workers": 2},
    # what else has a state
    "accumulation_and_schedule": {"schedule": True, "size": 160, "trainer": {"accumulate_grad_batches": 2}},
    "schedule_of_the_length": {"schedule": "length", "size": 160},
    "schedule_of_the_length_plain": {"schedule": "length", "loader": "plain", "drawing": True},
    "schedule_of_the_length_between": {"schedule": "length", "loader": "plain", "size": 32, "cut": 16},
    "schedule_of_the_length_workers": {"schedule": "length", "loader": "plain", "size": 48, "workers": 2},
    "inside_an_accumulation": {"size": 240, "save": "batches", "trainer": {"accumulate_grad_batches": 3}},
    "plateau_of_epochs": {"schedule": "epoch val_loss", "size": 32, "cut": 16, "save": "monitor", "validation": True},
    "plateau_at_epoch_end": {"schedule": "epoch val_loss", "size": 32, "cut": 16, "save": "epoch_end",
                             "validation": True},
    "plateau_of_steps": {"schedule": "step val_loss", "cut": 10, "save": "monitor", "validation": True,
                         "trainer": {"val_check_interval": 5}},
    "plateau_between": {"schedule": "step val_loss", "cut": 11, "validation": True,
                        "trainer": {"val_check_interval": 5}},
    "loraplus": {"loraplus_lr_ratio": 16, "schedule": True},
    "loraplus_plateau": {"loraplus_lr_ratio": 4, "schedule": "step val_loss", "cut": 10, "save": "monitor",
                         "validation": True, "trainer": {"val_check_interval": 5}},
    "pissa": {"lora": {"init_lora_weights": "pissa"}},
    "pissa_nf4": {"lora": {"init_lora_weights": "pissa_niter_4"}, "quantize": "nf4", "loader": "plain"},
    "loftq": {"lora": {"init_lora_weights": "loftq", "loftq_iter": 2}, "quantize": "nf4"},
    "frozen_A": {"lora": {"freeze_lora_A": True}, "schedule": True},
    "frozen_A_olora": {"lora": {"freeze_lora_A": True, "init_lora_weights": "olora"}},
    "eva": {"lora": {"init_lora_weights": "eva", "eva_batches": 3}, "loader": "plain", "drawing": True},
    "eva_stateful": {"lora": {"init_lora_weights": "eva"}},
    "adamw_8bit": {"optimizer": "AdamW8bit", "quantize": "nf4", "loraplus_lr_ratio": 16},
    "paged_adamw": {"optimizer": "PagedAdamW"},
    "paged_adamw_8bit": {"optimizer": "PagedAdamW8bit", "schedule": True},
    "lion_8bit": {"optimizer": "Lion8bit"},
    # mitigations of forgetting
    "base_kl": {"base_kl": 0.5},
    "replay": {"replay": 0.3},
    "replay_second_epoch": {"replay": 0.3, "size": 24},
    "replay_after_a_general_batch": {"replay": 0.5, "cut": 10, "noisy": True, "drawing": True},
    "replay_plain": {"replay": 0.3, "loader": "plain", "noisy": True, "size": 24},
    "replay_plain_between_epochs": {"replay": 0.5, "loader": "plain", "size": 20, "cut": 9, "save": "epoch_end"},
    "replay_workers": {"replay": 0.3, "workers": 2},
    # between epochs
    "epochs_step": {"size": 32, "cut": 16, "drawing": True},
    "epochs_end": {"size": 32, "cut": 16, "save": "epoch_end", "schedule": True},
    "epochs_validation": {"size": 32, "cut": 8, "save": "monitor", "validation": True, "drawing": True},
    "epochs_after_fit": {"size": 32, "cut": 16, "save": "after"},
    "epochs_limited": {"size": 160, "cut": 16, "trainer": {"limit_train_batches": 8}},
    "plain_step": {"loader": "plain", "size": 32, "cut": 8},
    "plain_end": {"loader": "plain", "size": 32, "cut": 16, "save": "epoch_end", "noisy": True},
    "plain_end_validation": {"loader": "plain", "size": 32, "cut": 16, "save": "epoch_end", "validation": True},
    "plain_validation_draws": {"loader": "plain", "size": 32, "cut": 8, "save": "monitor", "validation": True,
                               "drawing": True, "noisy": True},
    "plain_after_fit": {"loader": "plain", "size": 32, "cut": 16, "save": "after"},
    "plain_workers": {"loader": "plain", "size": 32, "cut": 8, "save": "epoch_end", "workers": 2, "noisy": True},
    "plain_generator_end": {"loader": "generator", "size": 32, "cut": 16},
    # a plain loader inside an epoch
    "plain": {"loader": "plain", "noisy": True, "drawing": True},
    "plain_second_epoch": {"loader": "plain", "size": 32, "noisy": True, "drawing": True},
    "plain_inside_validation": {"loader": "plain", "drawing": True, "validation": True, "save": "monitor", "cut": 10,
                                "size": 56, "noisy": True, "trainer": {"val_check_interval": 5}},
    "plain_workers_inside": {"loader": "plain", "size": 48, "workers": 2},
    "plain_inside_after_fit": {"loader": "plain", "save": "after", "drawing": True},
    "plain_accumulation": {"loader": "plain", "size": 160, "schedule": True, "trainer": {"accumulate_grad_batches": 2}},
    "generator": {"loader": "generator", "size": 56},
    "weighted": {"loader": "weighted", "size": 56, "drawing": True},
    "without_batches": {"loader": "no_batches", "size": 16},
}  # fmt: skip


def assert_exact(result: dict[str, Any]) -> None:
    assert result["resumed"].keys() == result["whole"].keys()
    assert all(result["batches"]), result["batches"]
    for name, tensor in result["whole"].items():
        assert torch.equal(tensor, result["resumed"][name]), name


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str, tmp_path: Path) -> None:
    values = {"steps": 20, "cut": 11, "size": 80, **EXACT[name]}
    result = play(Scenario(str(tmp_path), **values))
    assert_exact(result)
    assert any(t.abs().sum() > 0 for n, t in result["whole"].items() if n.endswith("lora_B"))
    assert not [n for n in result["notices"] if "worker processes" not in n]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_sixty_steps_in_one_epoch_cut_at_37(quantize: str, tmp_path: Path) -> None:
    result = play(Scenario(str(tmp_path), quantize=quantize))
    assert len(result["batches"]) == 23
    assert_exact(result)


def test_resumed_in_a_fresh_process(tmp_path: Path) -> None:
    s = Scenario(str(tmp_path), steps=20, cut=11, size=80, noisy=True)
    whole, _ = fit(s, "whole", 20, seed=7)
    fit(s, "cut", 11, seed=7)
    code = (
        "import sys, torch; from tests.e2e.runs import *; torch.set_num_threads(1);"
        "s = Scenario(sys.argv[1], steps=20, cut=11, size=80, noisy=True);"
        "m, _ = fit(s, 'resumed', 20, seed=5, ckpt=cut_path(s));"
        "torch.save(adapter_state_dict(m), sys.argv[1] + '/resumed.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2], timeout=900)
    resumed = torch.load(tmp_path / "resumed.pt")
    assert all(torch.equal(p, resumed[n]) for n, p in whole.state_dict().items() if n in resumed)
    assert len(resumed) == 4


def test_schedule_of_epochs_is_not_shifted(tmp_path: Path) -> None:
    """Resumed between two epochs, a run of four epochs trains four: none is skipped or counted twice."""
    for save in ("every", "epoch_end"):
        s = Scenario(str(tmp_path / save), steps=16, cut=8, size=16, save=save, trainer={"max_epochs": 4})
        fit(s, "cut", 8, seed=7)
        module, _ = fit(s, "resumed", 16, seed=1, ckpt=Path(s.folder, "cut", "cut.ckpt"))
        assert module.epochs == [2, 3]


def test_a_loader_without_indices_gives_a_notice(tmp_path: Path) -> None:
    result = play(Scenario(str(tmp_path), loader="iterable", steps=14, cut=11, size=80))
    assert any("cannot go on inside an epoch" in n and "StatefulDataLoader" in n for n in result["notices"])


def test_a_batch_sampler_of_the_users_goes_on_with_a_notice(tmp_path: Path) -> None:
    result = play(Scenario(str(tmp_path), loader="batches", steps=20, cut=11, size=56))
    assert_exact(result)
    assert any("the order of the train loader is that of a Neighbours" in n for n in result["notices"])


def test_a_checkpoint_without_a_place_gives_a_notice(tmp_path: Path) -> None:
    """One written while the loader was of another kind, or by an older version."""
    s = Scenario(str(tmp_path), loader="iterable", steps=14, cut=11, size=80)
    fit(s, "cut", 11, seed=7)
    s.loader = "plain"
    _, notices = fit(s, "resumed", 14, seed=1, ckpt=cut_path(s))
    assert any("The checkpoint holds no place for this loader" in n for n in notices)


def test_a_plateau_that_waits_for_a_validation_gives_a_notice(tmp_path: Path) -> None:
    values: dict[str, Any] = {"schedule": "step val_loss", "validation": True, "trainer": {"val_check_interval": 5}}
    result = play(Scenario(str(tmp_path), steps=12, cut=10, size=80, **values))
    assert any("before a `ReduceLROnPlateau` on 'val_loss' was stepped" in n for n in result["notices"])


def test_gradients_that_are_not_in_the_checkpoint_give_a_notice(tmp_path: Path) -> None:
    s = Scenario(str(tmp_path), steps=12, cut=5, size=240, save="batches", trainer={"accumulate_grad_batches": 3})
    fit(s, "cut", 6, seed=7)
    checkpoint = read_checkpoint(cut_path(s))
    assert checkpoint["lightning_lora"].pop("gradients")[0].keys() == checkpoint["state_dict"].keys()
    write_checkpoint(checkpoint, cut_path(s))
    _, notices = fit(s, "resumed", 12, seed=1, ckpt=cut_path(s))
    assert any("between two batches whose gradients are accumulated" in n for n in notices)


def test_worker_processes_give_a_notice(tmp_path: Path) -> None:
    result = play(Scenario(str(tmp_path), workers=2, steps=14, cut=11, size=80))
    assert any("worker processes" in n for n in result["notices"])


def test_cut_by_a_signal(tmp_path: Path) -> None:
    """Two cases of the matrix that the slow tests go through."""
    for found in played(tmp_path, ["single-none-validation", "ddp-nf4-step"]).values():
        assert_resumed(found)
