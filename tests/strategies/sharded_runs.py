# SPDX-License-Identifier: Apache-2.0
"""Runs of a model that is spread over two processes; every rank leaves what it found in ``<folder>/rank<n>.pt``.

``python tests/strategies/sharded_runs.py FOLDER``: Lightning's launcher starts the second rank. With ``grid`` after it,
four processes.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import (
    AdapterCheckpoint,
    AdapterModelParallelStrategy,
    LoRA,
    LoRAConfig,
    MergeOnFitEnd,
    adapter_state_dict,
    apply_lora,
    parallelize_adapted,
)
from lightning_lora.io.distributed import read_either
from lightning_lora.nn.sharded import whole
from tests.helpers import LM, TinyNet, Tokens, tiny_llama

STEPS, CUT = 8, 5
WORLD = 2


class Own(LM):
    """Shards itself, as people do who write ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(tiny_llama())

    def configure_model(self) -> None:
        """Adapters first, then the blocks, then the rest."""
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        apply_lora(self, LoRAConfig(r=4))
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Cut(LM):
    """Cut by a tensor-parallel plan."""

    def __init__(self, **config: Any) -> None:
        super().__init__(tiny_llama())
        self.config = LoRAConfig(**{"r": 4, **config})

    def configure_model(self) -> None:
        """Adapters first, then the plan, by the names before conversion."""
        if any(isinstance(p, DTensor) for p in self.parameters()):
            return
        apply_lora(self, self.config)
        plan: dict[str, Any] = {}
        for i in range(2):
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                plan[f"model.layers.{i}.{name}"] = ColwiseParallel()
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                plan[f"model.layers.{i}.{name}"] = RowwiseParallel()
        parallelize_adapted(self.net, self.device_mesh["tensor_parallel"], plan)


class OwnLate(Own):
    """Shards itself and leaves the adapters to the callback: too late."""

    def configure_model(self) -> None:
        """No adapters."""
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def strategy(**kwargs: Any) -> AdapterModelParallelStrategy:
    """Over gloo."""
    return AdapterModelParallelStrategy(process_group_backend="gloo", **kwargs)


def trainer(folder: Path, how: Any, *callbacks: L.Callback, steps: int = STEPS, **kwargs: Any) -> L.Trainer:
    """Two processes, saves every `CUT` steps."""
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    return L.Trainer(
        accelerator="cpu", devices=kwargs.pop("devices", WORLD), strategy=how, logger=False, max_steps=steps,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks, saves],
        default_root_dir=folder, **kwargs,
    )  # fmt: skip


def loader(share: int | None = None) -> StatefulDataLoader:
    """Shuffled, resumable, four items a process: a share of the data, this process's own unless said otherwise."""
    data = Tokens(96)
    rank = int(os.environ.get("LOCAL_RANK", 0)) if share is None else share
    sampler = StatefulDistributedSampler(data, seed=3, num_replicas=WORLD, rank=rank)
    return StatefulDataLoader(data, batch_size=4, sampler=sampler)


def adapters(module: L.LightningModule) -> dict[str, torch.Tensor]:
    """Whole adapters, on every rank."""
    return {name: whole(tensor).clone() for name, tensor in adapter_state_dict(module).items()}


def fit(folder: Path, how: Any, config: dict[str, Any], ckpt: Path | None = None, **kwargs: Any) -> Any:
    """Train from the same start; returns the module and its adapters."""
    L.seed_everything(7, verbose=False)
    module = kwargs.pop("module", None) or LM(tiny_llama())
    data = loader(kwargs.pop("share", None))
    run = trainer(folder, how, LoRA(**{"r": 4, **config}), *kwargs.pop("callbacks", ()), **kwargs)
    run.fit(module, data, ckpt_path=ckpt)
    return module, adapters(module)


def resumes(folder: Path, quantize: str, shards: bool) -> dict[str, Any]:
    """An uncut run and one from the middle."""
    config = {"quantize": quantize, "lora_dropout": 0.1}
    module, uncut = fit(folder / "uncut", strategy(save_distributed_checkpoint=shards), config)
    cut = folder / "uncut" / f"step={CUT}.ckpt"
    _, resumed = fit(folder / "resumed", strategy(save_distributed_checkpoint=shards), config, cut)
    units = [name for name, m in module.named_modules() if isinstance(m, FSDPModule)]
    mixed = [
        name
        for name, m in module.named_modules()
        if isinstance(m, FSDPModule) and len({p.requires_grad for p in own_parameters(m)}) > 1
    ]
    codes = {n: (tuple(p.to_local().shape), tuple(p.shape)) for n, p in module.named_parameters() if "codes" in n}
    return {"uncut": uncut, "resumed": resumed, "units": units, "mixed": mixed, "codes": codes}


