# SPDX-License-Identifier: Apache-2.0
"""Degeneration: does the model still write text, or does it repeat itself and find no end?

Greedy continuations of fixed prompts, by model and base. What is counted is the text alone, so no label is needed;
a tuned model may write shorter or longer than its base for good reasons: a gauge, by which nothing is decided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_lora.forgetting.scoring import Scorer


def continuations(scorer: Scorer, prompts: Tensor, new: int) -> list[list[int]]:
    """What the model writes after each prompt, the likeliest token each time.

    Any model that gives logits does; nothing is cached, so it is for a few short texts. Every rank computes as many
    forwards, whatever is written.

    Args:
        scorer: the model. Call it inside `Scorer.quietly`.
        prompts: (prompts, tokens), all of one length.
        new: tokens to write.

    Returns:
        Tokens after each prompt, up to and with the end-of-sequence token where it comes.
    """
    ids = prompts
    for _ in range(new):
        with scorer.context():
            logits = scorer.forward(ids, 1)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    written = ids[:, prompts.shape[1] :].tolist()
    end = scorer.encoder.eos
    return [row[: row.index(end) + 1] if end in row else row for row in written]


def repeated_ngrams(texts: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams that stood in their text before, over all texts; 0 where no text is as long as n.

    Args:
        texts: as tokens.
        n: tokens in an n-gram.
    """
    grams = [[tuple(text[i : i + n]) for i in range(len(text) - n + 1)] for text in texts]
    total = sum(map(len, grams))
    return (total - sum(len(set(text)) for text in grams)) / total if total else 0.0


def distinct_ngrams(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Distinct n-grams of all texts together, as a share of their n-grams; 0 where no text is as long as n.

    Args:
        texts: as tokens.
        n: tokens in an n-gram.
    """
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def endless(texts: Sequence[Sequence[int]], end: int | None) -> float:
    """Share of texts that did not come to an end.

    Args:
        texts: as tokens.
        end: the end-of-sequence token; None where there is none.
    """
    return sum(not text or text[-1] != end for text in texts) / len(texts)
