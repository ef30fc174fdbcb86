# SPDX-License-Identifier: Apache-2.0
r"""Trees: texts that begin alike, computed in one row of a batch, what they share only once.

Four choices after one context, or the items of a task after the same few-shot examples::

    rows    C C C a a      tree        C C C a a b b b     sees   C: the C before it
            C C C b b b    depth       0 1 2 3 4 3 4 5            a: C C C and the a before it
                                                                  b: C C C and the b before it

A token's position is its depth, and it sees its ancestors and itself: what a causal model computes of it is what it
computes of it in its own text, since attention is a sum over what is seen and everything else acts on one token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Row = tuple[int, ...]

#: A tree may always grow to this length [tokens], and to twice its longest text beyond it: the cost of attention grows
#: with the square of the length, whether a pair of tokens see each other or not.
ROOMY = 512

#: The least share of a text that it must have in common with another one to stand in its tree.
WORTH_SHARING = 0.25


@dataclass
class Tree:
    """Texts that begin alike.

    Args:
        tokens: of all texts, each text's own after those that it shares.
        depths: how many tokens come before each in its own text.
        rows: the texts.
        paths: where each text's tokens stand in ``tokens``.
        branches: of each text after the first: where its own tokens begin and end, and how many it shares with the
            one before it.
    """

    tokens: list[int]
    depths: list[int]
    rows: list[Row]
    paths: list[list[int]]
    branches: list[tuple[int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, row: Row) -> Tree:
        """A tree of one text."""
        places = list(range(len(row)))
        return cls(list(row), list(places), [row], [places])

    def add(self, row: Row, shared: int) -> None:
        """Put a text in.

        Args:
            row: the text.
            shared: how many tokens it has in common with the text that came last, from the first on.
        """
        start = len(self.tokens)
        self.tokens += row[shared:]
        self.depths += range(shared, len(row))
        self.rows.append(row)
        self.paths.append(self.paths[-1][:shared] + list(range(start, len(self.tokens))))
        self.branches.append((start, len(self.tokens), shared))

    def __len__(self) -> int:
        return len(self.tokens)


def plant(rows: Sequence[Row], longest: int | None = None) -> list[Tree]:
    """Put texts that begin alike into trees.

    Args:
        rows: distinct texts; their order does not matter.
        longest: of a tree [tokens]; None for no limit but the general one. A text that is longer stands alone.
    """
    trees: list[Tree] = []
    before: Row = ()
    for row in sorted(rows):
        shared = _in_common(before, row)
        tree = trees[-1] if trees else None
        if tree is not None and _worth_it(tree, row, shared, longest):
            tree.add(row, shared)
        else:
            trees.append(Tree.of(row))
        before = row
    return trees


def make_batches(trees: Sequence[Tree], batch_tokens: int) -> list[list[Tree]]:
    """Trees in batches of at most ``batch_tokens`` tokens, padding included, the longest first.

    Args:
        trees: their order does not matter.
        batch_tokens: tokens in a batch; a tree longer than this makes one of its own.
    """
    batches: list[list[Tree]] = []
    for tree in sorted(trees, key=lambda tree: (-len(tree), tree.tokens, tree.depths)):
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(tree)
    return batches


def sees(trees: Sequence[Tree], width: int) -> Tensor:
    """Which tokens see which in a batch of trees, filled up to the right [trees, width, width].

    Padding sees itself alone, so that no row of attention is empty.

    Args:
        trees: a batch.
        width: of the batch [tokens].
    """
    causal = torch.ones(width, width, dtype=torch.bool).tril_()
    mask = torch.zeros(len(trees), width, width, dtype=torch.bool)
    for number, tree in enumerate(trees):
        own = mask[number]
        trunk = len(tree.rows[0])
        own[:trunk, :trunk] = causal[:trunk, :trunk]
        for (start, end, shared), path in zip(tree.branches, tree.paths[1:], strict=True):
            own[start:end, path[:shared]] = True
            own[start:end, start:end] = causal[: end - start, : end - start]
        own[range(len(tree), width), range(len(tree), width)] = True
    return mask


def _in_common(one: Row, other: Row) -> int:
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    low = 0  # [:low] is equal, [:most] is not
    while most - low > 1:
        middle = (low + most) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            most = middle
    return low


def _worth_it(tree: Tree, row: Row, shared: int, longest: int | None) -> bool:
    length = len(tree) + len(row) - shared
    most = max(ROOMY, 2 * max(len(row), max(map(len, tree.rows))))
    return shared >= WORTH_SHARING * len(row) and length <= (most if longest is None else min(most, longest))
