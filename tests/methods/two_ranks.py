# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA and VeRA on two processes: ``python tests/methods/two_ranks.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdaLoRA, AdapterDDPStrategy, AdapterFSDPStrategy, VeRA, parallelize_adapted
from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.model.sharding import shard_model
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import LM, loader, make_trainer, tiny_llama
from tests.strategies.sharded_runs import caught

TARGETS = ["q_proj", "v_proj", "up_proj"]


def callbacks() -> dict[str, AdapterCallback]:
    return {
        "AdaLoRA": AdaLoRA(init_r=6, target_r=2, tinit=1, tfinal=2, target_modules=TARGETS),
        "VeRA": VeRA(r=16, target_modules=TARGETS),
    }


def fit(folder: Path, callback: AdapterCallback, strategy: Any, steps: int = 8) -> LM:
    L.seed_everything(0)
    module = LM(tiny_llama())
    make_trainer(folder, [callback], devices=2, strategy=strategy, max_steps=steps).fit(module, loader())
    return module


def main(folder: Path) -> None:
    """Train both, each rank on its half of the data, and try what is refused."""
    found: dict[str, Any] = {"fsdp1": {}, "fsdp2": {}, "tensor_parallel": {}}
    for title, callback in callbacks().items():
        module = fit(folder, callback, AdapterDDPStrategy(process_group_backend="gloo"))
        found[title] = {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}
        if isinstance(callback, AdaLoRA) and callback.allocator is not None:
            found["kept"] = callback.allocator.kept
        mesh = init_device_mesh("cpu", (2,))
        plan = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
        found["fsdp2"][title] = caught(lambda module=module, mesh=mesh: shard_model(module.net, mesh))
        found["tensor_parallel"][title] = caught(
            lambda module=module, mesh=mesh, plan=plan: parallelize_adapted(module.net, mesh, plan)
        )
    for title, callback in callbacks().items():
        strategy = AdapterFSDPStrategy(process_group_backend="gloo")
        found["fsdp1"][title] = caught(lambda c=callback, s=strategy: fit(folder / "no", c, s))
    rank = torch.distributed.get_rank()
    torch.save(found, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
