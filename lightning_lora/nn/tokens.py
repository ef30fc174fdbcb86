# SPDX-License-Identifier: Apache-2.0
"""`TrainedTokens`: some rows of a frozen embedding (and of a head that is tied to it) are trained, and no others.

    embedding   y[id] = t_k          where id is the k-th of the tokens,  W[id] elsewhere
    head        y = x W^T, and + x (t_k - W[id])^T in the column of the k-th token

    W: num x dim, frozen        t: tokens x dim, begins as W's rows

No gradient of W's size is made. A strength of lambda uses ``W[id] + lambda (t_k - W[id])``; 0 is the base.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import TargetError, UnsupportedError
from lightning_lora.nn.adapter import KeepsDType, torch_dtype
from lightning_lora.nn.embedding import check_lookup, embed_scale
from lightning_lora.nn.parts import AdaptedParts

ROWS = "adapter.trainable_tokens_delta"  # PEFT's name, though the rows replace and are not added


class TokenRows(KeepsDType):
    """The rows: master weights like an adapter's factors.

    Args:
        rows: Those of the embedding that they begin as, in the dtype to keep.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(rows)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"rows={tuple(self.trainable_tokens_delta.shape)}"


class TrainedTokens(AdaptedParts):
    """A frozen embedding or head, some of whose rows are trained.

    Args:
        base_layer: `nn.Embedding`, or a linear layer whose weight has a row for each token; frozen by the caller.
        record: Shared by all modules of one `apply_lora`.
        tokens: Ids of the rows.
        owner: The module whose rows these are, for a head that is tied to an embedding: it has none of its own.

    Raises:
        TargetError: An id is no row of the weight.
        UnsupportedError: The layer computes something else than to look up or multiply, or has no values yet.
    """

    title = "training of token rows (`trainable_token_indices`)"

    def __init__(
        self, base_layer: nn.Module, record: AdapterRecord, tokens: list[int], owner: TrainedTokens | None = None
    ) -> None:
        super().__init__(base_layer, record)
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        if isinstance(base_layer, nn.Embedding):
            check_lookup(base_layer)
            if base_layer.scale_grad_by_freq:
                raise UnsupportedError(
                    "`trainable_token_indices` is not built for an embedding with `scale_grad_by_freq=True`: build it "
                    "without, or train it in full by `modules_to_save`"
                )
        elif not isinstance(base_layer, nn.Linear):
            raise UnsupportedError(
                f"`trainable_token_indices` names a {type(base_layer).__name__}: rows are trained of embeddings and of "
                "linear heads"
            )
        if weight.is_meta:
            raise UnsupportedError(
                "`trainable_token_indices`: trained rows begin as those of the base, which have no values on the meta "
                "device; load the weights before the adapters are put in"
            )
        beyond = [token for token in tokens if token >= weight.shape[0]]
        if beyond:
            raise TargetError(
                f"`trainable_token_indices` {beyond} are beyond the {weight.shape[0]} rows of the embedding: add the "
                "tokens to the tokenizer and resize the model first (`add_tokens` does both)"
            )
        self.tokens = list(tokens)
        self._owner = [] if owner is None else [owner]  # in a list: no part of this module
        index = torch.tensor(tokens, device=weight.device)
        self.register_buffer("index", index, persistent=False)
        if isinstance(base_layer, nn.Embedding):
            place = torch.full((weight.shape[0],), -1, device=weight.device)
            place[index] = torch.arange(len(tokens), device=weight.device)
            self.register_buffer("place", place, persistent=False)  # of each id among the tokens, -1 for the others
        if owner is None:
            rows = weight.detach()[index].to(torch_dtype(record.config.adapter_dtype), copy=True)
            self.adapter = TokenRows(rows)

    @property
    def owner(self) -> TrainedTokens | None:
        """The module whose rows these are, where it is another one."""
        return self._owner[0] if self._owner else None

    @property
    def strength(self) -> float:
        """See `AdapterModule`; of a tied head the embedding's."""
        owner = self.__dict__.get("_owner")  # not yet while the base class is set up
        return owner[0].strength if owner else self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value

    @property
    def rows(self) -> nn.Parameter:
        """``(tokens, dim)``."""
        holder: Any = self._owner[0] if self._owner else self
        return holder.adapter.trainable_tokens_delta

    def own_names(self) -> list[str]:
        """The rows; nothing where they are another module's."""
        return [] if self._owner else [ROWS]

    @property
    def added(self) -> nn.Module:
        """See `AdapterModule.added`: the rows."""
        return nn.Module() if self._owner else self.adapter

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """See `AdapterModule.successors`."""
        return {"weight": [self.rows]}

    def _nothing(self) -> dict[str, Tensor]:
        return {name: self.rows.new_empty(0, self.rows.shape[1]) for name in self.own_names()}

    def untrained(self) -> bool:
        """Whether the rows are the base's."""
        weight = self._base_rows()
        return torch.equal(self.rows.detach().to(weight.dtype), weight)

    def _base_rows(self) -> Tensor:
        weight: Tensor = self.base_layer.weight
        return weight.detach()[self.index]

    def value(self) -> Tensor:
        """The rows as they are used, with gradient: mixed with the base's by the strength."""
        rows: Tensor = self.rows
        return rows if self.strength == 1.0 else torch.lerp(self._base_rows().to(rows.dtype), rows, self.strength)

    def merged_names(self) -> list[str]:
        """See `AdaptedParts.merged_names`."""
        return ["weight"]

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See `AdaptedParts.merged`."""
        weight: Tensor = self.base_layer.weight
        whole = weight.detach().to(dtype or weight.dtype)
        if self.in_use:
            whole = whole.index_copy(0, self.index, self.value().to(whole.dtype))
        return {"weight": whole}

    def forward(self, x: Tensor) -> Tensor:
        """Ids for an embedding, ``(..., dim)`` for a head."""
        base: Any = self.base_layer
        y: Tensor = base(x)
        if not self.in_use:
            return y
        if not isinstance(base, nn.Embedding):
            # In the base's dtype, as in a merge: rows that were not trained change nothing, however the base was cast.
            change = self.value().to(base.weight.dtype) - self._base_rows()
            return y.index_add(-1, self.index, F.linear(x, change.to(x.dtype)).to(y.dtype))
        place = self.place[x]
        # The row of the padding token learns no more than it would in the embedding itself.
        pad = self.tokens.index(base.padding_idx) if base.padding_idx in self.tokens else None
        rows = F.embedding(place.clamp(min=0), self.value(), padding_idx=pad)
        scale = embed_scale(base)
        rows = rows.to(y.dtype) if scale is None else rows.to(base.weight.dtype) * scale
        return torch.where((place >= 0).unsqueeze(-1), rows.to(y.dtype), y)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{len(self.tokens)} tokens" + (", tied" if self._owner else "")