def own_parameters(unit: FSDPModule) -> list[torch.nn.Parameter]:
    """The parameters that a unit itself holds."""
    group = unit._get_fsdp_state()._fsdp_param_group
    return [] if group is None else [p.sharded_param for p in group.fsdp_params]


class Began(L.Callback):
    """The optimizer's state that training begins with, whole, on the first process."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note it."""
        self.state = trainer.strategy.optimizer_state(trainer.optimizers[0])["state"]  # type: ignore[arg-type]


def from_older(folder: Path, how: Any) -> list[torch.Tensor]:
    """The moments that a run takes over from ``full.ckpt``, whose optimizer held the whole model."""
    torch.manual_seed(0)
    began = Began()
    fit(folder / "older", how, {}, folder / "full.ckpt", module=LM(TinyNet()), callbacks=[began])
    return [values["exp_avg"] for values in began.state.values() if "exp_avg" in values]


def full_disk(folder: Path) -> dict[str, Any]:
    """The second process has no room for its shards: what each hears, and what is left of the save before."""
    L.seed_everything(7, verbose=False)
    module, before = fit(folder, strategy(save_distributed_checkpoint=True), {}, steps=CUT)
    path = folder / f"step={CUT}.ckpt"
    with torch.no_grad():
        for tensor in adapter_state_dict(module).values():
            tensor += 1
    if os.environ.get("LOCAL_RANK", "0") == "1":
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited))
    try:
        text = caught(lambda: module.trainer.save_checkpoint(path))
    finally:
        if os.environ.get("LOCAL_RANK", "0") == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    module.trainer.strategy.barrier()
    left = sorted(p.name for p in folder.iterdir())
    return {"text": text, "before": before, "after": read_either(path)["state_dict"], "left": left}


class Wide(torch.nn.Module):
    """A base of 67 MB, with adapters of 0.3 MB."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, 2048)
        self.layers = torch.nn.ModuleList(
            [torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False), torch.nn.GELU()) for _ in range(4)]
        )
        self.head = torch.nn.Linear(2048, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def anonymous() -> int:
    """Memory of this process that is no mapped file [bytes]."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Peak(threading.Thread):
    """The largest growth of `anonymous` memory while a block runs, looked at every millisecond."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.growth, self.over = 0, threading.Event()

    def run(self) -> None:
        """Look."""
        while not self.over.wait(0.001):
            self.growth = max(self.growth, anonymous() - self.start_at)

    def __enter__(self) -> Peak:
        self.start_at = anonymous()
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.over.set()
        self.join()


def memory(folder: Path, shards: bool) -> dict[str, int]:
    """What a save of a large model takes, beside the size of the model and of its adapters [bytes]."""
    L.seed_everything(7, verbose=False)
    module = LM(Wide())
    run = trainer(folder, strategy(save_distributed_checkpoint=shards), LoRA(r=4), steps=2)
    run.fit(module, loader())
    run.save_checkpoint(folder / "warm.ckpt")  # what torch allocates once
    with Peak() as peak:
        run.save_checkpoint(folder / "a.ckpt")
    tensors = {name: p.numel() * p.element_size() for name, p in module.named_parameters()}
    small = sum(size for name, size in tensors.items() if "lora_" in name)
    return {"peak": peak.growth, "base": sum(tensors.values()) - small, "adapters": small}


def caught(work: Any) -> str:
    """The text of what it raises."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def grid(folder: Path) -> dict[str, Any]:
    """Four processes: pairs cut by a plan of tensor parallelism, the pairs sharing out by FSDP 2."""
    found: dict[str, Any] = {}
    pair = int(os.environ.get("LOCAL_RANK", 0)) // 2
    for shards in (False, True):
        how = {"tensor_parallel_size": 2, "save_distributed_checkpoint": shards}
        path = folder / str(shards)
        module, uncut = fit(path, strategy(**how), {}, module=Cut(), devices=4, share=pair)
        cut = path / f"step={CUT}.ckpt"
        _, resumed = fit(path / "resumed", strategy(**how), {}, cut, module=Cut(), devices=4, share=pair)
        units = sum(isinstance(m, FSDPModule) for m in module.modules())
        found[str(shards)] = {"uncut": uncut, "resumed": resumed, "units": units}
    plain = DDPStrategy(process_group_backend="gloo")
    _, found["ddp"] = fit(folder / "ddp", plain, {}, devices=4, share=pair)
    return found


