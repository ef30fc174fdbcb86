# SPDX-License-Identifier: Apache-2.0
"""`fingerprint`: a short value that tells one base model from another.

SHA-256 over, for every distinct parameter and persistent buffer in model order, its shape, its dtype and
its values at `SAMPLES` seeded places (all of them where there are fewer). Names stay out, so that a model has
the same value alone and inside a LightningModule. An optimizer step that changes a share q of the values
of a matrix is missed with probability (1 - q)^256; an Adam step changes nearly all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.inner import inner_model

VERSION = 1
SAMPLES = 256


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """The fingerprint of the transformers model inside ``model``, or of all of it, before conversion.

    Returns:
        ``{"version": 1, "digest": hex string, "tensors": count, "packed": bool}``, or None where values are
        not there (meta device). A base that arrives packed is sampled in its codes and says so: it cannot be
        compared with the same base in full precision.
    """
    digest = hashlib.sha256()
    count, packed = 0, False
    for tensor in _distinct_tensors(inner_model(model)[1]):
        if tensor.is_meta:
            return None
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor))
        count += 1
        packed |= tensor.dim() == 2 and not tensor.is_floating_point()
    return {"version": VERSION, "digest": digest.hexdigest(), "tensors": count, "packed": packed}


def same_base(expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> bool | None:
    """Whether two fingerprints are of one base; None where that cannot be told.

    It cannot be told without both, between versions of the fingerprint, and between a base that arrived packed
    and one in full precision.
    """
    if not expected or not found:
        return None
    if any(expected.get(kind) != found.get(kind) for kind in ("version", "packed")):
        return None
    return expected["digest"] == found["digest"]


def _distinct_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and persistent buffer once, tied ones at their first place."""
    seen: set[int] = set()
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        generator = torch.Generator().manual_seed(flat.numel())
        places = torch.randint(flat.numel(), (SAMPLES,), generator=generator)
        flat = flat[places.to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
