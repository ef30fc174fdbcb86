# SPDX-License-Identifier: Apache-2.0
"""How long scoring an item takes, against lm-eval's own wrapper of transformers models (`HFLM`).

Both answer the same multiple-choice items through lm-eval's `evaluate`, on the same loaded task, in turns; HFLM with
each of its batch sizes, of which the fastest counts. Medians. The model is a random Llama with adapters on; the scores
of both are compared. Exits with 1 when a limit is missed (not with `--tiny`, whose times say nothing).

    python benchmarks/scoring.py
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from variants import SHAPES, arguments, environment

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.forgetting import Scorer, load_tasks
from lightning_lora.forgetting.tasks import LoadedTask, without_bars
from lightning_lora.model.slots import adapter_modules

VOCABULARY = 256
BATCH_SIZES = (8, 32)


class Case(NamedTuple):
    """A model, its items, and how much of HFLM's time ours may take."""

    name: str
    shape: str
    items: int
    context: int
    choice: int
    limit: float


CASES = (
    Case("hidden 512, 8 layers", "34m", 24, 240, 12, 0.5),
    Case("tiny", "tiny", 100, 240, 12, 0.8),
    Case("tiny, short items", "tiny", 300, 24, 4, 0.8),
)


def word_tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="</s>"))  # noqa: S106 - a word of the vocabulary
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="</s>")  # noqa: S106


def task_of(case: Case, folder: Path) -> dict[str, LoadedTask]:
    """Items of random words with four choices each, as a task."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(1, VOCABULARY)}" for _ in range(n))

    path = folder / f"{case.name}.jsonl"
    docs = [{"c": words(case.context), "o": [words(case.choice) for _ in range(4)], "g": 0} for _ in range(case.items)]
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    return load_tasks(
        {
            "task": "items", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "c", "doc_to_choice": "o",
            "doc_to_target": "g", "metric_list": [{"metric": "acc"}],
        }
    )  # fmt: skip


def adapted(shape: str) -> nn.Module:
    """A random Llama with adapters that do something."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape]))
    apply_lora(model, LoRAConfig(r=16))
    for _, module in adapter_modules(model):
        torch.nn.init.normal_(module.lora_B, std=0.05)  # type: ignore[arg-type]
    return model.eval()


def variants(model: nn.Module, tasks: dict[str, LoadedTask]) -> dict[str, Callable[[], list[float]]]:
    """Functions that score all items and give the log-likelihoods."""
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    tokenizer = word_tokenizer()
    everything = {name: list(range(task.n_docs)) for name, task in tasks.items()}

    def theirs(batch_size: int) -> list[float]:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        with without_bars():
            found = evaluate(lm=lm, task_dict={"tasks": {n: t.task for n, t in tasks.items()}}, bootstrap_iters=0)
        samples = sorted(found["samples"]["items"], key=lambda s: s["doc_id"])
        return [answer[0] for sample in samples for answer in sample["filtered_resps"]]

    def ours(share: bool) -> list[float]:
        scorer = Scorer(model, tokenizer, share_context=share)  # a new one: its check of the model counts too
        with scorer.quietly():
            return [value for score in scorer.score(tasks, everything)["items"] for value in score.loglikelihoods]

    return {
        **{f"`HFLM(batch_size={n})`": lambda n=n: theirs(n) for n in BATCH_SIZES},
        "ours, each choice alone": lambda: ours(False),
        "ours": lambda: ours(True),
    }  # type: ignore[dict-item]


def measure(case: Case, rounds: int, clock: Callable[[], float], folder: Path) -> dict[str, float]:
    """Median seconds of each variant, all of them once a round after one to warm up."""
    asked = variants(adapted(case.shape), task_of(case, folder))
    taken: dict[str, list[float]] = {name: [] for name in asked}
    values: dict[str, list[float]] = {}
    for index in range(rounds + 1):
        for name, variant in asked.items():
            start = clock()
            values[name] = variant()
            if index:
                taken[name].append(clock() - start)
    first, *others = values.values()
    apart = max(abs(x - y) for other in others for x, y in zip(first, other, strict=True))
    if apart > 1e-3:
        raise SystemExit(f"{case.name}: the scores differ by {apart:.2g} nats")
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def options(parser: argparse.ArgumentParser) -> None:
    """This script's arguments."""
    parser.add_argument("--rounds", type=int, default=5, help="how many times each is timed")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: process time, for a busy machine"
    )


if __name__ == "__main__":
    args = arguments(__doc__ or "", options)
    torch.set_num_threads(args.threads)
    now = time.perf_counter if args.clock == "wall" else time.process_time
    print(environment("lm_eval"))
    print("\n| model, items | scored by | ms an item | against HFLM | limit |\n|---|---|---|---|---|")
    missed = []
    with tempfile.TemporaryDirectory(prefix="lora-scoring-") as scratch:
        for case in CASES:
            if args.tiny:
                case = case._replace(shape="tiny", items=8)
            taken = measure(case, args.rounds, now, Path(scratch))
            yardstick = min(seconds for name, seconds in taken.items() if "HFLM" in name)
            title = f"{case.name}; {case.items} of {case.context} + 4 x {case.choice} tokens"
            for name, seconds in taken.items():
                ratio = f"{seconds / yardstick:.2f}"
                limit = case.limit if name == "ours" else None
                if limit is not None and seconds > limit * yardstick:
                    missed.append(f"{title}: {ratio} > {limit}")
                print(f"| {title} | {name} | {1e3 * seconds / case.items:.2f} | {ratio} | {limit or ''} |", flush=True)
    if missed and not args.tiny:
        raise SystemExit("\n".join(["limits missed:", *missed]))
