# SPDX-License-Identifier: Apache-2.0
"""`AdapterModule`: what stands in the model where a module of the user's stood; the seam of every method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord


class AdapterModule(nn.Module):
    """Base of every module that replaces one of the user's. Adapters are known by this type, never by name.

    ``enabled`` and ``strength`` are plain attributes: switched off, a module computes exactly what the
    module that it replaced computes.

    Args:
        record: What `apply_lora` did, shared by all modules of one call.
    """

    def __init__(self, record: AdapterRecord) -> None:
        super().__init__()
        self.record = record
        self.enabled = True
        self.strength = 1.0

    def trained_names(self) -> list[str]:
        """Names, inside this module, of the parameters and buffers that training owns and checkpoints keep."""
        raise NotImplementedError

    def untrained(self) -> bool:
        """Whether the module still computes exactly the base (B is zero, a saved module equals its original)."""
        raise NotImplementedError


class KeepsDType(nn.Module):
    """A module whose tensors move between devices but keep their dtypes under ``.to(dtype)``, ``.half()`` ...

    Lightning's ``bf16-true`` and ``16-true`` cast the whole model after conversion. Master adapters would
    lose their small updates and quantization constants their meaning, so both opt out here.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)


def freeze_statistics(module: nn.Module) -> bool:
    """Keep a normalisation layer's running statistics as they are in training; whether it has any."""
    if not getattr(module, "track_running_stats", False):
        return False
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        module.momentum = 0.0  # without tracking it would leave its statistics out of evaluation too
    else:
        module.track_running_stats = False  # type: ignore[assignment]  # batch statistics in training, no update
    return True


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that a configuration's "fp32", "bf16" or "fp16" names."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
