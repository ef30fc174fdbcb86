# SPDX-License-Identifier: Apache-2.0
"""Two processes over gloo: exact resume, equal adapters, adapter-only checkpoints with each rank's random state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora.rng import RNGState
from tests.e2e.runs import GENERAL, Scenario, cut_path, fit

SCRIPT = Path(__file__).parent / "runs.py"
ROOT = Path(__file__).parents[2]

SHORT = {"steps": 14, "cut": 8, "size": 64}  # 8 steps an epoch
SCENARIOS: dict[str, dict[str, Any]] = {
    "dense": {"size": 480},
    "nf4": {"size": 480, "quantize": "nf4"},
    "stopped": {"size": 160, "steps": 20, "cut": 11, "save": "epoch_end", "noisy": True},
    "after_fit": {"size": 160, "steps": 20, "cut": 11, "save": "after", "validation": True, "drawing": True},
    "epochs": {**SHORT, "save": "epoch_end"},
    "epochs_plain": {**SHORT, "loader": "plain", "noisy": True},
    "plain": {**SHORT, "size": 80, "loader": "plain", "noisy": True},
    "accumulation": {"steps": 8, "cut": 3, "size": 192, "loader": "plain", "save": "batches",
                     "trainer": {"accumulate_grad_batches": 3}},
    "plain_weighted": {**SHORT, "size": 80, "loader": "weighted", "drawing": True},
    "replay": {**SHORT, "replay": 0.3, "base_kl": 0.5},
    "replay_plain": {**SHORT, "replay": 0.3, "loader": "plain"},
    "injected": {**SHORT, "size": 160, "loader": "stateful_injected"},
    "epochs_injected": {**SHORT, "loader": "stateful_injected"},
}  # fmt: skip
EXACT = ("dense", "nf4", "stopped", "after_fit", "epochs", "epochs_plain", "plain", "accumulation", "plain_weighted",
         "replay", "replay_plain")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All scenarios, played by one launch of two processes."""
    folder = tmp_path_factory.mktemp("distributed")
    values = [{"folder": str(folder / name), "devices": 2, **values} for name, values in SCENARIOS.items()]
    (folder / "scenarios.json").write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "scenarios.json")], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def result(runs: Path, name: str, rank: int) -> dict[str, Any]:
    return torch.load(runs / name / f"rank{rank}.pt")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", EXACT)
def test_resumes_exactly_on_both_ranks(runs: Path, name: str) -> None:
    for rank in (0, 1):
        found = result(runs, name, rank)
        assert all(found["batches"])
        assert equal(found["whole"], found["resumed"])
        assert found["notices"] == []


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_end_with_equal_adapters(runs: Path, name: str) -> None:
    first, second = result(runs, name, 0), result(runs, name, 1)
    assert equal(first["whole"], second["whole"])
    assert equal(first["resumed"], second["resumed"])
    assert any(t.abs().sum() > 0 for n, t in first["whole"].items() if n.endswith("lora_B"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("injected", "StatefulDistributedSampler"),
        ("epochs_injected", "StatefulDistributedSampler"),
    ],
)
def test_what_is_not_exact_is_said_once(runs: Path, name: str, text: str) -> None:
    assert not all(result(runs, name, 0)["batches"])
    assert [text in n for n in result(runs, name, 0)["notices"]] == [True]
    assert result(runs, name, 1)["notices"] == []


def test_general_batches_come_at_the_same_places_and_differ(runs: Path) -> None:
    """Of 11 batches an epoch three are general; no item of these comes to both processes before all have come."""
    general = {tuple(row.tolist()) for row in GENERAL}
    places, items = [], []
    for rank in (0, 1):
        seen = [[tuple(row.tolist()) in general for row in batch] for batch in result(runs, "replay", rank)["seen"]]
        assert all(len(set(batch)) == 1 for batch in seen)
        places.append([batch[0] for batch in seen])
        items += [tuple(row.tolist()) for batch in result(runs, "replay", rank)["seen"][:11] for row in batch]
    assert places[0] == places[1]
    assert places[0][:11] == [False] * 3 + [True] + [False] * 2 + [True] + [False] * 2 + [True] + [False]
    replayed = [item for item in items if item in general]
    assert len(replayed) == len(set(replayed)) == 24


def test_checkpoint_holds_adapters_and_the_random_state_of_every_rank(runs: Path) -> None:
    checkpoint = torch.load(cut_path(Scenario(str(runs / "nf4"))), weights_only=True)
    assert sorted(checkpoint["state_dict"]) == [
        f"net.{layer}.adapter.lora_{factor}" for layer in ("first", "second") for factor in "AB"
    ]
    states = [RNGState.from_dict(values) for values in checkpoint["lightning_lora"]["rng"]]
    assert len(states) == 2
    assert not torch.equal(states[0].torch_cpu, states[1].torch_cpu)


def test_resumed_by_one_process(runs: Path, tmp_path: Path) -> None:
    """The adapters and the optimizer go on; the epoch's data begins anew, as Lightning hands it out."""
    path = cut_path(Scenario(str(runs / "dense")))
    s = Scenario(str(tmp_path), size=480, loader="plain", cut=38, steps=40)
    module, notices = fit(s, "one", steps=40, seed=1, ckpt=path)
    assert len(notices) == 1
    assert "written by 2 processes and is resumed by 1" in notices[0]
    assert equal(module.began, torch.load(path)["state_dict"])
    assert len(module.seen) == 3


