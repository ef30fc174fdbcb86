# SPDX-License-Identifier: Apache-2.0
"""Asking: one forward over a batch of trees, and the answers to everything that was asked of its texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.forward import Forward
from lightning_lora.forgetting.trees import Row, Tree, plant, sees

Context = Callable[[], contextlib.AbstractContextManager[Any]]

#: A log-likelihood [nats], and whether greedy decoding would have given the continuation.
Answer = tuple[float, bool]

#: What is asked after each text: continuations, of which the text holds all but the last token at its end.
Continuations = Mapping[Row, Sequence[Sequence[int]]]

# Log-probabilities are taken of so many values at once, in 32 bits: 128 MB.
_CHUNK = 2**25


class Asker:
    """Asks a model for the log-likelihoods of continuations.

    Args:
        module: the model, or the LightningModule around it.
        forward: what computes logits in it.
        context: gives a context in which each forward runs.
    """

    def __init__(self, module: nn.Module, forward: Forward, context: Context = contextlib.nullcontext) -> None:
        self.module = module
        self.forward = forward
        self.context = context
        #: False after a forward whose logits came in 16 bits: then answers depend on what shared a batch.
        self.exact = True

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def ask(self, batch: Sequence[Tree], continuations: Continuations) -> list[Answer]:
        """One forward.

        Args:
            batch: trees; those of one text each go as plain texts, which any forward takes.
            continuations: of every text in the batch, one or more.

        Returns:
            The answers: tree by tree, text by text, continuation by continuation.
        """
        where: list[tuple[int, int]] = []
        targets: list[int] = []
        lengths: list[int] = []
        for number, tree in enumerate(batch):
            for row, path in zip(tree.rows, tree.paths, strict=True):
                for tokens in continuations[row]:
                    where += [(number, place) for place in path[len(row) - len(tokens) :]]
                    targets += tokens
                    lengths.append(len(tokens))
        index = torch.tensor(where, device=self.device)
        logits, columns = self._logits(batch, index[:, 1].contiguous())
        self.exact = logits.dtype in (torch.float32, torch.float64)
        values, greedy = _log_probabilities(logits, index[:, 0], columns, torch.tensor(targets, device=self.device))
        parts = zip(values.split(lengths), greedy.split(lengths), strict=True)
        return [(float(value.sum()), bool(hit.all())) for value, hit in parts]

    def _logits(self, batch: Sequence[Tree], places: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and where in them each of ``places`` stands."""
        width = max(map(len, batch))
        # Padding stands to the right, where a causal model's scored tokens cannot see it.
        ids = torch.tensor([tree.tokens + [0] * (width - len(tree)) for tree in batch], device=self.device)
        if any(tree.branches for tree in batch):
            depths = [tree.depths + [0] * (width - len(tree)) for tree in batch]
            keep = places.unique()
            mask = sees(batch, width).to(self.device)
            with self.context():
                logits = self.forward.tree(ids, torch.tensor(depths, device=self.device), mask, keep)
            kept, columns = len(keep), torch.searchsorted(keep, places)
        else:
            first = int(places.min())
            with self.context():
                logits = self.forward(ids, width - first)
            kept, columns = width - first, places - first
        if logits.ndim != 3 or len(logits) != len(ids) or logits.shape[1] not in (width, kept):
            raise ConfigError(
                f"`forward` must give logits [batch, tokens, vocabulary]: for ids of shape {tuple(ids.shape)} it "
                f"gave {tuple(logits.shape)}."
            )
        return logits, places if logits.shape[1] == width else columns

    def trees_agree(self, vocabulary: int, longest: int) -> tuple[bool, float]:
        """Whether the model gives a text the same answer in a tree as alone.

        It does where attention alone looks at other tokens and takes a mask; recurrent layers, positions that a mask
        implies, experts with a limit on their tokens do not. The answers may differ by a few times what they differ by
        between a text alone and the text in a batch: that much is rounding.

        Args:
            vocabulary: tokens are drawn below this.
            longest: input of the model [tokens].

        Returns:
            Whether they agree, and by how much they differ at most [nats].
        """
        generator = torch.Generator().manual_seed(0)
        stem, ends = min(16, longest // 2), (min(9, longest // 3), min(5, longest // 4))
        drawn = torch.randint(vocabulary, (3 * longest,), generator=generator).tolist()
        first = tuple(drawn[: stem + ends[0]])
        rows = [first, first[: stem + 2] + tuple(drawn[longest : longest + ends[1]]), first[:stem] + first[2:5]]
        asked = {row: [[*row[1:], drawn[-1]]] for row in dict.fromkeys(rows)}
        (tree,) = plant(list(asked))
        together = self.ask([tree], asked)
        batched = self.ask([Tree.of(row) for row in tree.rows], asked)
        alone = [answer for row in tree.rows for answer in self.ask([Tree.of(row)], asked)]
        noise = max(abs(x - y) for (x, _), (y, _) in zip(batched, alone, strict=True))
        difference = max(abs(x - y) for (x, _), (y, _) in zip(together, alone, strict=True))
        return difference <= 1e-4 + 4 * noise, difference


def _log_probabilities(logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and whether it is the likeliest token; on the CPU."""
    values, greedy = [], []
    for part in torch.arange(len(targets), device=targets.device).split(max(1, _CHUNK // logits.shape[-1])):
        scored = logits[rows[part], columns[part]].float().log_softmax(-1)
        values.append(scored.gather(1, targets[part, None])[:, 0].cpu())
        greedy.append((scored.argmax(-1) == targets[part]).cpu())
    return torch.cat(values), torch.cat(greedy)
