# SPDX-License-Identifier: Apache-2.0
"""As lm-eval's language model the scorer answers rolling, generation and chat requests as `HFLM` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.errors import ConfigError, TaskError
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import LoadedTask, load_tasks
from tests.forgetting import tiny
from tests.forgetting.test_hflm import same

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}{% if not loop.last or add_generation_prompt %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}" + CHAT


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def theirs(model: nn.Module, tokenizer: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=4)


def text(n: int, seed: int = 0) -> str:
    return " ".join(doc["context"] for doc in tiny.items(n, seed))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_rolling_log_likelihoods_are_theirs(kind: str) -> None:
    model, tokenizer = getattr(tiny, kind)(), tiny.tokenizer()
    asked = requests("loglikelihood_rolling", *[(text(n, n),) for n in (1, 3, 40)])  # the last one in several windows
    scorer = Scorer(model, tokenizer)
    with scorer.quietly():
        own = scorer.lm.loglikelihood_rolling(asked)
    assert own == pytest.approx(theirs(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True), abs=1e-3)


@pytest.mark.parametrize("bos", [False, True])
def test_generations_are_theirs(bos: bool) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer(bos)
    prompts = [text(1, seed) for seed in range(6)] + [text(60)]  # the last one is longer than the model takes
    kinds = [{"until": ["e"], "max_gen_toks": 12}, {"until": "\n", "max_gen_toks": 5}, {"until": [], "max_gen_toks": 3}]
    asked = requests("generate_until", *[(prompt, dict(kind)) for prompt in prompts for kind in kinds])
    scorer = Scorer(model, tokenizer, batch_tokens=60)
    state = torch.get_rng_state()
    with scorer.quietly():
        own = scorer.lm.generate_until(asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert own == theirs(model, tokenizer).generate_until(asked, disable_tqdm=True)
    assert not any("e" in found for found in own[::3])
    assert len(set(own)) > 6


def test_what_cannot_generate_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Embedding(300, 300)

    scorer = Scorer(Plain(), tiny.tokenizer(), forward="net")
    with scorer.quietly(), pytest.raises(TaskError, match="asks Plain to write text"):
        scorer.generate(["the cat"])
    scorer = Scorer(tiny.llama(), tiny.tokenizer())
    with scorer.quietly(), pytest.raises(TaskError, match="64 new tokens are asked for, and the model takes 64"):
        scorer.generate(["the cat"], max_new_tokens=64)


@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM], ids=["system", "no system"])
@pytest.mark.parametrize("multiturn", [True, False])
def test_chat_few_shot_and_system_are_simple_evaluates(
    template: str, multiturn: bool, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny.llama(), tiny.tokenizer(bos=True)
    model.config.max_position_embeddings = 512
    tokenizer.chat_template = template
    settings = {
        "apply_chat_template": True, "system_instruction": "the old house", "fewshot_as_multiturn": multiturn,
    }  # fmt: skip
    tasks = load_tasks(task_folder / "beta.yaml", num_fewshot=2)
    scorer = Scorer(model, tokenizer, **settings)
    with scorer.quietly():
        own = scorer.score(tasks, {"beta": range(20)})
    monkeypatch.chdir(task_folder)
    found = simple_evaluate(
        theirs(model, tokenizer), tasks=["beta"], num_fewshot=2, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False), **settings,
    )  # fmt: skip
    same(own, found)
    assert "assistant" in str(found["samples"]["beta"][0]["arguments"])


def test_a_chat_template_that_is_not_there_is_named(loaded: dict[str, LoadedTask]) -> None:
    with pytest.raises(ConfigError, match="`apply_chat_template`=True, but the tokenizer .* has no chat template"):
        Scorer(tiny.llama(), tiny.tokenizer(), apply_chat_template=True)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"tools": CHAT, "plain": CHAT}
    with pytest.raises(ConfigError, match="templates are plain, tools"):
        Scorer(tiny.llama(), tokenizer, apply_chat_template="other")
    scorer = Scorer(tiny.llama(), tokenizer, apply_chat_template="plain")
    with scorer.quietly():
        assert scorer.score(loaded, {"alpha": [0]})["alpha"][0].loglikelihoods
