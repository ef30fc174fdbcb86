# SPDX-License-Identifier: Apache-2.0
r"""Scoring: a model in training as a language model that lm-eval can ask, which leaves no trace in it.

.. math:: \log p(choice \mid context) = \sum_t \log p(x_t \mid x_{<t})

over the tokens of the choice. Batches are made from the sorted inputs alone, so that base and model see the
same ones, and so does one process or many: rank r computes batches r, r + W, r + 2W ..., all ranks the same
number of them (a sharded model's forward needs every rank), and every rank gets every result.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_lora.errors import ConfigError, TaskError
from lightning_lora.forgetting.encoding import Encoder, find_tokenizer, longest_input
from lightning_lora.forgetting.forward import find_forward
from lightning_lora.forgetting.tasks import LoadedTask, without_bars
from lightning_lora.model.inner import hf_models
from lightning_lora.ranks import gather, rank_and_world, together
from lightning_lora.rng import preserve_rng

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Pair(NamedTuple):
    """A context and a continuation of it, as tokens."""

    context: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class ItemScore:
    """What one model says about one document.

    Args:
        doc_id: place of the document in its task.
        key: hashes of the document and of its prompt; equal keys are the same question.
        loglikelihoods: of each choice [nats].
        correct: 1.0 if the likeliest choice is a right one, else 0.0.
        margin: log-likelihood of the best right choice less that of the best wrong one [nats].
    """

    doc_id: int
    key: tuple[str, str]
    loglikelihoods: tuple[float, ...]
    correct: float
    margin: float


class Scorer:
    """Scores documents with the model as it stands.

    Args:
        module: the model, or the LightningModule around it.
        tokenizer: folder, name or object; None for ``module.tokenizer``.
        forward: how token ids [batch, tokens] become logits [batch, tokens, vocabulary]; see `find_forward`.
        batch_tokens: tokens in a batch, padding included; a longer input makes a batch of its own.
        context: gives a context in which each forward runs, such as autocast as training uses it.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        forward: Callable[..., Any] | str | None = None,
        batch_tokens: int = 8192,
        context: Context = contextlib.nullcontext,
    ) -> None:
        if batch_tokens < 1:
            raise ConfigError(f"`batch_tokens` must be 1 or more: got {batch_tokens}.")
        self.module = module
        self.batch_tokens = batch_tokens
        self.context = context
        self.forward = find_forward(module, forward)
        self.encoder = Encoder(find_tokenizer(tokenizer, module))
        models = [model for _, model in hf_models(module)]
        model: Any = models[0] if len(models) == 1 else None
        self.max_length = longest_input(getattr(model, "config", None), self.encoder.tokenizer)
        self._embedding = None if model is None else model.get_input_embeddings()
        #: False after a pass whose logits came in 16 bits: then scores depend on what shared a batch.
        self.exact = True
        self._lm = _as_lm(self)

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """Inside, the model evaluates; after, it trains on as though nothing had been, on exceptions too.

        Kept are the random states, every module's own train flag and the grad mode. The tokenizer is a copy.
        """
        modes = [(child, child.training) for child in self.module.modules()]
        with preserve_rng(), torch.no_grad():
            try:
                self.module.eval()
                yield
            finally:
                for child, mode in modes:
                    child.training = mode
                self.encoder.forget()

    def score(self, tasks: Mapping[str, LoadedTask], picked: Mapping[str, Sequence[int]]) -> dict[str, list[ItemScore]]:
        """Ask the model about documents, through `lm_eval.evaluate`. Call it inside `quietly`.

        Args:
            tasks: the loaded tasks.
            picked: documents by task, ascending; a task without any is left out.

        Returns:
            Scores by task, in the order of the documents. A document whose label names none of its choices
            is left out: nobody can be right about it.

        Raises:
            TaskError: for an input that the model cannot take.
        """
        from lm_eval.evaluator import evaluate

        chosen = {name: sorted(ids) for name, ids in picked.items() if len(ids)}
        for name, ids in chosen.items():
            tasks[name].choose(ids)
        samples = {name: ids for name, ids in chosen.items() if len(ids) < tasks[name].n_docs}
        with without_bars():
            results = evaluate(
                lm=self._lm,
                task_dict={"tasks": {name: tasks[name].task for name in chosen}},
                samples=samples or None,
                bootstrap_iters=0,
                log_samples=True,
            )
        return {name: _item_scores(tasks[name], results["samples"][name]) for name in chosen}

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would give.

        Pairs that need the same input (single-token choices after one context) share its forward.

        Args:
            pairs: contexts and continuations; neither may be empty.

        Raises:
            TaskError: for a continuation longer than the model's input.
        """
        uses: dict[tuple[int, ...], list[int]] = {}
        for index, pair in enumerate(pairs):
            uses.setdefault(self._input(pair), []).append(index)
        self._refuse_foreign_tokens(max(max(row) for row in uses))
        batches = make_batches(list(uses), self.batch_tokens)
        rank, world = rank_and_world()
        own: dict[int, tuple[float, bool]] = {}
        with together("compute log-likelihoods", TaskError):
            for turn in range(-(-len(batches) // world)):
                number = turn * world + rank
                rows = batches[min(number, len(batches) - 1)]
                found = self._run(rows, [[pairs[i].continuation for i in uses[row]] for row in rows])
                if number < len(batches):
                    own.update(zip((i for row in rows for i in uses[row]), found, strict=True))
        merged = {index: answer for part in gather(own) for index, answer in part.items()}
        return [merged[index] for index in range(len(pairs))]

    def _input(self, pair: Pair) -> tuple[int, ...]:
        """The model's input: everything but the last token, cut from the left where it is too long."""
        if not pair.continuation or len(pair.continuation) > self.max_length:
            raise TaskError(
                f"A choice of {len(pair.continuation)} tokens cannot be scored: the model takes 1 to "
                f"{self.max_length}. Leave the task out, or give a tokenizer that fits the model."
            )
        return tuple((pair.context + pair.continuation)[-(self.max_length + 1) :][:-1])

    def _refuse_foreign_tokens(self, largest: int) -> None:
        known = getattr(self._embedding, "num_embeddings", None)
        if known is not None and largest >= known:
            raise ConfigError(
                f"`tokenizer` gave the token {largest}, but the model's embedding has {known} rows. Give the tokenizer "
                f"that the model was trained with."
            )

    def _run(
        self, rows: Sequence[tuple[int, ...]], continuations: Sequence[Sequence[list[int]]]
    ) -> list[tuple[float, bool]]:
        """One forward: the answers for every continuation of every row, in order."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        width = max(len(row) for row in rows)
        # Padding stands to the right, where a causal model's scored tokens cannot see it.
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        scored_from = min(len(row) - len(c) for row, many in zip(rows, continuations, strict=True) for c in many)
        with self.context():
            logits = self.forward(ids, width - scored_from)
        skipped = width - logits.shape[1] if logits.ndim == 3 else -1
        if skipped not in (0, scored_from) or len(logits) != len(ids):
            raise ConfigError(
                f"`forward` must give logits [batch, tokens, vocabulary]: for ids of shape {tuple(ids.shape)} it "
                f"gave {tuple(logits.shape)}."
            )
        self.exact = logits.dtype in (torch.float32, torch.float64)
        where, targets, lengths = [], [], []
        for number, (row, many) in enumerate(zip(rows, continuations, strict=True)):
            for tokens in many:
                where += [(number, position) for position in range(len(row) - len(tokens), len(row))]
                targets += tokens
                lengths.append(len(tokens))
        index = torch.tensor(where, device=device)
        wanted = torch.tensor(targets, device=device)
        scored = logits[index[:, 0], index[:, 1] - skipped].float().log_softmax(-1)
        values = scored.gather(1, wanted[:, None])[:, 0].cpu()
        greedy = (scored.argmax(-1) == wanted).cpu()
        parts = zip(values.split(lengths), greedy.split(lengths), strict=True)
        return [(float(value.sum()), bool(hit.all())) for value, hit in parts]


def make_batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> list[list[tuple[int, ...]]]:
    """Inputs in batches of at most ``batch_tokens`` tokens, padding included, the longest first.

    Args:
        rows: inputs, as tokens. Their order does not matter.
        batch_tokens: tokens in a batch; a row longer than this makes one of its own.
    """
    batches: list[list[tuple[int, ...]]] = []
    for row in sorted(rows, key=lambda row: (-len(row), row)):
        if not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    return batches


def _item_scores(task: LoadedTask, samples: Sequence[Mapping[str, Any]]) -> list[ItemScore]:
    scores = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        gold = task.gold(sample["doc"], sample["target"])
        n = len(task.task.doc_to_choice(sample["doc"]))
        values = tuple(float(answer[0]) for answer in sample["filtered_resps"][:n])
        wrong = [v for i, v in enumerate(values) if i not in gold]
        if not gold or not wrong:
            continue
        correct, margin = 0.0, math.nan  # a diverged model is right about nothing
        if not any(map(math.isnan, values)):
            correct = float(max(range(n), key=values.__getitem__) in gold)
            margin = max(values[i] for i in gold) - max(wrong)
        key = (sample["doc_hash"], sample["prompt_hash"])
        scores.append(ItemScore(sample["doc_id"], key, values, correct, margin))
    return scores


def _as_lm(scorer: Scorer) -> Any:
    """The scorer as lm-eval's `TemplateLM`. It reports one rank: the scorer shares out the batches itself."""
    from lm_eval.api.model import TemplateLM

    class ScorerLM(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return self.prefix_token_id if scorer.encoder.eos is None else scorer.encoder.eos

        @property
        def prefix_token_id(self) -> int:
            if scorer.encoder.prefix is None:
                raise TaskError(
                    "A task has an empty context, and the tokenizer has neither a beginning-of-sequence nor an "
                    "end-of-sequence token to stand for it. Set one on the tokenizer."
                )
            return scorer.encoder.prefix

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return scorer.encoder.encode(string, add_special_tokens)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([Pair(context, choice) for _, context, choice in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            raise TaskError("Only multiple-choice tasks are scored.")

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            raise TaskError("Only multiple-choice tasks are scored.")

    return ScorerLM()
