# SPDX-License-Identifier: Apache-2.0
"""`AdaptedParts`: a user's module some of whose parameters, by their names, an adapter makes anew.

::

    y = f(x; W1', W2', ...)      what `merged` gives; W1, W2, ... where the adapter is off
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.nn.adapter import AdapterModule


class AdaptedParts(AdapterModule):
    """A frozen ``base_layer`` and what is trained beside it, in a submodule ``adapter``.

    Code around the module finds the user's attributes on it: `embed_tokens.padding_idx`, `self_attn.batch_first`.

    Args:
        base_layer: The user's module; frozen by the caller.
        record: Shared by all modules of one conversion.
    """

    base_layer: Any
    adapter: Any
    inner = "base_layer"

    def __init__(self, base_layer: nn.Module, record: AdapterRecord) -> None:
        super().__init__(record)
        self.base_layer = base_layer

    @property
    def replaced(self) -> nn.Module:
        """See `AdapterModule.replaced`: the base layer."""
        module: nn.Module = self.base_layer
        return module

    @property
    def added(self) -> nn.Module:
        """See `AdapterModule.added`: what is trained."""
        module: nn.Module = self.adapter
        return module

    @property
    def in_use(self) -> bool:
        """Whether `forward` gives something else than the base layer's output."""
        return self.enabled and not self.vacant and self.strength != 0.0

    def base_output(self, *args: Any, **kwargs: Any) -> Any:
        """What `forward` gives without an adapter."""
        return self.base_layer(*args, **kwargs)

    def merged(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """The parameters that the module computes with, switched off or not, by their names in the user's module.

        Args:
            dtype: Of the result; each parameter's own if null. Sums are in fp32 at least.
        """
        raise NotImplementedError

    def merged_names(self) -> list[str]:
        """The names in `merged`."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base_layer")
            if base is None:
                raise
            return getattr(base, name)
