# SPDX-License-Identifier: Apache-2.0
"""Scores are lm-eval's own, from one process or two, and asking leaves no trace."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, TaskError
from lightning_lora.forgetting.scoring import Pair, Scorer
from lightning_lora.forgetting.tasks import LoadedTask
from tests.forgetting import tiny


def everything(tasks: dict[str, LoadedTask]) -> dict[str, list[int]]:
    return {name: list(range(task.n_docs)) for name, task in tasks.items()}


def test_any_subset_gives_the_same_scores(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    scorer = Scorer(tiny.llama(), tokenizer, batch_tokens=100)
    with scorer.quietly():
        whole = scorer.score(loaded, everything(loaded))
        part = scorer.score(loaded, {"alpha": [2, 5, 33], "beta": []})
    assert list(part) == ["alpha"]
    assert [s.doc_id for s in part["alpha"]] == [2, 5, 33]
    for score in part["alpha"]:
        same = whole["alpha"][score.doc_id]
        assert score.key == same.key
        assert score.loglikelihoods == pytest.approx(same.loglikelihoods, abs=1e-4)


def test_long_context_is_cut_from_the_left_and_a_long_choice_refused(tokenizer: Any) -> None:
    model = tiny.llama()
    scorer = Scorer(model, tokenizer)
    assert scorer.max_length == 64
    long, choice = list(range(2, 102)), [5, 6]
    with scorer.quietly():
        ((value, _),) = scorer.loglikelihoods([Pair(long, choice)])
        logits = model(torch.tensor([(long + choice)[-65:-1]])).logits.log_softmax(-1)
        assert value == pytest.approx(float(logits[0, -2, 5] + logits[0, -1, 6]), abs=1e-4)
        with pytest.raises(TaskError, match="choice of 65 tokens"):
            scorer.loglikelihoods([Pair([1], list(range(2, 67)))])


def test_one_token_choices_share_one_forward(tokenizer: Any) -> None:
    seen = []

    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        seen.append(tuple(ids.shape))
        return module(ids).logits

    scorer = Scorer(tiny.llama(), tokenizer, forward=forward)
    with scorer.quietly():
        answers = scorer.loglikelihoods([Pair([7, 8, 9], [c]) for c in (10, 11, 12)] + [Pair([7], [8, 9, 10])])
    assert seen == [(1, 3)]
    assert answers[0][0] > answers[3][0]  # the same row, scored from its first token on


def test_quietly_leaves_no_trace_on_an_exception_either(tokenizer: Any) -> None:
    student = tiny.Student()
    student.train()
    student.net.model.layers[0].eval()  # a part that its owner keeps in eval
    modes = [m.training for m in student.modules()]
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    scorer = Scorer(student, tokenizer)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="boom"), scorer.quietly():
        assert not any(m.training for m in student.modules())
        assert not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(1)
        scorer.encoder.tokenizer.padding_side = "right"
        raise RuntimeError("boom")
    assert [m.training for m in student.modules()] == modes
    assert torch.is_grad_enabled()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", None)


def test_foreign_tokenizer_is_named(loaded: dict[str, LoadedTask]) -> None:
    model = tiny.llama()
    model.resize_token_embeddings(100)
    scorer = Scorer(model, tiny.tokenizer())
    with scorer.quietly(), pytest.raises(ConfigError, match="embedding has 100 rows"):
        scorer.score(loaded, {"alpha": [0, 1, 2]})


def test_bad_shape_of_logits_and_bad_budget_are_named(tokenizer: Any) -> None:
    scorer = Scorer(tiny.llama(), tokenizer, forward=lambda ids: torch.zeros(ids.shape))
    with scorer.quietly(), pytest.raises(ConfigError, match="gave \\(1, 1\\)"):
        scorer.loglikelihoods([Pair([5], [6])])
    with pytest.raises(ConfigError, match="`batch_tokens` must be 1 or more: got 0"):
        Scorer(tiny.llama(), tokenizer, batch_tokens=0)


def test_diverged_model_is_wrong_everywhere(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    scorer = Scorer(model, tokenizer)
    with scorer.quietly():
        scores = scorer.score(loaded, {"alpha": list(range(10))})["alpha"]
    assert len(scores) == 10
    assert not any(s.correct for s in scores)
