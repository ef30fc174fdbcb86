# SPDX-License-Identifier: Apache-2.0
"""`RNGState`: the random number generators of this process, as primitives and tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RNGState:
    """State of python's, numpy's and torch's generators, CUDA's current device included.

    Only lists, numbers and tensors are kept, so it loads under ``torch.load(weights_only=True)``.
    """

    python: list[Any]
    numpy: dict[str, Any]
    torch_cpu: Tensor
    torch_cuda: Tensor | None

    @classmethod
    def capture(cls) -> RNGState:
        """The state now."""
        version, internal, gauss = random.getstate()
        drawn = np.random.get_state(legacy=False)
        mt19937 = drawn["state"]
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(
            python=[version, list(internal), gauss],
            numpy={
                "keys": torch.from_numpy(mt19937["key"].astype(np.int64)),
                "pos": int(mt19937["pos"]),
                "has_gauss": int(drawn["has_gauss"]),
                "cached": float(drawn["gauss"]),
            },
            torch_cpu=torch.get_rng_state(),
            torch_cuda=torch.cuda.get_rng_state() if in_use else None,
        )

    def restore(self) -> None:
        """Put the state back."""
        version, internal, gauss = self.python
        random.setstate((version, tuple(internal), gauss))
        keys = self.numpy["keys"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, self.numpy["pos"], self.numpy["has_gauss"], self.numpy["cached"]))
        torch.set_rng_state(self.torch_cpu.cpu())
        if self.torch_cuda is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.torch_cuda.cpu())

    def to_dict(self) -> dict[str, Any]:
        """The state as a dict of primitives and tensors."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RNGState:
        """The state from `to_dict`'s result."""
        return cls(**values)


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves the generators as they were, on exceptions too."""
    state = RNGState.capture()
    try:
        yield
    finally:
        state.restore()
