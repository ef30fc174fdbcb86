# SPDX-License-Identifier: Apache-2.0
"""Encoding: exactly the answers have labels, by whatever template, and nothing is lost but what is said to be cut."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora.causal_lm.encoding import IGNORED, Encoded, Encoder
from lightning_lora.causal_lm.formats import read_examples
from lightning_lora.errors import ConfigError, DataError
from small_base.data import load_tokenizer

TOKENIZER = load_tokenizer()
END = TOKENIZER.eos_token
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
#: Shows the reasoning of the last turn only, as Qwen 3's does.
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}"
    "{{ m['content'] }}</{{ m['role'] }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encode(record: dict[str, Any], max_length: int = 256, **arguments: Any) -> list[Encoded]:
    (example,) = read_examples([record]).examples
    return Encoder(TOKENIZER, max_length, **arguments).encode(example)


def learned(encoded: Encoded) -> str:
    assert all(label in (IGNORED, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    return TOKENIZER.decode(encoded.ids[encoded.labels != IGNORED].tolist())


def whole(encoded: Encoded) -> str:
    return TOKENIZER.decode(encoded.ids.tolist())


def talk(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_answers_and_the_end_are_learned() -> None:
    for record, answer in [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "2"),
        ({"question": "1 + 1?", "answer": "two"}, " two"),
        ({"prompt": "One and one are", "completion": " two."}, " two."),
    ]:
        (encoded,) = encode(record)
        assert learned(encoded) == answer + END
        assert encoded.cut == 0
        (everything,) = encode(record, mask_prompts=False)
        assert (everything.labels[1:] == everything.ids[1:]).all()


@settings(max_examples=40)
@given(st.text(), st.text(min_size=1).filter(str.strip))
def test_no_letter_of_an_answer_is_left_out(prompt: str, completion: str) -> None:
    """Whatever the tokenizer joins across the border."""
    record = {"prompt": f"Q: {prompt}", "completion": completion}
    (encoded,) = encode(record, max_length=4096)
    assert whole(encoded) == record["prompt"] + completion + END
    learns = (encoded.labels != IGNORED).tolist()
    assert learns == sorted(learns), "what is learned stands at the end"
    asked = TOKENIZER.decode(encoded.ids[encoded.labels == IGNORED].tolist()).rstrip("\ufffd")  # half a letter
    assert record["prompt"].startswith(asked)


def test_template_of_a_conversation() -> None:
    (encoded,) = encode(talk("hi", "ho", "and?", "so"), chat_template=TEMPLATE)
    assert (
        whole(encoded) == "<user>hi</user>\n<assistant>ho</assistant>\n<user>and?</user>\n<assistant>so</assistant>\n"
    )
    assert learned(encoded) == "ho</assistant>\nso</assistant>\n"
    (encoded,) = encode({"question": "hi", "answer": "ho"}, chat_template=TEMPLATE)
    assert learned(encoded) == "ho</assistant>\n"
    (encoded,) = encode({"question": "hi", "answer": "ho"}, chat_template=TEMPLATE, template="plain")
    assert learned(encoded) == " ho" + END


def test_answers_stand_apart_where_the_template_rewrites_them() -> None:
    first, second = encode(talk("hi", "ho", "and?", "so"), chat_template=FORGETFUL)
    assert learned(first) == "(thinks)ho</assistant>"
    assert whole(second) == "<user>hi</user><assistant>ho</assistant><user>and?</user><assistant>(thinks)so</assistant>"
    assert learned(second) == "(thinks)so</assistant>"


def test_conversation_without_a_template_is_refused() -> None:
    with pytest.raises(DataError, match="record 1: a conversation; the tokenizer has no chat template"):
        encode(talk("hi", "ho"))
    with pytest.raises(ConfigError, match="has no chat template"):
        Encoder(TOKENIZER, 8, template="chat")
    with pytest.raises(DataError, match="record 1: the chat template refuses it"):
        encode(talk("hi", "ho"), chat_template="{{ raise_exception('no') }}")


def test_example_longer_than_the_context() -> None:
    record = {"prompt": "One and one are", "completion": " two" * 40}
    (full,) = encode(record)
    (cut,) = encode(record, max_length=20)
    assert (len(cut), cut.cut) == (20, len(full) - 20)
    assert cut.ids.tolist() == full.ids[:20].tolist()
    assert encode(record, max_length=20, too_long="drop") == []
    assert encode({"prompt": "One " * 40, "completion": " two"}, max_length=20) == []  # no answer is left
    with pytest.raises(DataError, match=f"record 1: {len(full)} tokens, more than `max_length=20`"):
        encode(record, max_length=20, too_long="error")


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(1, 60))
def test_text_is_cut_into_pieces_and_loses_no_token(max_length: int, words: int) -> None:
    pieces = encode({"text": " word" * words}, max_length=max_length)
    ids = [token for piece in pieces for token in piece.ids.tolist()]
    expected = [*TOKENIZER(" word" * words)["input_ids"], TOKENIZER.eos_token_id]
    lost = len(expected) % max_length == 1  # a last piece of one token teaches nothing
    assert ids == expected[: len(expected) - lost]
    assert all((piece.labels[1:] == piece.ids[1:]).all() and piece.labels[0] == IGNORED for piece in pieces)


def test_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = load_tokenizer()
    tokenizer.eos_token = None
    (example,) = read_examples([{"prompt": "a", "completion": "b"}]).examples
    with pytest.raises(ConfigError, match=r"has no end token.*record 1"):
        Encoder(tokenizer, 8).encode(example)


class Beginning:
    """A tokenizer that puts a token before every text, as Llama's does."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}


def test_beginning_is_the_tokenizers_own() -> None:
    (example,) = read_examples([{"prompt": "a", "completion": "b"}]).examples
    (encoded,) = Encoder(Beginning(), 8).encode(example)
    assert encoded.ids.tolist() == [1, 97, 98, 0]
    assert encoded.labels.tolist() == [IGNORED, IGNORED, 98, 0]


@pytest.mark.parametrize(
    ("argument", "value"), [("max_length", 1), ("template", "html"), ("too_long", "keep"), ("max_length", None)]
)
def test_wrong_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="must be"):
        Encoder(TOKENIZER, **{"max_length": 8, argument: value})
