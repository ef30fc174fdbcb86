# SPDX-License-Identifier: Apache-2.0
r"""Scoring: a model in training as a language model that lm-eval can ask, which leaves no trace in it.

.. math:: \log p(choice \mid context) = \sum_t \log p(x_t \mid x_{<t})

over the tokens of the choice. What choices share, the context, is computed once (`trees`). Batches are made from the
sorted inputs alone, so that base and model see the same ones, and so does one process or many: rank r computes
batches r, r + W, r + 2W ..., all ranks the same number of them (a sharded model's forward needs every rank), and every
rank gets every result.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_lora.bars import Bar, no_bar
from lightning_lora.errors import ConfigError, TaskError
from lightning_lora.forgetting import generation
from lightning_lora.forgetting.asking import Answer, Asker, Context
from lightning_lora.forgetting.base_cache import AGREES, BaseCache, cache_folder, digest_of, question
from lightning_lora.forgetting.encoding import Encoder, find_tokenizer, longest_input
from lightning_lora.forgetting.forward import find_forward
from lightning_lora.forgetting.identity import base_identity
from lightning_lora.forgetting.language_model import Pair, as_lm, check_chat
from lightning_lora.forgetting.tasks import LoadedTask, without_bars
from lightning_lora.forgetting.trees import Row, Tree, make_batches, plant
from lightning_lora.model.apply import disable_adapters
from lightning_lora.model.inner import hf_models
from lightning_lora.model.sharding import is_fully_sharded, needs_every_rank
from lightning_lora.model.slots import adapter_modules
from lightning_lora.ranks import gather, in_step, rank_and_world, together
from lightning_lora.rng import preserve_rng

log = logging.getLogger(__name__)

T = TypeVar("T")

Asked = Mapping[Row, list[tuple[int, ...]]]  # continuations of each input

# So many inputs are asked again before a file of the base's answers is believed.
_CHECKED = 8


@dataclass(frozen=True)
class ItemScore:
    """What one model says about one document.

    Args:
        doc_id: place of the document in its task.
        key: hashes of the document and of its prompt; equal keys are the same question.
        loglikelihoods: of each choice [nats].
        correct: 1.0 if the likeliest choice is a right one, else 0.0.
        margin: log-likelihood of the best right choice less that of the best wrong one [nats].
        gold: indices of the right choices, ascending.
        group: what documents about one thing (a passage) have in common, where the task says which field that is.
    """

    doc_id: int
    key: tuple[str, str]
    loglikelihoods: tuple[float, ...]
    correct: float
    margin: float
    gold: tuple[int, ...] = ()
    group: str | None = None


class Scorer:
    """Scores documents with the model as it stands.

    Args:
        module: the model, or the LightningModule around it.
        tokenizer: folder, name or object; None for ``module.tokenizer``.
        forward: how token ids [batch, tokens] become logits [batch, tokens, vocabulary]; see `find_forward`.
        batch_tokens: tokens in a batch, padding included; a longer input makes a batch of its own.
        context: gives a context in which each forward runs, such as autocast as training uses it.
        share_context: compute what inputs have in common at their beginning once, where the model can (`trees`).
        apply_chat_template: ask through the tokenizer's chat template; a name where it has several.
        system_instruction: a text before each prompt, with a chat template the system's turn.
        fewshot_as_multiturn: with a chat template, whether few-shot examples are turns of their own.
        base_cache: folder in which the base's answers are kept for later runs; None for what the environment
            variable `LIGHTNING_LORA_BASE_CACHE` says, and without it they are not kept.
        bar: shows how many batches are done.

    Raises:
        ConfigError: for values that do not fit.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        forward: Callable[..., Any] | str | None = None,
        batch_tokens: int = 8192,
        context: Context = contextlib.nullcontext,
        share_context: bool = True,
        apply_chat_template: bool | str = False,
        system_instruction: str | None = None,
        fewshot_as_multiturn: bool = True,
        base_cache: str | Path | None = None,
        bar: Bar = no_bar,
    ) -> None:
        if batch_tokens < 1:
            raise ConfigError(f"`batch_tokens` must be 1 or more: got {batch_tokens}.")
        self.module = module
        self.batch_tokens = batch_tokens
        self.context = context
        self.bar = bar
        self.forward = find_forward(module, forward)
        self.encoder = Encoder(find_tokenizer(tokenizer, module))
        check_chat(self.encoder.tokenizer, apply_chat_template)
        models: list[Any] = [model for _, model in hf_models(module)]
        self._model = models[0] if len(models) == 1 else None
        self.max_length = longest_input(getattr(self._model, "config", None), self.encoder.tokenizer)
        self._embedding = None if self._model is None else self._model.get_input_embeddings()
        self._asker = Asker(module, self.forward, context)
        self._shares: bool | None = None if share_context and self.forward.takes_trees else False
        self._prompts = {
            "apply_chat_template": apply_chat_template,
            "system_instruction": system_instruction,
            "fewshot_as_multiturn": fewshot_as_multiturn,
        }
        self._given_forward = forward
        self._cache_folder = cache_folder(base_cache)
        self._cache: BaseCache | None = None
        self._in_base = self._recalls = False
        #: The scorer as lm-eval's language model, for `lm_eval.evaluate`; ask it inside `quietly`.
        self.lm = as_lm(self, apply_chat_template if isinstance(apply_chat_template, str) else None)

    @property
    def exact(self) -> bool:
        """False after a pass whose logits came in 16 bits: then scores depend on what shared a batch."""
        return self._asker.exact

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
        apart = needs_every_rank(self.module)
        with without_bars(), in_step("score", TaskError) if apart else contextlib.nullcontext():
            results = evaluate(
                lm=self.lm,
                task_dict={"tasks": {name: tasks[name].task for name in chosen}},
                samples=samples or None,
                bootstrap_iters=0,
                log_samples=True,
                confirm_run_unsafe_code=True,  # `load_tasks` let none in that was not named
                **self._prompts,
            )
        return {name: _item_scores(tasks[name], results["samples"][name]) for name in chosen}

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the adapters are off, and answers may come from the file of earlier runs.

        While no adapter has been trained they never do: then base and model are compared to be one, bit for bit.
        """
        fresh = untrained(self.module)
        self._in_base, self._recalls = True, not fresh
        try:
            with disable_adapters(self.module):
                yield
        finally:
            self._in_base = self._recalls = False
            if self._cache is not None:
                self._cache.save()

    def loglikelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would give.

        Pairs that need the same input (single-token choices after one context) share its forward, and inputs that
        begin alike share that.

        Args:
            pairs: contexts and continuations; neither may be empty.

        Raises:
            TaskError: for a continuation longer than the model's input.
        """
        if not pairs:
            return []
        uses: dict[Row, dict[tuple[int, ...], list[int]]] = {}
        for index, pair in enumerate(pairs):
            uses.setdefault(self._input(pair), {}).setdefault(tuple(pair.continuation), []).append(index)
        self._refuse_foreign_tokens(max(max(row) for row in uses))
        found: dict[int, Answer] = {}
        if self._shares is None:
            self._shares = self._together(self._can_share)[0]
        answers = self._answers({row: list(asked) for row, asked in uses.items()})
        for row, asked in uses.items():
            for continuation, answer in zip(asked, answers[row], strict=True):
                found.update(dict.fromkeys(asked[continuation], answer))
        return [found[index] for index in range(len(pairs))]

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int = 256, stop: Sequence[str] = (), **options: Any
    ) -> list[str]:
        """What the model writes after each prompt, cut before the first of the texts ``stop``; greedy by default.

        Args:
            prompts: texts; one that is too long for the model loses its beginning.
            max_new_tokens: the most to write after each.
            stop: texts that end a continuation.
            options: further arguments of the model's ``generate``.

        Raises:
            TaskError: if there is no model that generates, or it has no room for so many tokens.
            UnsupportedError: if the model is spread over processes.
        """
        generation.can_generate(self.module, self._model)
        room = self.max_length - max_new_tokens
        if room < 1:
            raise TaskError(
                f"{max_new_tokens} new tokens are asked for, and the model takes {self.max_length} with the prompt. "
                f"Lower the task's `max_gen_toks`."
            )
        encoder = self.encoder
        ids = [encoder.encode(prompt)[-room:] for prompt in prompts]
        batches = generation.batches_of_prompts(ids, max_new_tokens, self.batch_tokens)
        rank, world = self._share()
        own: dict[int, str] = {}
        with together("write text", TaskError):
            for batch in batches[rank::world]:
                with self.context():
                    written = generation.continue_prompts(
                        self._model, encoder.tokenizer, [ids[i] for i in batch], max_new_tokens, stop, encoder.eos,
                        options,
                    )  # fmt: skip
                own.update((i, generation.cut(encoder.decode(t), stop)) for i, t in zip(batch, written, strict=True))
        merged = {index: text for part in gather(own) for index, text in part.items()}
        return [merged[index] for index in range(len(prompts))]

    def _answers(self, asked: Asked) -> dict[Row, list[Answer]]:
        """Answers to every continuation of every input."""
        batches = self._plan(list(asked))
        if not self._in_base or self._cache_folder is None:
            return self._compute(batches, asked)
        if self._cache is None:
            settings = {"shares": self._shares, "exact": self.exact}
            identity = base_identity(self.module, self._given_forward, self.context, **settings)
            self._cache = BaseCache(self._cache_folder, identity)
            self._cache.take(self._together(self._cache.read)[0])
        return self._remembered(self._cache, batches, asked)

    def _remembered(self, cache: BaseCache, batches: list[list[Tree]], asked: Asked) -> dict[Row, list[Answer]]:
        """Answers of the base, from its file where that has them; a few are asked again before it is believed."""
        keys = {
            row: [question(row, continuation, mark) for continuation in asked[row]]
            for batch in batches
            for mark in ["" if self.exact else digest_of([[tree.tokens, tree.depths] for tree in batch])]
            for tree in batch
            for row in tree.rows
        }
        known = cache.answers if self._recalls else {}
        held = {row: [known[key] for key in own] for row, own in keys.items() if all(key in known for key in own)}
        checked = set() if cache.trusted else set(sorted(held)[:_CHECKED])
        if self.exact:
            again = self._plan([row for row in asked if row not in held or row in checked])
        else:  # all of a batch or nothing
            of_batch = [{row for tree in batch for row in tree.rows} for batch in batches]
            again = [b for b, rows in zip(batches, of_batch, strict=True) if not rows <= held.keys() or rows & checked]
        kind = self.exact
        found = self._compute(again, asked) if again else {}
        twice = [(x, y) for row in found.keys() & held.keys() for x, y in zip(found[row], held[row], strict=True)]
        difference = max((abs(x[0] - y[0]) for x, y in twice), default=0.0)
        if difference > AGREES[kind]:
            cache.distrust(difference)
            return self._remembered(cache, batches, asked)
        cache.trusted |= bool(twice)
        if self.exact is kind:
            cache.add({k: a for row, own in found.items() for k, a in zip(keys[row], own, strict=True)})
        return {**held, **found}

    def _compute(self, batches: list[list[Tree]], asked: Asked) -> dict[Row, list[Answer]]:
        """This rank's share of the batches, and what the others found in theirs."""
        rank, world = self._share()

        def work() -> dict[Row, list[Answer]]:
            own: dict[Row, list[Answer]] = {}
            turns = -(-len(batches) // world)
            with self.bar("base" if self._in_base else "model", turns) as advance:
                for turn in range(turns):
                    number = turn * world + rank
                    batch = batches[min(number, len(batches) - 1)]
                    found = iter(self._asker.ask(batch, asked))
                    if number < len(batches):
                        own.update({row: [next(found) for _ in asked[row]] for tree in batch for row in tree.rows})
                    advance(1)
            return own

        parts = self._together(work)
        return {row: answers for part in (parts if world > 1 else parts[:1]) for row, answers in part.items()}

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What every rank makes of ``work``, or on all of them the error of one."""
        with self.as_one("compute log-likelihoods"):
            own = work()
        return gather(own)

    def as_one(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A block of a rank's own work with the model; what fails on one rank ends it on all of them with that error.

        Args:
            what: What the block does, for the text of the error. It sends nothing to other ranks by itself.
        """
        # Where a forward waits for all ranks, one that failed has nobody to tell before they have given up on it.
        return (in_step if needs_every_rank(self.module) else together)(what, TaskError)

    def _share(self) -> tuple[int, int]:
        """Which batches are this rank's: number r, r + W, ... Where tensors are cut, all ranks take every batch."""
        meshes = {p.device_mesh.ndim for p in self.module.parameters() if hasattr(p, "device_mesh")}
        return rank_and_world() if not meshes or (meshes == {1} and is_fully_sharded(self.module)) else (0, 1)

    def _can_share(self) -> bool:
        """Whether inputs may share what they begin with: asked of the model itself."""
        size = getattr(self._embedding, "num_embeddings", 0)
        if self.max_length < 16 or size < 2:
            return False
        agree, difference = self._asker.trees_agree(size, min(self.max_length, 64))
        if not agree:
            log.info(
                "%s does not take texts that share their beginning (answers differ by %.2g nats): each is computed "
                "alone.",
                type(self._model).__name__,
                difference,
            )
        return agree

    def _plan(self, rows: Sequence[Row]) -> list[list[Tree]]:
        """Batches of inputs, which depend on nothing but them."""
        planted = plant(rows, self.forward.window) if self._shares else [Tree.of(row) for row in rows]
        return make_batches(planted, self.batch_tokens)

    def _input(self, pair: Pair) -> Row:
        """The model's input: everything but the last token, cut from the left where it is too long."""
        if not pair.context:
            raise TaskError(
                "A context has no tokens: the tokenizer gives none for it. Give it a text that is not blank."
            )
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


def untrained(model: nn.Module) -> bool:
    """Whether the adapters are as they began, on every rank: of a sharded one each rank sees its own piece.

    Every rank takes part.

    Args:
        model: a model with adapters; without any it is what it was trained to be.
    """
    adapters = [adapter for _, adapter in adapter_modules(model)]
    return all(gather(bool(adapters) and all(adapter.untrained() for adapter in adapters)))


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
        group = task.group(sample["doc"])
        scores.append(ItemScore(sample["doc_id"], key, values, correct, margin, tuple(sorted(gold)), group))
    return scores