RESUMED_BY_TWO = """
import sys, torch
from pathlib import Path
from lightning_lora import adapter_state_dict
from tests.e2e.runs import Scenario, fit

for folder in sys.argv[1:]:
    s = Scenario(folder, size=64, loader="plain", save="none", devices=2, steps=20)
    module, notices = fit(s, "two", steps=20, seed=1, ckpt=Path(folder, "cut", "cut.ckpt"))
    found = {"began": module.began, "ended": adapter_state_dict(module), "seen": module.seen, "notices": notices}
    torch.save(found, f"{folder}/{module.global_rank}.pt")
"""


def test_of_one_process_resumed_by_two(tmp_path: Path) -> None:
    """Cut inside an epoch of 16 batches and between two."""
    cuts = {tmp_path / "inside": 11, tmp_path / "between": 16}
    for folder, cut in cuts.items():
        fit(Scenario(str(folder), size=64, loader="plain", steps=cut, cut=cut), "cut", steps=cut, seed=7)
    (tmp_path / "run.py").write_text(RESUMED_BY_TWO)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), *map(str, cuts)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    for folder, cut in cuts.items():
        first, second = torch.load(folder / "0.pt"), torch.load(folder / "1.pt")
        assert equal(first["began"], second["began"])
        assert equal(first["began"], torch.load(folder / "cut/cut.ckpt")["state_dict"])
        assert equal(first["ended"], second["ended"])
        assert len(first["seen"]) == len(second["seen"]) == 20 - cut
        assert not any(torch.equal(a, b) for a, b in zip(first["seen"], second["seen"], strict=True))
        assert len(first["notices"]) == 1  # nothing of a place that was dropped on purpose
        assert "written by 1 processes and is resumed by 2" in first["notices"][0]


def test_adapters_of_two_processes_load_into_one(runs: Path, tmp_path: Path) -> None:
    from lightning_lora import LoRA, adapter_state_dict
    from tests.e2e.runs import Module, train_loader
    from tests.helpers import make_trainer

    path = cut_path(Scenario(str(runs / "dense")))
    module = Module()
    make_trainer(tmp_path, [LoRA(r=4, lora_dropout=0.1)]).test(
        module, train_loader(Scenario("", size=8)), ckpt_path=path, verbose=False
    )
    assert equal(torch.load(path)["state_dict"], adapter_state_dict(module))


BASES = """
import os, sys, torch, lightning as L
from lightning_lora import LoRA, adapter_state_dict
from lightning_lora.errors import BaseMismatchError
from tests.helpers import LM, TinyNet, loader, make_trainer

rank = int(os.environ.get("LOCAL_RANK", 0))
found = {}

def fit(name, seed, quantize="none", head=0, strategy="ddp"):
    torch.manual_seed(seed)
    module = LM(TinyNet())
    torch.nn.init.normal_(module.net.head.weight, generator=torch.Generator().manual_seed(head))
    torch.manual_seed(rank)
    lora = LoRA(r=4, quantize=quantize, modules_to_save=["head"])
    trainer = make_trainer(sys.argv[1], [lora], devices=2, strategy=strategy, max_steps=3)
    try:
        trainer.fit(module, loader())
    except BaseMismatchError as error:
        found[name] = str(error)
    else:
        found[name] = module.state_dict()
        assert not hasattr(module, "_ddp_params_and_buffers_to_ignore")

fit("dense", 0, head=rank)
fit("nf4", 0, "nf4", head=rank, strategy="lora_ddp")
fit("other dense", rank)
fit("other nf4", rank, "nf4", strategy="lora_ddp")
torch.save(found, f"{sys.argv[1]}/{rank}.pt")
"""


def test_the_base_is_compared_and_what_is_trained_starts_equal(tmp_path: Path) -> None:
    """Two processes with other random adapters and other fresh heads; then with other bases."""
    (tmp_path / "run.py").write_text(BASES)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    for name in ("dense", "nf4"):
        assert "net.head.original.weight" in first[name]
        assert equal(first[name], second[name])
    for name in ("other dense", "other nf4"):
        assert first[name] == second[name]
        assert first[name].startswith("rank 1 of 2 built another base than rank 0, and the base is not sent")
        assert "`lightning.seed_everything`" in first[name]


def test_bytes_handed_to_collectives_are_those_of_the_adapters(tmp_path: Path) -> None:
    """Against plain DDP of the same packed module, which sends the base at the start and its codes at each forward."""
    command = [sys.executable, str(ROOT / "benchmarks/ddp_bytes.py"), "--tiny", "--threads", "1"]
    command += ["--variants", "ours-nf4,plain-nf4", "--json", str(tmp_path / "bytes.json")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "bytes.json").read_text())
    ours, plain = found["ours-nf4"], found["plain-nf4"]
    assert 0.95 < ours["step"] / ours["gradients"] < 1.05
    assert ours["gradients"] <= ours["start"] < 1.1 * ours["gradients"]  # the adapters themselves, sent by rank 0
    assert plain["start"] > plain["base"]
    assert plain["step"] > 1.5 * plain["gradients"]
