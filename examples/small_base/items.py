# SPDX-License-Identifier: Apache-2.0
"""The general benchmark: three kinds of four-way choice, made from held-out speeches alone.

speech_continuation   ... we must strengthen our | commitment to the cause of peace  <- true
                                                 | years ago, when the Congress met
word_order            ... the strength of | a nation is its people  <- true
                                          | a nation its is people
function_words        ... depends | upon the good will  <- true
                                  | among the good will
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from small_base import corpus

Item = dict[str, Any]
SHORTEST_SENTENCE = 6
WORD_SETS = (
    ("of", "in", "to", "for"),
    ("with", "by", "on", "from"),
    ("is", "are", "was", "were"),
    ("has", "have", "be", "been"),
)


def one_line(text: str) -> str:
    """Join the words of a text by single spaces."""
    return " ".join(text.split())


@cache
def fresh_speeches() -> dict[str, list[str]]:
    """Read the held-out speeches without the sentences that a training speech says too.

    Returns:
        The words of each held-out speech, by name.
    """
    training, held_out = corpus.split_speeches()
    known = one_line(" ".join(training.values()))
    found: dict[str, list[str]] = {}
    for name, text in held_out.items():
        kept = [s for s in corpus.sentences(text) if len(s.split()) < SHORTEST_SENTENCE or s not in known]
        found[name] = " ".join(kept).split()
    return found


def word_costs() -> Callable[[list[str]], float]:
    """Count words in the training speeches.

    Returns:
        A function: words -> their summed cost in nats, were they drawn by frequency alone.
    """
    counts = Counter(one_line(" ".join(corpus.split_speeches()[0].values())).lower().split())
    total = sum(counts.values()) + len(counts)
    return lambda words: -sum(math.log((counts[word.lower()] + 1) / total) for word in words)


def item(rng: random.Random, speech: str, context: list[str], true: str, false: list[str]) -> Item:
    """Make one item, its choices in random order."""
    choices = [true, *false]
    rng.shuffle(choices)
    return {"context": " ".join(context), "choices": choices, "gold": choices.index(true), "speech": speech}


def thinned(made: Iterator[Item], most: int) -> Iterator[Item]:
    """Draw at most so many items, by seed, and keep their order."""
    every = list(made)
    rng = random.Random(f"{corpus.SEED} thinned")
    yield from (every[at] for at in sorted(rng.sample(range(len(every)), min(most, len(every)))))


def speech_continuation(context: int = 24, length: int = 6) -> Iterator[Item]:
    """True continuation of a held-out passage among three from other held-out speeches.

    The false ones are as long and, by word frequency, as likely: only the context tells them apart.

    Args:
        context: words of context.
        length: words of continuation.

    Yields:
        Items.
    """
    rng, cost = random.Random(f"{corpus.SEED} speech_continuation"), word_costs()
    windows = []
    for name, words in fresh_speeches().items():
        for start in range(0, len(words) - context - length, context + length):
            ahead = words[start + context : start + context + length]
            windows.append((name, words[start : start + context], " ".join(ahead), cost(ahead)))
    for name, before, true, value in windows:
        others = heapq.nsmallest(8, ((abs(far - value), text) for other, _, text, far in windows if other != name))
        false = list(dict.fromkeys(text for _, text in others if text != true))[:3]
        yield item(rng, name, before, true, false)


def word_order(context: int = 12, length: int = 6) -> Iterator[Item]:
    """The words that follow, in order, among three orders with two neighbours exchanged.

    Args:
        context: words of context.
        length: words of continuation; first and last keep their place.

    Yields:
        Items.
    """
    rng = random.Random(f"{corpus.SEED} word_order")
    for name, words in fresh_speeches().items():
        for start in range(0, len(words) - context - length, context + length):
            ahead = words[start + context : start + context + length]
            orders = []
            for left in range(1, length - 2):
                order = list(ahead)
                order[left], order[left + 1] = order[left + 1], order[left]
                orders.append(" ".join(order))
            true = " ".join(ahead)
            if len({true, *orders}) > 3:
                yield item(rng, name, words[start : start + context], true, rng.sample(orders, 3))


def function_words(context: int = 12, after: int = 3, each: int = 48) -> Iterator[Item]:
    """The true preposition or auxiliary verb among its three rivals, with the words that follow it.

    Each word of a set is the true one equally often: knowing which is the commonest helps nothing.

    Args:
        context: words of context.
        after: words after the chosen one.
        each: how often each word is the true one.

    Yields:
        Items, in the order of the speeches; windows do not overlap.
    """
    rng = random.Random(f"{corpus.SEED} function_words")
    places = []
    for name, words in fresh_speeches().items():
        places += [(name, words, at) for at in range(context, len(words) - after)]
    rng.shuffle(places)
    seen = Counter(words[at] for _, words, at in places)
    places.sort(key=lambda place: seen[place[1][place[2]]])  # the rare ones choose their windows first
    left = {word: each for words in WORD_SETS for word in words}
    taken: dict[str, list[tuple[int, Item]]] = {name: [] for name in fresh_speeches()}
    for name, words, at in places:
        true = words[at]
        near = any(abs(at - other) <= context + after for other, _ in taken[name])
        if near or not left.get(true):
            continue
        left[true] -= 1
        among = next(words_ for words_ in WORD_SETS if true in words_)
        said = {word: " ".join([word, *words[at + 1 : at + 1 + after]]) for word in among}
        false = [text for word, text in said.items() if word != true]
        taken[name].append((at, item(rng, name, words[at - context : at], said[true], false)))
    for rows in taken.values():
        yield from (made for _, made in sorted(rows, key=lambda row: row[0]))


MAKERS: dict[str, Callable[[], Iterator[Item]]] = {
    "speech_continuation": speech_continuation,
    "word_order": lambda: thinned(word_order(), 1000),
    "function_words": function_words,
}


def task_config(name: str) -> dict[str, Any]:
    """Describe a task as lm-eval reads it; the path of the data is relative to the YAML's folder."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def write_tasks(folder: Path) -> dict[str, int]:
    """Write every task: a YAML and its items, one JSON object a line.

    Args:
        folder: receives `<task>.yaml` and `<task>.jsonl`.

    Returns:
        Items by task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, make in MAKERS.items():
        lines = [json.dumps(made, ensure_ascii=False) for made in make()]
        config = yaml.safe_dump(task_config(name), sort_keys=False)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (folder / f"{name}.yaml").write_text(config, encoding="utf-8")
        counts[name] = len(lines)
    return counts