def main() -> None:
    """Everything, in order, on every rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    if sys.argv[2:] == ["grid"]:
        torch.save(grid(folder), folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")
        return
    for quantize in ("none", "nf4"):
        for shards in (False, True):
            found[f"{quantize}-{'shards' if shards else 'file'}"] = resumes(
                folder / f"{quantize}-{shards}", quantize, shards
            )
    # a plain strategy of Lightning's around a module that shards itself
    plain = {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"}
    for shards in (False, True):
        how = ModelParallelStrategy(**plain, save_distributed_checkpoint=shards)
        _, found[f"own-{shards}"] = fit(folder / f"own-{shards}", how, {}, module=Own())
    found["late"] = caught(lambda: fit(folder / "late", ModelParallelStrategy(**plain), {}, module=OwnLate()))
    # callbacks over shards, and a plain module with a part trained in full
    kept = AdapterCheckpoint(folder / "kept", filename="a", every_n_train_steps=CUT)
    merge = MergeOnFitEnd(folder / "merged")
    module, found["kept"] = fit(folder / "callbacks", strategy(), {"quantize": "nf4"}, callbacks=[kept, merge])
    found["merge"] = None if merge.report is None else merge.report.to_dict()
    config = {"modules_to_save": ["head"]}
    _, found["saved"] = fit(folder / "saved", strategy(), config, module=LM(TinyNet()))
    dora, path = {"use_dora": True}, folder / "dora"
    _, found["dora"] = fit(path, strategy(save_distributed_checkpoint=True), dora)
    _, found["dora-resumed"] = fit(
        path / "on", strategy(save_distributed_checkpoint=True), dora, path / f"step={CUT}.ckpt"
    )
    merge = MergeOnFitEnd(folder / "dora-merged")
    _, found["dora-file"] = fit(folder / "dora-file", strategy(), dora, callbacks=[merge])
    found["dora-merge"] = None if merge.report is None else merge.report.to_dict()
    _, found["dora-ddp"] = fit(folder / "dora-ddp", DDPStrategy(process_group_backend="gloo"), dora)
    _, found["named"] = fit(folder / "named", strategy(fsdp_plan=[r"layers\.\d+", "mlp"]), {})
    for quantize in ("none", "nf4"):
        config = {"quantize": quantize, "lora_dropout": 0.1}
        how = DDPStrategy(process_group_backend="gloo")
        _, found[f"{quantize}-ddp"] = fit(folder / f"{quantize}-ddp", how, config)
    for shards in (False, True):
        name = folder / f"async-{shards}"
        how = strategy(save_distributed_checkpoint=shards)
        _, uncut = fit(name, how, {}, steps=CUT, plugins=[AsyncCheckpointIO()])
        torch.distributed.barrier()  # each process waits for its own writer only
        found[f"async-{shards}"] = {"live": uncut, "written": read_either(name / f"step={CUT}.ckpt")["state_dict"]}
    found["full"] = full_disk(folder / "full")
    # tensor parallelism: both processes see the same items
    cut = {"data_parallel_size": 1, "tensor_parallel_size": 2}
    for shards in (False, True):
        how = {**cut, "save_distributed_checkpoint": shards}
        name = folder / f"tensor-{shards}"
        _, uncut = fit(name, strategy(**how), {}, module=Cut(), share=0)
        path = name / f"step={CUT}.ckpt"
        _, resumed = fit(name / "resumed", strategy(**how), {}, path, module=Cut(), share=0)
        found[f"tensor-{shards}"] = {"uncut": uncut, "resumed": resumed}
    _, found["tensor-ddp"] = fit(folder / "tensor-ddp", DDPStrategy(process_group_backend="gloo"), {}, share=0)
    for config in ({"quantize": "nf4"}, {"lora_dropout": 0.1}, {"use_dora": True}):
        module = Cut(**config)
        text = caught(lambda m=module, c=config: fit(folder / "no", strategy(**cut), c, module=m, share=0))
        found.setdefault("tensor-refused", []).append(text)
    for shards in (False, True):
        found[f"memory-{shards}"] = memory(folder / f"memory-{shards}", shards)
    found["older"] = from_older(folder, strategy())
    found["unknown"] = caught(lambda: fit(folder / "unknown", strategy(fsdp_plan=["layer.0"]), {}))
    torch.save(found, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main()
