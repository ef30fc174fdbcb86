# SPDX-License-Identifier: Apache-2.0
r"""Gauges: what moves as a model is tuned, whether or not it forgets; each beside the base's, none a test.

.. math::
    KL = \frac{1}{N} \sum_n KL(p_{base} \,\|\, p), \qquad
    bits\ per\ byte = -\frac{\sum_n \log_2 p(x_n \mid x_{<n})}{bytes}, \qquad
    ECE = \sum_b \frac{n_b}{n} \, |acc_b - conf_b|

Log-likelihood and KL move from the first step on, also where no answer changes; soft accuracy and McNemar's test
judge, and these say how far and in which way the model went.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.degeneration import continuations, distinct_ngrams, endless, repeated_ngrams
from lightning_lora.forgetting.divergence import PIECE, kl_sum
from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import LoadedTask
from lightning_lora.model.apply import disable_adapters
from lightning_lora.ranks import gather, notice

#: Tokens of the training batch, and of general text at a time, whose logits are in memory twice.
TOKENS = 1024
#: Texts that are read, and at most so many tokens of each.
TEXTS, TEXT_TOKENS = 32, 256
#: Prompts that are continued, their length, and what is written after each [tokens].
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 16, 32
#: Equal stretches of confidence in the calibration error.
BINS = 10


@dataclass(frozen=True)
class Text:
    """General text as tokens, and how many bytes the tokens after the first stand for."""

    ids: list[int]
    n_bytes: int


class Gauges:
    """Measures the gauges of one run at its looks.

    Logged for the model, and with ``_base`` at the end for its base:

    | key | unit | meaning |
    |---|---|---|
    | ``forgetting/kl`` | nats/token | KL(base, model) on the newest training batch; none before the first |
    | ``forgetting/kl_general`` | nats/token | the same on general text |
    | ``forgetting/bits_per_byte`` | bits/byte | of general text |
    | ``forgetting/repeated_4grams`` | share | of greedy continuations' 4-grams, those that came before |
    | ``forgetting/distinct_2grams`` | share | distinct 2-grams among those of all continuations |
    | ``forgetting/endless`` | share | continuations without an end |

    Args:
        texts: general text: fixed for the run, so that looks can be compared.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = [text for text in texts if text.strip()][:TEXTS]
        #: The newest training batch, whatever it is made of; only token ids in it are read.
        self.batch: Any = None
        self._encoded: list[Text] | None = None
        self._written_by_base: list[list[int]] | None = None
        self._said = False

    def measure(self, scorer: Scorer, step: int) -> dict[str, float]:
        """The gauges now. Call it inside `Scorer.quietly`; every rank takes part.

        Args:
            scorer: the model.
            step: optimizer steps taken.
        """
        found = self._on_batch(scorer)
        with scorer.as_one("measure the gauges on general text"):
            if self._encoded is None:
                self._encoded = [t for t in (_encoded(scorer, text) for text in self.texts) if len(t.ids) > 1]
            if self._encoded:
                found |= on_text(scorer, self._encoded)
                found |= self._degeneration(scorer)
        return found

    def _on_batch(self, scorer: Scorer) -> dict[str, float]:
        if self.batch is None:
            return {}
        found = tokens_of(self.batch)
        everywhere = all(gather(found is not None))
        if found is None or not everywhere:
            if not self._said:
                notice(
                    f"Forgetting: no token ids (batch, tokens) in a training batch of {type(self.batch).__name__}, so "
                    f"`forgetting/kl` is not measured; it is where the batch is a tensor of ids or holds `input_ids`."
                )
            self._said = True
            return {}
        ids, mask = _fitting(_from_the_left(*found), min(scorer.max_length, TOKENS))
        with scorer.as_one("measure the KL to the base"):
            own = divergence_on(scorer, ids, mask)
        total, positions = (sum(part) for part in zip(*gather(own), strict=True))
        return {"forgetting/kl": total / max(positions, 1)}

    def _degeneration(self, scorer: Scorer) -> dict[str, float]:
        long_enough = [t.ids for t in self._encoded or [] if len(t.ids) >= PROMPT_TOKENS]
        if not long_enough or scorer.max_length < PROMPT_TOKENS + NEW_TOKENS:
            return {}
        prompts = _on_device(scorer, [ids[:PROMPT_TOKENS] for ids in long_enough[:PROMPTS]])
        if self._written_by_base is None:
            with disable_adapters(scorer.module):
                self._written_by_base = continuations(scorer, prompts, NEW_TOKENS)
        found = {}
        for suffix, texts in (("", continuations(scorer, prompts, NEW_TOKENS)), ("_base", self._written_by_base)):
            found[f"forgetting/repeated_4grams{suffix}"] = repeated_ngrams(texts, 4)
            found[f"forgetting/distinct_2grams{suffix}"] = distinct_ngrams(texts, 2)
            found[f"forgetting/endless{suffix}"] = endless(texts, scorer.encoder.eos)
        return found


