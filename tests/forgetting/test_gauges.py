# SPDX-License-Identifier: Apache-2.0
"""Gauges against plain torch over whole tensors, and through a Trainer."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_lora import ForgettingMonitor, LoRA, disable_adapters
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, Notice
from lightning_lora.forgetting import gauges as module
from lightning_lora.forgetting.degeneration import continuations, distinct_ngrams, endless, repeated_ngrams
from lightning_lora.forgetting.gauges import (
    Gauges,
    calibration_error,
    confidence,
    gold_loglikelihood,
    on_items,
    texts_in,
    texts_of,
    tokens_of,
)
from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import LoadedTask
from lightning_lora.model.apply import apply_lora
from tests.forgetting import tiny
from tests.helpers import make_trainer, random_adapters

TEXTS = ["the old house sleeps and the river runs of stone and sun and moon", "a red bird", "the cat sings in the sun"]


@pytest.fixture
def scorer(tokenizer: Any) -> Scorer:
    return Scorer(tiny.adapted(0.3).eval(), tokenizer)


def measured(scorer: Scorer, texts: list[str] = TEXTS, batch: Any = None) -> dict[str, float]:
    gauges = Gauges(texts)
    gauges.batch = batch
    with scorer.quietly():
        return gauges.measure(scorer, 0)


def both(scorer: Scorer, ids: list[int]) -> list[torch.Tensor]:
    """Log-probabilities of each next token by model and base, (tokens - 1, vocabulary)."""
    with torch.no_grad():
        model = scorer.module(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        with disable_adapters(scorer.module):
            return [model, scorer.module(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)]


@pytest.mark.parametrize("tokens", [1024, 10], ids=["one batch", "a batch for each text"])
def test_general_text_against_whole_tensors(
    scorer: Scorer, tokenizer: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TOKENS", tokens)
    found = measured(scorer)
    rows = [tokenizer.encode(text) for text in TEXTS]
    logs = [both(scorer, row) for row in rows]
    n_bytes = sum(len(tokenizer.decode(row[1:]).encode()) for row in rows)
    positions = sum(len(row) - 1 for row in rows)
    kl = sum(float((p.exp() * (p - q)).sum()) for q, p in logs)
    assert found["forgetting/kl_general"] == pytest.approx(kl / positions, rel=1e-4)
    for which, suffix in enumerate(("", "_base")):
        nats = -sum(
            float(pair[which].gather(1, torch.tensor(row[1:])[:, None]).sum())
            for pair, row in zip(logs, rows, strict=True)
        )
        assert found[f"forgetting/bits_per_byte{suffix}"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)


@pytest.mark.parametrize("make", [lambda ids, mask: ids, lambda ids, mask: {"input_ids": ids, "attention_mask": mask},
                                  lambda ids, mask: [{"input_ids": ids, "attention_mask": mask}, "rest"]])  # fmt: skip
def test_divergence_on_the_training_batch(scorer: Scorer, make: Any) -> None:
    ids = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    padded = not isinstance(make(ids, mask), torch.Tensor)
    if padded:
        mask[0, 5:] = 0
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    logs = [both(scorer, row) for row in rows]
    kl = sum(float((p.exp() * (p - q)).sum()) for q, p in logs) / sum(len(row) - 1 for row in rows)
    assert measured(scorer, batch=make(ids, mask))["forgetting/kl"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2], ids=["rotary", "learned positions"])
def test_padding_on_either_side_gives_the_same_divergence(tokenizer: Any, make: Any) -> None:
    """To the bit; a row of padding alone counts for nothing, and a batch longer than a forward is cut at its texts."""
    model = make()
    apply_lora(model, LoRAConfig(r=4))
    random_adapters(model, std=0.3)
    scorer = Scorer(model.eval(), tokenizer)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 300, (n,), generator=generator).tolist() for n in (9, 4, 2)]
    found = {}
    for width in (12, 100):
        for side in ("left", "right"):
            pads = [[0] * (width - len(row)) for row in rows]
            parts = zip(pads, rows, strict=True)
            ids = torch.tensor([pad + row if side == "left" else row + pad for pad, row in parts] + [[0] * width])
            mask = torch.zeros_like(ids)
            for k, row in enumerate(rows):
                mask[k, slice(width - len(row), None) if side == "left" else slice(len(row))] = 1
            found[width, side] = measured(scorer, batch={"input_ids": ids, "attention_mask": mask})["forgetting/kl"]
    logs = [both(scorer, row) for row in rows]
    kl = sum(float((p.exp() * (p - q)).sum()) for q, p in logs) / sum(len(row) - 1 for row in rows)
    for width in (12, 100):
        assert found[width, "left"] == found[width, "right"] == pytest.approx(kl, rel=1e-4)


def test_untrained_adapters_have_moved_nothing(tokenizer: Any) -> None:
    found = measured(Scorer(tiny.adapted(0.0).eval(), tokenizer), batch=torch.randint(2, 300, (2, 8)))
    assert found["forgetting/kl"] == found["forgetting/kl_general"] == 0.0
    for name in ("bits_per_byte", "repeated_4grams", "distinct_2grams", "endless"):
        assert found[f"forgetting/{name}"] == found[f"forgetting/{name}_base"]


def test_a_large_batch_is_read_in_part(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS", 20)
    ids = torch.randint(2, 300, (7, 9))
    assert measured(scorer, batch=ids)["forgetting/kl"] == measured(scorer, batch=ids[:2])["forgetting/kl"]


def test_batch_without_tokens_is_said_once(scorer: Scorer) -> None:
    gauges = Gauges(TEXTS)
    gauges.batch = (torch.rand(3, 4), torch.zeros(3))
    with pytest.warns(Notice, match="no token ids") as caught, scorer.quietly():
        found = [gauges.measure(scorer, step) for step in (1, 2)]
    assert len(caught) == 1
    assert all("forgetting/kl" not in one and "forgetting/kl_general" in one for one in found)
    assert tokens_of("text") is tokens_of([]) is tokens_of(None) is None


def test_continuations_are_greedy_and_end_with_the_end(scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = torch.randint(2, 300, (3, 6))
    with scorer.quietly():
        found = continuations(scorer, prompts, 8)
        expected = scorer.module.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 6:].tolist()
        monkeypatch.setattr(scorer.encoder, "eos", expected[0][3])
        ended = continuations(scorer, prompts, 8)
    assert found == expected
    assert ended[0] == expected[0][: expected[0].index(expected[0][3]) + 1]


def test_ngrams() -> None:
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4]]) == pytest.approx(1 / 5)
    assert repeated_ngrams([[7] * 10, list(range(10))]) == pytest.approx(6 / 14)
    assert distinct_ngrams([[1, 2, 1, 2], [1, 2]]) == pytest.approx(2 / 4)
    assert repeated_ngrams([[1, 2]]) == distinct_ngrams([[1]]) == 0.0
    assert endless([[1, 9], [1, 2], []], 9) == pytest.approx(2 / 3)
    assert endless([[1]], None) == 1.0


def item(values: tuple[float, ...], gold: int) -> ItemScore:
    margin = values[gold] - max(v for i, v in enumerate(values) if i != gold)
    return ItemScore(0, ("", ""), values, float(margin > 0), margin)


def test_calibration_and_gold_loglikelihood() -> None:
    right, wrong = item((-1.0, -2.0), 0), item((-5.0, -4.0, -3.0), 1)
    assert gold_loglikelihood(right) == -1.0
    assert gold_loglikelihood(wrong) == -4.0
    assert confidence((-1.0, -2.0)) == pytest.approx(1 / (1 + math.exp(-1)))
    assert calibration_error([0.95, 0.93, 0.25], [1, 0, 0]) == pytest.approx((abs(1 - 0.95 - 0.93) + 0.25) / 3)
    assert calibration_error([1.0, 1.0], [1, 1]) == 0.0
    found = on_items({"a": [right], "b": [wrong]}, {"a": [right], "b": [right]})
    assert found["forgetting/gold_loglikelihood"] == -2.5
    assert found["forgetting/gold_loglikelihood_base"] == -1.0
    diverged = ItemScore(0, ("", ""), (math.nan, math.nan), 0.0, math.nan)
    assert on_items({"a": [diverged]}, {"a": [right]}).keys() == {
        f"forgetting/{name}_base" for name in ("gold_loglikelihood", "confidence", "calibration_error")
    }


def test_general_text_is_the_tasks_own_or_files(loaded: dict[str, LoadedTask], tmp_path: Path) -> None:
    texts = texts_of(loaded, 6)
    docs = list(loaded["alpha"].task.eval_docs)[:3]
    assert texts[:3] == [f"{doc['context']} {doc['choices'][doc['gold']]}" for doc in docs]
    assert len(texts) == 6
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "empty.txt").write_text("\n")
    assert texts_in([str(tmp_path / "a.txt"), str(tmp_path / "empty.txt")]) == ["one", "two"]
    with pytest.raises(ConfigError, match="cannot be read"):
        texts_in(str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="no line of text"):
        texts_in(str(tmp_path / "empty.txt"))


def test_training_is_the_same_bits_and_gauges_are_logged(task_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    digests, keys = {}, set()
    for on in (False, True):
        L.seed_everything(1)
        student = tiny.Student(dropout=0.1)
        general = tmp_path / "general.txt"
        general.write_text("\n".join(TEXTS * 2))
        monitor = ForgettingMonitor(
            str(task_folder / "alpha.yaml"), tokenizer, every_n_steps=2, items_per_eval=8, gauges=on,
            general_text=str(general),
        )  # fmt: skip
        make_trainer(tmp_path, [LoRA(r=4, lora_dropout=0.1), monitor], max_steps=5).fit(student, tiny.loader())
        bits = (t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for t in student.state_dict().values())
        digests[on] = hashlib.md5(b"".join(bits)).hexdigest()
        keys = set(monitor.history[-1].gauges) - keys
    assert digests[True] == digests[False]
    names = ("bits_per_byte", "repeated_4grams", "distinct_2grams", "endless")
    assert keys >= {"forgetting/kl", "forgetting/kl_general"}
    assert {f"forgetting/{n}{s}" for n in names for s in ("", "_base")} <= keys
    first, *later = (report.gauges for report in monitor.history)
    assert "forgetting/kl" not in first
    assert first["forgetting/kl_general"] == 0.0
    assert all(found["forgetting/kl"] > 0 and found["forgetting/kl_general"] > 0 for found in later)
    assert monitor.history[-1].metrics()["forgetting/kl"] == later[-1]["forgetting/kl"]
