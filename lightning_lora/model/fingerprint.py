# SPDX-License-Identifier: Apache-2.0
"""`fingerprint`: a short value that tells one base model from another.

SHA-256 over, for every distinct parameter and persistent buffer in model order, its shape, its dtype and
its values at `SAMPLES` seeded places, one in each of as many equal stretches (all values where there are
fewer). Names stay out, so that a model has the same value alone and inside a LightningModule.

A change of a share q of a tensor's values is missed with probability at most ``(1 - q)^256``: of q = 0.1 with
2e-12, of q = 0.02 with 0.6 %. An Adam step changes nearly all values of an fp32 matrix. In bf16 it changes those
that are smaller than about 256 learning rates: of a matrix of standard deviation 0.02 some 10 % at a rate of
1e-5, and what rounding leaves as it was is the same base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.model.inner import inner_model

VERSION = 2  # 1 drew its places anew for each sample, so that some fell together
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
            base      for the reader: the model's class, and the name that it was loaded by; not compared
            digest    of the transformers model inside, or of all there is
            tensors   that went into it
            packed    whether some arrived in codes: not comparable with the same base in full precision
            without   names, inside the transformers model, that were left out
            outside   digest of what lies beside the transformers model, None if nothing
    """
    prefix, inner = inner_model(model)
    start = f"{prefix}." if prefix else ""
    left_out = tuple(f"{name}." for name in without)
    inside = [t for name, t in distinct_tensors(inner) if not f"{start}{name}".startswith(left_out)]
    outside = [t for name, t in distinct_tensors(model) if not name.startswith((start, *left_out))]
    if any(tensor.is_meta for tensor in (*inside, *outside)):
        return None
    return {
        "version": VERSION,
        "base": _title(inner),
        "digest": digest(inside),
        "tensors": len(inside),
        "packed": any(t.dim() == 2 and t.dtype in (torch.uint8, torch.int8) for t in inside),
        "without": sorted(name.removeprefix(start) for name in without if name.startswith(start)),
        "outside": digest(outside) if outside else None,
    }


@torch.no_grad()
def digest(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> str:
    """SHA-256 over shapes, dtypes and sampled values, in order; none of the tensors on the meta device.

    Args:
        tensors: What to hash.
        dtype: Hash floating tensors as if they had been cast to it; as they are if null.
    """
    hashed = hashlib.sha256()
    for tensor in tensors:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        hashed.update(f"{tuple(tensor.shape)} {kind}".encode())
        hashed.update(_sample(tensor, kind))
    return hashed.hexdigest()


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


def distinct_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and persistent buffer once, with its name, tied ones at their first place."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _title(model: nn.Module) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return f"{type(model).__name__} {name!r}" if name else type(model).__name__


def _sample(tensor: Tensor, dtype: torch.dtype) -> bytes:
    flat = tensor.detach().reshape(-1)
    size = flat.numel()
    if size > SAMPLES:
        edges = torch.arange(SAMPLES + 1) * size // SAMPLES
        generator = torch.Generator().manual_seed(size)
        share = torch.rand(SAMPLES, generator=generator, dtype=torch.float64)
        places = edges[:-1] + (share * edges.diff()).long()
        flat = flat[places.to(flat.device)]
    return flat.to(dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes() if size else b""
