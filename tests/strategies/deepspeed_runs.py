# SPDX-License-Identifier: Apache-2.0
"""Runs under DeepSpeed's own engine; every rank leaves what it found in ``<folder>/rank<n>.pt``.

``python tests/strategies/deepspeed_runs.py FOLDER PROCESSES cpu|cuda CASE ...``, a case being
``stage/quantize/precision``. On the CPU the backend is gloo. Lightning's launcher starts the other ranks.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from lightning_lora import AdapterCheckpoint, AdapterDeepSpeedStrategy, LoRA, MergeOnFitEnd
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint, write_checkpoint
from lightning_lora.io.distributed import file_digests
from lightning_lora.nn.sharded import whole
from tests.helpers import LM, Tokens, tiny_llama

STEPS, CUT = 6, 4


class OnCPU(DDPStrategy):
    """Put before a DeepSpeed strategy: leaves out Lightning's word that it is for CUDA alone, and nothing else."""

    @property
    def root_device(self) -> torch.device:
        """Of an index, which DeepSpeed asks for."""
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        """As `ParallelStrategy`'s."""
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """CPUs have no index to be validated."""
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class OursOnCPU(OnCPU, AdapterDeepSpeedStrategy):
    """Registered class."""


class UsersOnCPU(OnCPU, DeepSpeedStrategy):
    """What `attach` is given."""


def strategy(stage: int, users: bool = False, **kwargs: Any) -> Any:
    """Ours, or the one that `attach` is given."""
    if DEVICE == "cuda":
        return (DeepSpeedStrategy if users else AdapterDeepSpeedStrategy)(stage=stage, **kwargs)
    return (UsersOnCPU if users else OursOnCPU)(stage=stage, process_group_backend="gloo", **kwargs)


def trainer(folder: Path, how: Any, *callbacks: L.Callback, steps: int = STEPS, **kwargs: Any) -> L.Trainer:
    """Saves every `CUT` steps."""
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    return L.Trainer(
        accelerator=DEVICE, devices=kwargs.pop("devices", WORLD), strategy=how, logger=False, max_steps=steps,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, saves],
        default_root_dir=folder, use_distributed_sampler=False, **kwargs,
    )  # fmt: skip


def loader() -> StatefulDataLoader:
    """Shuffled, resumable, four items a process."""
    data = Tokens(96)
    sampler = StatefulDistributedSampler(data, seed=3, num_replicas=WORLD, rank=int(os.environ.get("LOCAL_RANK", 0)))
    return StatefulDataLoader(data, batch_size=4, sampler=sampler)


