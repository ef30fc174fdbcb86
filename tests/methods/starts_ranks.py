# SPDX-License-Identifier: Apache-2.0
"""Starts and a frozen A on two processes: ``python tests/methods/starts_ranks.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import (
    AdapterDDPStrategy,
    AdapterFSDPStrategy,
    AdapterModelParallelStrategy,
    LoRA,
    parallelize_adapted,
)
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.model.sharding import shard_model
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import LM, loader, make_trainer, tiny_llama
from tests.strategies.sharded_runs import caught

WORDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq", "quantize": "nf4"},
    "frozen A": {"freeze_lora_A": True},
    "eva": {"init_lora_weights": "eva", "eva_batches": 2},
}


class Early(L.Callback):
    """Keeps A as it is before the first step."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 0:
            self.A = [m.lora_A.detach().clone() for _, m in adapter_modules(pl_module)]


def fit(folder: Path, words: dict[str, Any], strategy: Any, steps: int = 4, ckpt: Path | None = None) -> tuple[LM, Any]:
    L.seed_everything(0 if ckpt is None else 5)
    module, early = LM(tiny_llama()), Early()
    kept = AdapterCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    callbacks = [LoRA(r=4, **words), early, kept]
    make_trainer(folder, callbacks, devices=2, strategy=strategy, max_steps=steps).fit(module, loader(), ckpt_path=ckpt)
    return module, early


def state(module: LM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}


def main(folder: Path) -> None:
    """Train each, each rank on its half of the data; cut and go on; try what is refused."""
    found: dict[str, Any] = {name: {} for name in WORDS} | {"fsdp1": {}, "fsdp2": {}, "tensor_parallel": {}}
    for name, words in WORDS.items():
        own = folder / name
        module, early = fit(own, words, AdapterDDPStrategy(process_group_backend="gloo"))
        found[name] = {"whole": state(module), "first": early.A}
        cut = AdapterDDPStrategy(process_group_backend="gloo")
        found[name]["resumed"] = state(fit(folder / f"{name} on", words, cut, ckpt=own / "step=2.ckpt")[0])
        if name == "eva":
            continue
        mesh = init_device_mesh("cpu", (2,))
        plan = {"model.layers.0.self_attn.q_proj": ColwiseParallel()}
        found["fsdp2"][name] = caught(lambda module=module, mesh=mesh: shard_model(module.net, mesh))
        found["tensor_parallel"][name] = caught(
            lambda module=module, mesh=mesh, plan=plan: parallelize_adapted(module.net, mesh, plan)
        )
    for name, words in WORDS.items():
        strategy: Any = AdapterFSDPStrategy(process_group_backend="gloo")
        if name == "eva":
            strategy = AdapterModelParallelStrategy(data_parallel_size=2, process_group_backend="gloo")
        found["fsdp1"][name] = caught(lambda w=words, s=strategy: fit(folder / "no", w, s))
    torch.save(found, folder / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
