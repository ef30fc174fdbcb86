# SPDX-License-Identifier: Apache-2.0
"""The methods beside linears on two processes: ``python tests/methods/beside_ranks.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdapterDDPStrategy, AdapterFSDPStrategy, parallelize_adapted
from lightning_lora.model.sharding import shard_model
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import LM, loader, make_trainer, tiny_llama
from tests.methods.table import ROWS, Row
from tests.strategies.sharded_runs import caught

METHODS = [row for row in ROWS if row.name in ("prompt", "prefix", "bottleneck", "norms", "full")]


def fit(folder: Path, row: Row, strategy: Any) -> LM:
    L.seed_everything(0)
    module = LM(tiny_llama(), lr=row.learns_at)
    make_trainer(folder, [row.make()], devices=2, strategy=strategy, max_steps=4).fit(module, loader())
    return module


def main(folder: Path) -> None:
    """Train each, every rank on its half of the data, and try what is refused."""
    found: dict[str, Any] = {"trained": {}, "fsdp1": {}, "fsdp2": {}, "tensor_parallel": {}}
    for row in METHODS:
        module = fit(folder, row, AdapterDDPStrategy(process_group_backend="gloo"))
        found["trained"][row.name] = {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}
        mesh = init_device_mesh("cpu", (2,))
        plan = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
        found["fsdp2"][row.name] = caught(lambda module=module, mesh=mesh: shard_model(module.net, mesh))
        found["tensor_parallel"][row.name] = caught(
            lambda module=module, mesh=mesh, plan=plan: parallelize_adapted(module.net, mesh, plan)
        )
    for row in METHODS:
        strategy = AdapterFSDPStrategy(process_group_backend="gloo")
        found["fsdp1"][row.name] = caught(lambda row=row, strategy=strategy: fit(folder / "no", row, strategy))
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
