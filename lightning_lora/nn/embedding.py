# SPDX-License-Identifier: Apache-2.0
"""`LoRAEmbedding`: a frozen embedding with a low-rank update, looked up like the embedding itself.

    y = c ( W[ids] + s A^T[ids] B^T )        W: num x dim, frozen    A: r x num    B: dim x r

c is 1, or the ``embed_scale`` of an embedding that scales what it looks up (Gemma's, BART's). PEFT's start: A zero,
B normal. A head that is tied to the embedding stays the base's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.lowrank import LowRankAdapter, LowRankModule, Site


class EmbeddingAdapter(LowRankAdapter):
    """The factors of an embedding, which begin the other way round."""

    def start(self, A: Tensor, B: Tensor) -> None:
        """A zero, B normal, as PEFT begins."""
        nn.init.zeros_(A)
        nn.init.normal_(B)


class LoRAEmbedding(LowRankModule):
    """An `nn.Embedding` and the factors that are looked up beside it; dropout has no place here."""

    title = "LoRA on embeddings"
    adapter_kind = EmbeddingAdapter

    @classmethod
    def check(cls, plain: nn.Module, record: AdapterRecord) -> None:
        """See `LowRankModule.check`."""
        super().check(plain, record)
        check_lookup(plain)

    def sites_of(self, plain: nn.Module, r: int) -> tuple[Site, ...]:
        """See `LowRankModule.sites_of`."""
        return embedding_sites(plain, r)

    def watched(self) -> list[nn.Parameter]:
        """A, which begins as zero here."""
        return [self.factors(site)[0] for site in self.sites]

    def delta(self, site: Site, A: Tensor, B: Tensor) -> Tensor:
        """``(B A)^T``, ``(num, dim)``."""
        return (B @ A).t()

    def forward(self, ids: Tensor) -> Tensor:
        """``ids``: any shape; the output has one dimension more."""
        base = self.base_layer
        y: Tensor = base(ids)
        if not self.in_use:
            return y
        (site,) = self.sites
        A, B = self.factors(site)
        rows = F.embedding(
            ids,
            A.t(),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
        )
        update = F.linear(rows.to(y.dtype), B.to(y.dtype)) * self.factor(site)
        scale = embed_scale(base)
        return y + (update if scale is None else update * scale).to(y.dtype)


def embedding_sites(plain: nn.Module, r: int) -> tuple[Site, ...]:
    """The one of an embedding."""
    num, dim = plain.weight.shape  # type: ignore[misc]
    return (Site("weight", "lora_A", "lora_B", (r, num), (dim, r)),)


def embed_scale(base: nn.Module) -> float | Tensor | None:
    """What a scaled embedding multiplies its rows by, in their dtype; None for a plain one."""
    scale = getattr(base, "embed_scale", None)
    return scale.to(base.weight.dtype) if isinstance(scale, Tensor) else scale  # type: ignore[arg-type]


def check_lookup(plain: nn.Module) -> None:
    """See that an embedding looks its rows up and does nothing else to them than to scale them.

    Raises:
        UnsupportedError: It does.
    """
    kind = type(plain).__name__
    if plain.max_norm is not None:
        raise UnsupportedError(
            f"an embedding with `max_norm={plain.max_norm}` changes its weight in every forward, which is frozen here: "
            "train it in full by `modules_to_save`"
        )
    if plain.sparse:
        raise UnsupportedError(
            "an embedding with `sparse=True` gives sparse gradients, which the factors of an update have not: "
            "build it with `sparse=False`"
        )
    own = type(plain).forward is not nn.Embedding.forward or "forward" in vars(plain)
    if own and not _scales(plain):
        raise UnsupportedError(
            f"{kind} is nn.Embedding by class and computes its rows in its own way: leave it out of "
            "`target_modules`, or train it in full by `modules_to_save`"
        )


def _scales(plain: nn.Module) -> bool:
    """Whether a forward of its own is ``embed_scale`` times the rows, seen by running it on one id."""
    scale, weight = embed_scale(plain), plain.weight
    if scale is None or not isinstance(weight, Tensor) or (isinstance(scale, Tensor) and scale.numel() != 1):
        return False
    if weight.is_meta:
        return True
    ids = torch.full((1, 1), weight.shape[0] - 1, device=weight.device)
    with torch.no_grad():
        got: Tensor = plain(ids)
        rows = F.embedding(ids, weight) * scale
    return got.shape == rows.shape and torch.allclose(got.float(), rows.float(), rtol=1e-2)
