# SPDX-License-Identifier: Apache-2.0
"""The small base: its size, its loading without a network, its benchmark, its split."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from small_base import corpus, data, items, score

LEAST_ITEMS = {"speech_continuation": 1500, "word_order": 500, "function_words": 500}
CHANCE = 0.25


def read_items(name: str, folder: Path = data.TASKS_DIR) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def known_text() -> str:
    return items.one_line(" ".join(corpus.split_speeches()[0].values()))


def test_sizes_of_weights_and_text() -> None:
    assert (data.MODEL_DIR / "model.safetensors").stat().st_size <= 8_000_000
    assert folder_bytes(corpus.TEXT_DIR) <= 4_500_000


def test_loads_with_plain_transformers_offline() -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer('My fellow citizens', return_tensors='pt').input_ids\n"
        "print(type(model).__name__, model.dtype, ids.shape[1], model(ids).logits.isfinite().all().item())\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(data.MODEL_DIR)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["LlamaForCausalLM", "torch.bfloat16", "4", "True"]


def test_model_and_tokenizer_agree() -> None:
    model, tokenizer = data.load_model(), data.load_tokenizer()
    parameters = sum(p.numel() for p in model.parameters())
    assert 1_000_000 <= parameters <= 3_000_000
    assert model.config.hidden_size % 64 == 0
    assert model.config.intermediate_size % 64 == 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.bos_token_id
    assert tokenizer.pad_token_id == model.config.pad_token_id != tokenizer.eos_token_id


def test_tokenizer_round_trips_any_text_and_adds_nothing() -> None:
    tokenizer = data.load_tokenizer()
    for text in (
        "We the People , of the  United States.\n\nO Romeo!",
        " caf\u00e9 \u2014 \u4e2d\u6587",
        corpus.shakespeare("validation")[:500],
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_token_id, tokenizer.pad_token_id} & set(ids)


@pytest.mark.parametrize("name", data.TASK_NAMES)
def test_task_is_well_formed(name: str) -> None:
    config = yaml.safe_load((data.TASKS_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config["task"] == name
    assert [metric["metric"] for metric in config["metric_list"]] == ["acc"]
    assert config["dataset_kwargs"]["data_files"] == {"test": f"{name}.jsonl"}
    made = read_items(name)
    assert len(made) >= LEAST_ITEMS[name]
    for one in made:
        assert len(set(one["choices"])) == 4
        assert 0 <= one["gold"] < 4
        assert one["context"] == one["context"].strip()
        assert all(choice == choice.strip() for choice in one["choices"])
    golds = Counter(one["gold"] for one in made)
    assert all(0.2 < golds[place] / len(made) < 0.3 for place in range(4))


@pytest.mark.parametrize("name", data.TASK_NAMES)
def test_items_are_short_and_split_cleanly_between_context_and_choice(name: str) -> None:
    tokenizer = data.load_tokenizer()
    for one in read_items(name)[:200]:
        before = tokenizer(one["context"])["input_ids"]
        assert len(before) <= 60
        for choice in one["choices"]:
            after = tokenizer(" " + choice)["input_ids"]
            assert tokenizer(f"{one['context']} {choice}")["input_ids"] == before + after


def test_held_out_speeches_are_whole_and_apart(known_text: str) -> None:
    training, held_out = corpus.split_speeches()
    assert not set(training) & set(held_out)
    assert {**training, **held_out} == corpus.speeches()
    for words in items.fresh_speeches().values():
        for sentence in corpus.sentences(" ".join(words)):
            if len(sentence.split()) >= items.SHORTEST_SENTENCE:
                assert sentence not in known_text


@pytest.mark.parametrize("name", data.TASK_NAMES)
def test_true_answers_were_never_trained_on(name: str, known_text: str) -> None:
    held_out = set(corpus.split_speeches()[1])
    for one in read_items(name):
        assert one["speech"] in held_out
        assert f"{one['context']} {one['choices'][one['gold']]}" not in known_text


def test_making_the_tasks_again_gives_the_same_files(tmp_path: Path) -> None:
    counts = items.write_tasks(tmp_path)
    assert set(counts) == set(data.TASK_NAMES)
    for name in data.TASK_NAMES:
        assert len(read_items(name)) == counts[name]
        for end in ("yaml", "jsonl"):
            assert (tmp_path / f"{name}.{end}").read_bytes() == (data.TASKS_DIR / f"{name}.{end}").read_bytes()


def test_function_words_cannot_be_told_by_frequency() -> None:
    true = Counter(one["choices"][one["gold"]].split()[0] for one in read_items("function_words"))
    assert set(true) == {word for words in items.WORD_SETS for word in words}
    assert len(set(true.values())) == 1


def test_base_beats_chance_by_fifteen_points_on_each_task() -> None:
    rng = random.Random(7)
    samples = {name: sorted(rng.sample(range(len(read_items(name))), 200)) for name in data.TASK_NAMES}
    right = score.evaluate(data.load_model(), data.load_tokenizer(), samples)
    assert {name: len(rows) for name, rows in right.items()} == dict.fromkeys(data.TASK_NAMES, 200)
    accuracy = {name: sum(rows) / len(rows) for name, rows in right.items()}
    assert min(accuracy.values()) >= CHANCE + 0.15, accuracy


def test_shakespeare_blocks() -> None:
    tokenizer = data.load_tokenizer()
    train, validation = (data.shakespeare_blocks(tokenizer, 64, split) for split in ("train", "validation"))
    assert train.shape[1] == validation.shape[1] == 64
    assert train.dtype == torch.int64
    assert len(train) > 5 * len(validation) > 0
    assert corpus.shakespeare("train").startswith(tokenizer.decode(train[0]))
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        data.shakespeare_blocks(tokenizer, 64, "test")
