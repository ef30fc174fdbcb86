# SPDX-License-Identifier: Apache-2.0
"""`fingerprint`: a short value that tells one base model from another.

SHA-256 over, for every distinct parameter and persistent buffer in model order, its shape, its dtype and
its values at `SAMPLES` seeded places (all of them where there are fewer). Names stay out, so that a model has
the same value alone and inside a LightningModule. An optimizer step that changes a share q of the values
of a matrix is missed with probability (1 - q)^256; an Adam step changes nearly all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.inner import inner_model

VERSION = 1
SAMPLES = 256


@torch.no_grad()
def fingerprint(model: nn.Module, without: Iterable[str] = ()) -> dict[str, Any] | None:
    """The fingerprint of the transformers model inside ``model``, or of all of it, before conversion.

    Args:
        model: The model, not yet converted.
        without: Names of modules to leave out: what is trained in full is no base, and a fresh task head is
            another one in each process.

    Returns:
        None where values are not there (meta device), else a dict of primitives::

            version   of this fingerprint
            digest    of the transformers model inside, or of all there is
            tensors   that went into it
            packed    whether some arrived in codes: not comparable with the same base in full precision
            without   names, inside the transformers model, that were left out
            outside   digest of what lies beside the transformers model, None if nothing
    """
    prefix, inner = inner_model(model)
    start = f"{prefix}." if prefix else ""
    left_out = tuple(f"{name}." for name in without)
    inside = [t for name, t in _distinct_tensors(inner) if not f"{start}{name}".startswith(left_out)]
    outside = [t for name, t in _distinct_tensors(model) if not name.startswith((start, *left_out))]
    if any(tensor.is_meta for tensor in (*inside, *outside)):
        return None
    return {
        "version": VERSION,
        "digest": _digest(inside),
        "tensors": len(inside),
        "packed": any(t.dim() == 2 and not t.is_floating_point() for t in inside),
        "without": sorted(name.removeprefix(start) for name in without if name.startswith(start)),
        "outside": _digest(outside) if outside else None,
    }


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_sample(tensor))
    return digest.hexdigest()


def same_base(expected: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> bool | None:
    """Whether two fingerprints are of one base; None where that cannot be told.

    It cannot be told without both, between versions of the fingerprint, between a base that arrived packed and
    one in full precision, and where not the same modules were left out.
    """
    if not expected or not found:
        return None
    if any(expected.get(kind) != found.get(kind) for kind in ("version", "packed", "without")):
        return None
    return expected["digest"] == found["digest"]


def _distinct_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer once, with its name, tied ones at their first place."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    if flat.numel() > SAMPLES:
        generator = torch.Generator().manual_seed(flat.numel())
        places = torch.randint(flat.numel(), (SAMPLES,), generator=generator)
        flat = flat[places.to(flat.device)]
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
