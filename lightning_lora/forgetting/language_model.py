# SPDX-License-Identifier: Apache-2.0
"""The scorer as a language model that lm-eval can ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_lora.errors import ConfigError, TaskError

#: New tokens where a generation task says nothing, as lm-eval's own wrapper of transformers models has it.
DEFAULT_NEW_TOKENS = 256


class Pair(NamedTuple):
    """A context and a continuation of it, as tokens."""

    context: list[int]
    continuation: list[int]


def as_lm(scorer: Any, template: str | None = None) -> Any:
    """A scorer as lm-eval's `TemplateLM`. It reports one rank: the scorer shares out the batches itself.

    Args:
        scorer: has ``encoder``, ``max_length``, ``loglikelihoods`` and ``generate``; see `Scorer`.
        template: name of the chat template, for tokenizers with several.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

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

        @property
        def tokenizer_name(self) -> str:
            return str(getattr(scorer.encoder.tokenizer, "name_or_path", "")).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return scorer.encoder.encode(string, add_special_tokens)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return scorer.encoder.chat(chat_history, add_generation_prompt, template)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihoods([Pair(context, choice) for _, context, choice in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
            windows = [
                [Pair(*make_disjoint_window(window)) for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=scorer.max_length, context_len=1,
                )]
                for request in requests
            ]  # fmt: skip
            answers = iter(scorer.loglikelihoods([pair for pairs in windows for pair in pairs]))
            return [sum(next(answers)[0] for _ in pairs) for pairs in windows]

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
            wishes = [_wish(request.args[1]) for request in requests]
            found: list[str] = [""] * len(requests)
            for wish in {repr(w): w for w in wishes}.values():  # one kind of generation after the other
                where = [i for i, own in enumerate(wishes) if own == wish]
                texts = scorer.generate([requests[i].args[0] for i in where], **wish)
                for i, text in zip(where, texts, strict=True):
                    found[i] = text
            return found

    return ScorerLM()


def _wish(given: dict[str, Any]) -> dict[str, Any]:
    """A task's ``generation_kwargs`` as arguments of `Scorer.generate`."""
    options = dict(given)
    until = options.pop("until", None) or []
    length = next((options.pop(n) for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if n in options), None)
    temperature = options.get("temperature")
    if not options.setdefault("do_sample", bool(temperature)):
        options.pop("temperature", None)
    return {
        "max_new_tokens": DEFAULT_NEW_TOKENS if length is None else int(length),
        "stop": [until] if isinstance(until, str) else list(until),
        **options,
    }


def check_chat(tokenizer: Any, wanted: bool | str) -> None:
    """Refuse a chat template that a tokenizer has not.

    Args:
        tokenizer: the user's.
        wanted: ``apply_chat_template``.

    Raises:
        ConfigError: when there is none, or none of that name.
    """
    has = getattr(tokenizer, "chat_template", None)
    if not wanted:
        return
    if not has or not callable(getattr(tokenizer, "apply_chat_template", None)):
        raise ConfigError(
            f"`apply_chat_template`={wanted!r}, but the tokenizer ({type(tokenizer).__name__}) has no chat template. "
            f"Set its `chat_template`, or leave `apply_chat_template` out: a base model is asked without one."
        )
    if isinstance(wanted, str) and isinstance(has, dict) and wanted not in has:
        raise ConfigError(f"`apply_chat_template`={wanted!r}: the tokenizer's templates are {_names(has)}.")


def _names(templates: Sequence[str] | dict[str, str]) -> str:
    return ", ".join(sorted(templates))
