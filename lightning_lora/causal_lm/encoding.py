# SPDX-License-Identifier: Apache-2.0
"""`Encoder`: examples as token ids, with a label where a token is to be learned.

::

    ids     [begin]  What  is  one  and  one  ?  Two  .  [end]
    labels   -100   -100  ...           -100     Two  .  [end]

A token is learned if it holds anything of an answer. Where a text is cut into prompt and answer is found by tokens,
not by tokenizing both apart: a tokenizer may join the last letter of one with the first of the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_lora.causal_lm.formats import Example
from lightning_lora.errors import ConfigError, DataError

#: A label that no loss looks at, as in torch and transformers.
IGNORED = -100

TooLong = Literal["cut", "drop", "error"]
Template = Literal["auto", "plain", "chat"]

Span = tuple[int, int]  # of characters: from, up to


@dataclass(frozen=True)
class Encoded:
    """Tokens of an example, or of a part of it.

    Args:
        ids: (tokens,), int32.
        labels: (tokens,), int32: the token itself where it is learned, `IGNORED` elsewhere and at the first.
        cut: Tokens that were cut off its end.
    """

    ids: Tensor
    labels: Tensor
    cut: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return int((self.labels != IGNORED).sum())


class Encoder:
    """Makes tokens of examples, as the model will see them when it is used.

    Args:
        tokenizer: One of transformers.
        max_length: Tokens that an example may have; a text is cut into as many pieces as it takes.
        mask_prompts: Whether only answers are learned; with false, every token is.
        template: "chat" renders instructions and questions by the tokenizer's chat template, "plain" by a fixed text,
            "auto" by the template where there is one. Conversations always need one; completions and texts never.
        chat_template: A template to use in place of the tokenizer's own.
        too_long: What is done with an example of more tokens: "cut" its end off, "drop" it, or "error".

    Raises:
        ConfigError: An argument has no such value, or the tokenizer lacks what is needed.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        mask_prompts: bool = True,
        template: Template = "auto",
        chat_template: str | None = None,
        too_long: TooLong = "cut",
    ) -> None:
        if not isinstance(max_length, int) or max_length < 2:
            raise ConfigError(f"`max_length` must be an integer of at least 2, got {max_length!r}")
        if template not in get_args(Template):
            raise ConfigError(f"`template` must be one of {', '.join(get_args(Template))}, got {template!r}")
        if too_long not in get_args(TooLong):
            raise ConfigError(f"`on_too_long` must be one of {', '.join(get_args(TooLong))}, got {too_long!r}")
        self.tokenizer, self.max_length, self.mask_prompts = tokenizer, max_length, mask_prompts
        self.template, self.chat_template, self.too_long = template, chat_template, too_long
        self._has_template = bool(chat_template or getattr(tokenizer, "chat_template", None))
        if template == "chat" and not self._has_template:
            raise ConfigError(f'`template="chat"`: {_NO_TEMPLATE}')
        self._begin = _begin_tokens(tokenizer)

    def encode(self, example: Example) -> list[Encoded]:
        """The tokens of an example: none if it was dropped, several for a text or where answers stand apart.

        Raises:
            DataError: The template refuses it, or it is too long and that is an error.
        """
        if example.is_text:
            return self._pieces([*self._begin, *self._tokens(example.answer), self._end(example)])
        by_template = self._has_template and (self.template != "plain" or not example.prompt)
        if example.messages and by_template:
            encoded = [self._spans(text, spans) for text, spans in self._rendered(example)]
        elif example.messages and not example.prompt:
            raise DataError(f"{example.where}: a conversation; {_NO_TEMPLATE}")
        else:
            text = example.prompt + example.answer
            ids, labels = self._spans(text, [(len(example.prompt), len(text))])
            end, begin = self._end(example), self._begin
            masked = [IGNORED if self.mask_prompts else token for token in begin]
            encoded = [([*begin, *ids, end], [*masked, *labels, end])]
        fitted = [self._fitted(ids, labels, example) for ids, labels in encoded]
        return [item for item in fitted if item is not None]

    def _rendered(self, example: Example) -> list[tuple[str, list[Span]]]:
        """A conversation as text with the spans of its answers; each answer apart where earlier ones are rewritten.

        Some templates leave out of earlier turns what they show of the last one (its reasoning): then no one text
        holds every answer as it was to be given.
        """
        messages = list(example.messages)
        whole = self._render(messages, example)
        spans, apart = [], []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            upto = self._render(messages[: number + 1], example)
            asked = self._render(messages[:number], example, prompt=True) if number else ""
            start = len(os.path.commonprefix([upto, asked]))
            spans.append((start, len(upto)))
            apart.append((upto, [(start, len(upto))]))
        return [(whole, spans)] if all(whole.startswith(text) for text, _ in apart) else apart

    def _render(self, messages: Sequence[dict[str, Any]], example: Example, prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=example.tools,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except ImportError:
            raise
        except Exception as error:  # a template raises what it likes
            raise DataError(
                f"{example.where}: the chat template refuses it: {type(error).__name__}: {error}"
            ) from error
        return text

    def _spans(self, text: str, spans: list[Span]) -> tuple[list[int], list[int]]:
        ids = self._tokens(text)
        if not self.mask_prompts:
            return ids, list(ids)
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            first = _common(self._tokens(text[:start]), ids) if start else 0
            last = len(ids) if end == len(text) else max(first, _common(self._tokens(text[:end]), ids))
            labels[first:last] = ids[first:last]
        return ids, labels

    def _fitted(self, ids: list[int], labels: list[int], example: Example) -> Encoded | None:
        cut = max(0, len(ids) - self.max_length)
        if cut and self.too_long == "error":
            raise DataError(f"{example.where}: {len(ids)} tokens, more than `max_length={self.max_length}`")
        if cut and self.too_long == "drop":
            return None
        encoded = _encoded(ids[: self.max_length], labels[: self.max_length], cut)
        return encoded if encoded.learned else None

    def _pieces(self, ids: list[int]) -> list[Encoded]:
        size = self.max_length
        pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        return [_encoded(piece, piece) for piece in pieces if len(piece) > 1]  # of one token nothing is learned

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _end(self, example: Example) -> int:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise ConfigError(
                f"{type(self.tokenizer).__name__} has no end token, so a model would never learn to stop after "
                f"{example.where}: set `tokenizer.eos_token`"
            )
        return int(end)


_NO_TEMPLATE = (
    "the tokenizer has no chat template: give `chat_template`, use an instruction-tuned model's tokenizer, or write "
    "the data as instruction / output"
)


def _encoded(ids: list[int], labels: list[int], cut: int = 0) -> Encoded:
    kept = torch.tensor(labels, dtype=torch.int32)
    kept[:1] = IGNORED  # nothing stands before it: in a packed row another example does
    return Encoded(torch.tensor(ids, dtype=torch.int32), kept, cut)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _begin_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself."""
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    return whole[: starts[0]] if starts else []