def adapters(module: L.LightningModule) -> dict[str, torch.Tensor]:
    """Whole adapters, on every rank."""
    return {name: whole(p).detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def fit(folder: Path, how: Any, config: dict[str, Any], ckpt: Path | None = None, **kwargs: Any) -> Any:
    """Train from the same start; returns the Trainer, the module and its adapters."""
    L.seed_everything(7, verbose=False)
    module = kwargs.pop("module", None) or LM(tiny_llama(vocab=64))
    run = trainer(folder, how, LoRA(**{"r": 4, **config}), *kwargs.pop("callbacks", ()), **kwargs)
    run.fit(module, loader(), ckpt_path=ckpt)
    return run, module, adapters(module)


def resumes(folder: Path, stage: int, quantize: str, precision: str) -> dict[str, Any]:
    """An uncut run, one from the middle, the same of a user's own strategy, and a test of what was saved."""
    config = {"quantize": quantize, "lora_dropout": 0.1}
    kinds = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    beside: list[L.Callback] = [AdapterCheckpoint(folder / "folders", every_n_train_steps=CUT)]
    if WORLD == 1 or stage < 3:
        beside.append(MergeOnFitEnd(folder / "merged"))
    run, module, uncut = fit(folder / "uncut", strategy(stage), config, callbacks=beside, **kinds)
    held = len(run.strategy.held_by(run.optimizers[0]))
    cut = folder / "uncut" / f"step={CUT}.ckpt"
    _, _, resumed = fit(folder / "resumed", strategy(stage), config, cut, **kinds)
    users = strategy(stage, users=True)
    _, _, of_users = fit(folder / "users", users, config, cut, **kinds)
    fresh = LM(tiny_llama(vocab=64))
    tester = trainer(folder, strategy(stage), LoRA(r=4, **config), precision=precision)
    tester.test(fresh, loader(), ckpt_path=cut, verbose=False)
    return {
        "uncut": uncut,
        "resumed": resumed,
        "users": of_users,
        "excluded": users.exclude_frozen_parameters,
        "loaded": adapters(fresh),
        "held": held,
        "spread": sum(hasattr(p, "ds_id") for p in module.parameters()),
        "dtypes": {str(b.dtype) for n, b in module.named_buffers() if n.endswith("absmax")},
    }


class Limited(L.Callback):
    """At a step each rank in turn may write small files only."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.told: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Save with no room, then with room."""
        if trainer.global_step != self.step:
            return
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        target = Path(trainer.default_root_dir, "own.ckpt")
        trainer.save_checkpoint(target)
        for unlucky in range(WORLD):
            if trainer.global_rank == unlucky:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            try:
                trainer.save_checkpoint(target)
            except Exception as error:
                self.told.append(f"{type(error).__name__}: {error}")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refusals(folder: Path, stage: int, quantize: str, precision: str) -> dict[str, Any]:
    """What a checkpoint that does not fit is answered; a save that fails on one rank."""
    limited = Limited(2)
    told: dict[str, Any] = {}
    config = {"quantize": quantize}
    cut = folder / "uncut" / f"step={CUT}.ckpt"
    fit(folder / "limited", strategy(stage), config, callbacks=[limited], steps=3, precision=precision)
    told["full disk"] = limited.told
    other = {1: 2, 2: 3, 3: 2}[stage]
    changed = {name: folder / name for name in ("damaged", "half", "processes", "lost", "evil")}
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        for copy in changed.values():
            shutil.copytree(cut, copy)
        shard = next((changed["damaged"] / "checkpoint").glob("*zero_pp_rank_0_*optim_states.pt"))
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        (changed["half"] / "adapters.ckpt").unlink()
        _rewrite(changed["processes"], lambda saved: saved[KEY]["zero"].update(processes=WORLD + 1))
        _rewrite(changed["lost"], lambda saved: saved["state_dict"].pop(next(iter(saved["state_dict"]))))
        evil = changed["evil"] / "checkpoint"
        torch.save({"optimizer_state_dict": Evil(folder / "ran")}, next(evil.glob("*zero_pp_rank_0_*optim_states.pt")))
        _rewrite(changed["evil"], lambda saved: saved[KEY]["zero"].update(files=dict(file_digests(evil))))
    cases: dict[str, tuple[Any, Any, Any]] = {
        "stage": (strategy(other), config, cut),
        "rank": (strategy(stage), {**config, "r": 8}, cut),
        **{name: (strategy(stage), config, copy) for name, copy in changed.items()},
        "missing": (strategy(stage), config, folder / "nowhere.ckpt"),
    }
    for name, (how, settings, ckpt) in cases.items():
        try:
            fit(folder / "refused", how, settings, ckpt, precision=precision)
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


class Evil:
    """A pickle that writes a file where it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def _rewrite(folder: Path, change: Any) -> None:
    saved = read_checkpoint(folder / "adapters.ckpt")
    saved = {**saved, "state_dict": {k: v.clone() for k, v in saved["state_dict"].items()}}
    change(saved)
    write_checkpoint(saved, folder / "adapters.ckpt")


if __name__ == "__main__":
    root, WORLD, DEVICE = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if DEVICE == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    rank = int(os.environ.get("LOCAL_RANK", 0))
    results: dict[str, Any] = {}
    for case in sys.argv[4:]:
        stage, quantize, precision = case.split("/")
        results[case] = resumes(root / case, int(stage), quantize, precision)
    results["refusals"] = refusals(root / case, int(stage), quantize, precision)
    torch.save(results, root / f"rank{rank}.pt")