def divergence_on(scorer: Scorer, ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """KL(base || model) summed over the positions of some rows, and how many these are [nats].

    Args:
        scorer: the model. Call it inside `Scorer.quietly`.
        ids: (rows, tokens).
        mask: which tokens are no padding, of the same shape; a position counts where the next token does.
    """
    model, base = _logits(scorer, ids)
    keep = torch.zeros_like(mask)
    keep[:, :-1] = mask[:, 1:]
    return float(kl_sum(model.flatten(0, 1), base.flatten(0, 1), keep.flatten())), int(keep.sum())


def on_text(scorer: Scorer, texts: Sequence[Text]) -> dict[str, float]:
    """KL and bits per byte on general text.

    Args:
        scorer: the model. Call it inside `Scorer.quietly`.
        texts: at least one, none without a second token.
    """
    divergence, nats, nats_base, positions = 0.0, 0.0, 0.0, 0
    for rows in _batches([text.ids for text in texts], TOKENS):
        width = len(rows[0])
        ids = _on_device(scorer, [[*row, *[0] * (width - len(row))] for row in rows])  # causal: padding is not seen
        keep = _on_device(scorer, [[i < len(row) - 1 for i in range(width)] for row in rows]).flatten()
        targets = ids.roll(-1, dims=1).flatten()[keep]
        model, base = (logits.flatten(0, 1)[keep] for logits in _logits(scorer, ids))
        nats -= loglikelihood(model, targets)
        nats_base -= loglikelihood(base, targets)
        divergence += float(kl_sum(model, base))
        positions += len(targets)
    bits = math.log(2) * max(sum(text.n_bytes for text in texts), 1)
    return {
        "forgetting/kl_general": divergence / positions,
        "forgetting/bits_per_byte": nats / bits,
        "forgetting/bits_per_byte_base": nats_base / bits,
    }


def on_items(model: Mapping[str, Sequence[ItemScore]], base: Mapping[str, Sequence[ItemScore]]) -> dict[str, float]:
    """Gold log-likelihood and calibration of the items of a look, for the model and, as ``_base``, its base.

    | key | unit | meaning |
    |---|---|---|
    | ``forgetting/gold_loglikelihood`` | nats/item | of the best right choice |
    | ``forgetting/confidence`` | share | probability of the likeliest choice among the choices, mean |
    | ``forgetting/calibration_error`` | share | expected calibration error; biased upwards for few items |

    Args:
        model: the model's scores by task.
        base: the base's, of the same items.
    """
    found = {}
    for suffix, scores in (("", model), ("_base", base)):
        items = [s for task in scores.values() for s in task if not math.isnan(s.margin)]
        if not items:
            continue
        sure = [confidence(s.loglikelihoods) for s in items]
        found[f"forgetting/gold_loglikelihood{suffix}"] = sum(map(gold_loglikelihood, items)) / len(items)
        found[f"forgetting/confidence{suffix}"] = sum(sure) / len(sure)
        found[f"forgetting/calibration_error{suffix}"] = calibration_error(sure, [s.correct for s in items])
    return found


def gold_loglikelihood(score: ItemScore) -> float:
    """Log-likelihood of the best right choice [nats]: the likeliest one's, less the margin where that is wrong."""
    return max(score.loglikelihoods) + min(score.margin, 0.0)


def confidence(loglikelihoods: Sequence[float]) -> float:
    """Probability of the likeliest choice, the choices being all there is.

    Args:
        loglikelihoods: of each choice [nats].
    """
    most = max(loglikelihoods)
    return 1.0 / sum(math.exp(x - most) for x in loglikelihoods)


def calibration_error(confidences: Sequence[float], correct: Sequence[float], bins: int = BINS) -> float:
    """Expected calibration error: how far accuracy lies from confidence, over equal stretches of confidence.

    Args:
        confidences: of each answer, in [0, 1].
        correct: 1 where it was right, else 0.
        bins: how many stretches.
    """
    gaps = [0.0] * bins
    for sure, right in zip(confidences, correct, strict=True):
        gaps[min(int(sure * bins), bins - 1)] += right - sure
    return sum(map(abs, gaps)) / len(confidences)


def loglikelihood(logits: Tensor, targets: Tensor) -> float:
    """Log-likelihood of tokens, in float32 piece by piece [nats].

    Args:
        logits: (positions, vocabulary).
        targets: (positions,).
    """
    rows = max(1, PIECE // logits.shape[-1])
    parts = zip(logits.split(rows), targets.split(rows), strict=True)
    return sum(float(part.float().log_softmax(-1).gather(1, wanted[:, None]).sum()) for part, wanted in parts)


def tokens_of(batch: Any) -> tuple[Tensor, Tensor] | None:
    """Token ids (rows, tokens) in a training batch and which of them are no padding; None where there are none.

    Args:
        batch: a tensor of ids, a mapping with ``input_ids``, or a sequence that begins with either.
    """
    mask = None
    if isinstance(batch, Mapping):
        batch, mask = batch.get("input_ids"), batch.get("attention_mask")
    elif isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        return tokens_of(batch[0])
    if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.is_floating_point() or batch.is_complex():
        return None
    fits = isinstance(mask, Tensor) and mask.shape == batch.shape
    return batch, mask != 0 if fits and isinstance(mask, Tensor) else torch.ones_like(batch, dtype=torch.bool)


def texts_in(files: str | Sequence[str]) -> list[str]:
    """General text in files, a text a line; of several files alike many.

    Args:
        files: one path or several.

    Raises:
        ConfigError: A file cannot be read, or none of them holds a line of text.
    """
    found = []
    paths = [files] if isinstance(files, str) else list(files)
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"`general_text` names {path!r}, which cannot be read: {error}.") from error
        found += [line for line in lines if line.strip()][: -(-TEXTS // len(paths))]
    if not found:
        raise ConfigError(f"`general_text` holds no line of text: {paths}.")
    return found


def texts_of(tasks: Mapping[str, LoadedTask], n: int = TEXTS) -> list[str]:
    """General text out of the tasks themselves: questions with their right answers, the first of each task.

    Args:
        tasks: loaded tasks.
        n: texts over all tasks.
    """
    found = []
    for name in tasks:
        loaded, each = tasks[name], -(-n // len(tasks))
        task = loaded.task
        for doc in list(task.eval_docs)[:each]:
            gold = loaded.gold(doc, task.doc_to_target(doc))
            choices = task.doc_to_choice(doc)
            text = task.doc_to_text(doc)
            if gold and isinstance(text, str):
                found.append(f"{text}{task.config.target_delimiter}{choices[min(gold)]}")
    return found[:n]


def _logits(scorer: Scorer, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The model's and its base's, at every position."""
    with scorer.context():
        model = scorer.forward(ids, ids.shape[1])
        with disable_adapters(scorer.module):
            base = scorer.forward(ids, ids.shape[1])
    return model, base


def _encoded(scorer: Scorer, text: str) -> Text:
    ids = scorer.encoder.encode(text)[: min(TEXT_TOKENS, scorer.max_length)]
    decode: Callable[..., str] = scorer.encoder.tokenizer.decode
    return Text(ids, len(decode(ids[1:]).encode()))


def _batches(rows: Sequence[list[int]], tokens: int) -> list[list[list[int]]]:
    """Rows in batches of at most so many tokens, padding included, or of one row; the longest first in each."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _from_the_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A batch and its mask with each row's padding at its end.

    There a causal model does not see it, whatever the model's function takes beside ids; a text that begins after
    padding would be read with it, and at other positions than in training.
    """
    before = torch.where(mask.any(dim=1), mask.int().argmax(dim=1), 0)
    places = (torch.arange(ids.shape[1], device=ids.device) + before[:, None]) % ids.shape[1]
    return ids.gather(1, places), mask.gather(1, places)


def _fitting(found: tuple[Tensor, Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The first rows and tokens of a batch and its mask: one forward of at most so many tokens."""
    ids, mask = (x[:, :most] for x in found)
    rows = max(1, TOKENS // ids.shape[1])
    return ids[:rows], mask[:rows]


def _on_device(scorer: Scorer, ids: Any) -> Tensor:
    device = next((p.device for p in scorer.module.parameters()), torch.device("cpu"))
    return torch.tensor(ids, device=device)
