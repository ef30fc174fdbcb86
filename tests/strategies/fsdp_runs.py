# SPDX-License-Identifier: Apache-2.0
"""Runs under FSDP 1 in two CPU processes; every rank leaves what it found in ``<folder>/rank<n>.pt``.

Lightning gives FSDP 1 to GPUs only. The subclass below changes nothing but the device that it tells torch.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_lora import AdapterCheckpoint, AdapterFSDPStrategy, MergeOnFitEnd
from lightning_lora.nn.linear import LoRAAdapter
from tests.strategies.sharded_runs import CUT, caught, fit, from_older


class CPUAdapterFSDP(AdapterFSDPStrategy):
    """Ours."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return on_cpu(model, self.kwargs)


class CPUFSDP(FSDPStrategy):
    """Lightning's own."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return on_cpu(model, self.kwargs)


def on_cpu(model: nn.Module, kwargs: dict[str, Any]) -> nn.Module:
    """What Lightning does, with a device that is there."""
    return FSDP(module=model, device_id=torch.device("cpu"), **kwargs)


def strategy(shards: bool, **kwargs: Any) -> CPUAdapterFSDP:
    """Over gloo."""
    form = "sharded" if shards else "full"
    return CPUAdapterFSDP(process_group_backend="gloo", state_dict_type=form, **kwargs)


def units(module: nn.Module) -> dict[str, int]:
    """How many wrapped units hold an adapter alone, and how many something else."""
    wrapped = [m.module for m in module.modules() if isinstance(m, FSDP)]
    alone = sum(isinstance(m, LoRAAdapter) for m in wrapped)
    return {"adapters": alone, "others": len(wrapped) - alone}


def main() -> None:
    """Everything, in order, on every rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    found: dict[str, Any] = {}
    for quantize in ("none", "nf4"):
        for shards in (False, True):
            config, name = {"quantize": quantize, "lora_dropout": 0.1}, folder / f"{quantize}-{shards}"
            module, uncut = fit(name, strategy(shards), config)
            _, resumed = fit(name / "resumed", strategy(shards), config, name / f"step={CUT}.ckpt")
            found[f"{quantize}-{shards}"] = {"units": units(module), "uncut": uncut, "resumed": resumed}
    plain = CPUFSDP(process_group_backend="gloo", state_dict_type="sharded")
    module, _ = fit(folder / "attached", plain, {}, steps=CUT)
    fit(folder / "ddp", DDPStrategy(process_group_backend="gloo"), {}, steps=CUT)
    for quantize in ("nf4", "nf4-dq", "int8"):
        fit(folder / quantize, strategy(False), {"quantize": quantize}, steps=CUT)
        fit(folder / f"{quantize}-ddp", DDPStrategy(process_group_backend="gloo"), {"quantize": quantize}, steps=CUT)
    found["attached"] = units(module)
    kept = AdapterCheckpoint(folder / "kept", filename="a", every_n_train_steps=CUT)
    merge = MergeOnFitEnd(folder / "merged")
    fit(folder / "callbacks", strategy(False), {"quantize": "nf4"}, callbacks=[kept, merge])
    found["merge"] = None if merge.report is None else merge.report.to_dict()
    found["older"] = from_older(folder, strategy(False))
    found["original"] = caught(lambda: fit(folder / "no", strategy(False, use_orig_params=False), {}))
    found["saved"] = caught(lambda: fit(folder / "no", strategy(False), {"modules_to_save": ["lm_head"]}))
    found["dora"] = caught(lambda: fit(folder / "no", strategy(False), {"use_dora": True}))
    mixed = {"mixed_precision": torch.distributed.fsdp.MixedPrecision(param_dtype=torch.bfloat16)}
    found["mixed"] = caught(lambda: fit(folder / "no", strategy(False, **mixed), {"quantize": "nf4"}))
    torch.save(found, folder / f"rank{os.environ.get('LOCAL_RANK', 0)}.pt")


if __name__ == "__main__":
    main()
