# SPDX-License-Identifier: Apache-2.0
"""Scores are those of `lm_eval.simple_evaluate` with `HFLM`, item by item, whatever the shape of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import load_tasks
from tests.forgetting import tiny

#: Configuration class -> what makes it tiny. A window shorter than most prompts is among them.
SHAPES: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "Qwen3Config": {"head_dim": 16, "num_key_value_heads": 1},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "GPTNeoXConfig": {"rotary_pct": 0.5},
    "GemmaConfig": {"head_dim": 16, "num_key_value_heads": 1},
    "Gemma2Config": {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 24},
    "Gemma3TextConfig": {"head_dim": 16, "num_key_value_heads": 1, "sliding_window": 24},
    "MistralConfig": {"num_key_value_heads": 1, "sliding_window": 24},
}
COMMON = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.2,
}  # fmt: skip


def folder_of(shape: str, path: Path, bos: bool = False) -> Path:
    """A random tiny model and its tokenizer, saved as people have them."""
    import transformers

    torch.manual_seed(0)
    common = {
        k: v for k, v in COMMON.items() if shape != "GPT2Config" or not k.startswith(("hid", "num", "int", "max"))
    }
    config = getattr(transformers, shape)(**common, **SHAPES[shape])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny.tokenizer(bos).save_pretrained(path)
    return path


def load(path: Path) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def harness(path: Path, tasks: Path, names: list[str], **kwargs: Any) -> dict[str, Any]:
    """What lm-eval's own front door and its own wrapper of transformers models give."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=8),
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **kwargs,
    )


def same(own: dict[str, list[ItemScore]], theirs: dict[str, Any]) -> None:
    for name, scores in own.items():
        samples = sorted(theirs["samples"][name], key=lambda s: s["doc_id"])
        for score, sample in zip(scores, samples, strict=True):
            assert score.loglikelihoods == pytest.approx([r[0] for r in sample["filtered_resps"]], abs=1e-4)
            assert (score.key, score.correct) == ((sample["doc_hash"], sample["prompt_hash"]), sample["acc"])
        accuracy = sum(s.correct for s in scores) / len(scores)
        assert accuracy == pytest.approx(theirs["results"][name]["acc,none"])


WINDOWED = [shape for shape, changes in SHAPES.items() if "sliding_window" in changes]
CASES = [(shape, shots) for shape in SHAPES if shape not in WINDOWED for shots in (0, 2)]
CASES += [("Gemma2Config", 0), ("Gemma3TextConfig", 2), ("MistralConfig", 2)]


@pytest.mark.parametrize(("shape", "shots"), CASES, ids=lambda case: str(case))
def test_scores_are_simple_evaluates(
    shape: str, shots: int, task_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(shape, tmp_path, bos=shape == "LlamaConfig" and shots > 0)
    tasks = load_tasks([task_folder / "alpha.yaml", task_folder / "beta.yaml"], num_fewshot=shots or None)
    everything = {name: list(range(task.n_docs)) for name, task in tasks.items()}
    model, tokenizer = load(folder)
    monkeypatch.chdir(task_folder)  # the harness reads relative data files from the working folder
    theirs = harness(folder, task_folder, list(tasks), num_fewshot=shots or None)
    computed = []
    for share in (True, False):
        scorer = Scorer(model, tokenizer, share_context=share, batch_tokens=2000)
        tokens: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(
            lambda m, args, tokens=tokens: tokens.append(args[0].numel())
        )
        with scorer.quietly():
            same(scorer.score(tasks, everything), theirs)
        computed.append(sum(tokens))
    if shape not in WINDOWED:  # there, longer prompts are not shared
        assert computed[0] < 0.8 * computed[1], "what the choices share was computed for each of them"
