# SPDX-License-Identifier: Apache-2.0
"""Identity: everything but the question that an answer of the base depends on, in primitives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.forgetting.base_cache import digest_of
from lightning_lora.model.fingerprint import digest, distinct_tensors
from lightning_lora.model.inner import inner_model
from lightning_lora.model.slots import adapter_record
from lightning_lora.nn.sharded import is_sharded
from lightning_lora.ranks import rank_and_world


@torch.no_grad()
def base_identity(
    module: nn.Module, forward: Any, context: Callable[[], contextlib.AbstractContextManager[Any]], **settings: Any
) -> dict[str, Any]:
    """What answers when the adapters of ``module`` are off.

    Args:
        module: the converted model, or the LightningModule around it.
        forward: what the user said computes logits: None, a name, or a function, which is known by its name.
        context: gives the context in which forwards run.
        settings: of the scoring, in primitives.
    """
    _, inner = inner_model(module)
    record = adapter_record(module)
    config: Any = getattr(inner, "config", None)
    device = next((p.device.type for p in module.parameters()), "cpu")
    with context():
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
    return {
        "model": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "fingerprint": None if record is None else record.fingerprint,
        "tensors": digest(_own_part(tensor) for name, tensor in distinct_tensors(module) if _is_base(name, tensor)),
        "quantize": None if record is None else [str(record.config.quantize), str(record.config.compute_dtype)],
        "config": digest_of(str(sorted(config.to_dict().items()))) if hasattr(config, "to_dict") else None,
        "attention": getattr(config, "_attn_implementation", None),
        "forward": forward if isinstance(forward, str | None) else getattr(forward, "__qualname__", str(type(forward))),
        "dtypes": sorted({str(p.dtype) for p in module.parameters() if not p.requires_grad}),
        "autocast": autocast,
        "matmul": torch.get_float32_matmul_precision(),
        "device": device,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "spread": rank_and_world()[1] if any(map(is_sharded, module.parameters())) else 1,
        **settings,
    }


def _is_base(name: str, tensor: Tensor) -> bool:
    """Frozen parameters, and what is packed: running values of a LightningModule's own are no part of the base."""
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad or tensor.dtype in (torch.uint8, torch.int8)


def _own_part(tensor: Tensor) -> Tensor:
    """This process's share; what is meta has no values to tell one from another."""
    local = tensor.to_local() if is_sharded(tensor) and hasattr(tensor, "to_local") else tensor
    return local if not local.is_meta else torch.empty(0)
