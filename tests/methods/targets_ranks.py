# SPDX-License-Identifier: Apache-2.0
"""Targets that are no linear layers on two processes: ``python tests/methods/targets_ranks.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdapterDDPStrategy, AdapterFSDPStrategy, LoRA, parallelize_adapted
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.model.sharding import shard_model
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import LM, loader, make_trainer
from tests.model.kinds import CASES
from tests.strategies.sharded_runs import caught

NAMES = ("tied embedding", "convolutions", "attention", "experts", "tied tokens")


def fit(folder: Path, case: str, strategy: Any, ckpt: Path | None = None) -> LM:
    L.seed_everything(0 if ckpt is None else 5)
    module = LM(CASES[case].make())
    kept = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [LoRA(**{"r": 4, **CASES[case].config}), kept]
    make_trainer(folder, callbacks, devices=2, strategy=strategy).fit(module, loader(), ckpt_path=ckpt)
    return module


def state(module: LM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}


def main(folder: Path) -> None:
    """Train each, each rank on its half of the data; cut and go on; try what is refused."""
    found: dict[str, Any] = {}
    for case in NAMES:
        own = folder / case
        module = fit(own, case, AdapterDDPStrategy(process_group_backend="gloo"))
        again = AdapterDDPStrategy(process_group_backend="gloo")
        on = fit(folder / f"{case} on", case, again, ckpt=own / "step=2.ckpt")
        mesh = init_device_mesh("cpu", (2,))
        found[case] = {
            "whole": state(module),
            "resumed": state(on),
            "fsdp2": caught(lambda module=module, mesh=mesh: shard_model(module.net, mesh)),
            "tensor_parallel": caught(lambda module=module, mesh=mesh: parallelize_adapted(module.net, mesh, {})),
        }
    for case in NAMES:
        strategy = AdapterFSDPStrategy(process_group_backend="gloo")
        found[case]["fsdp1"] = caught(lambda c=case, s=strategy: fit(folder / "no", c, s))
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
