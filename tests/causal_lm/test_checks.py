# SPDX-License-Identifier: Apache-2.0
"""What is said of the data: each problem where it is, and none where there is none."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.causal_lm.checks import DataReport, classes_of, look_at, oversampled
from lightning_lora.causal_lm.encoding import Encoder
from lightning_lora.causal_lm.formats import Example, read_examples
from small_base.data import load_tokenizer


def classified(*counts: int) -> list[Example]:
    """Examples of as many classes as counts."""
    rows = [{"question": f"{label} {i}?", "answer": f"c{label}"} for label, n in enumerate(counts) for i in range(n)]
    return read_examples(rows).examples


def report(examples: list[Example], max_length: int = 64, **arguments: Any) -> DataReport:
    encoder = Encoder(load_tokenizer(), max_length, too_long="cut")
    return look_at(examples, [encoder.encode(example) for example in examples], **arguments)


def free(n: int) -> list[Example]:
    return read_examples([{"prompt": f"{i}", "completion": f" {i} and so on"} for i in range(n)]).examples


def test_nothing_to_say_of_good_data() -> None:
    assert report(free(1000)).problems() == []
    assert report(classified(250, 250)).problems() == []


def test_nine_tenths_of_one_class_are_said() -> None:
    seen = report(classified(450, 50))
    (said,) = seen.problems()
    assert "450 of 500 answers (90%) are 'c0'" in said
    assert "`oversample`" in said
    assert seen.classes == {"c0": 450, "c1": 50}
    assert seen.to_dict()["largest_class"] == 0.9
    assert "2 different answers" in str(seen)


def test_free_answers_are_no_classes() -> None:
    assert classes_of(free(200)) == {}
    assert classes_of(read_examples([{"text": "the same"}] * 20).examples) == {}
    assert report(free(20)).largest_class == 0.0


def test_few_examples_are_said() -> None:
    assert report(free(999)).problems() == [
        "999 examples are few: gather 1000 or more, or expect it to learn them by heart"
    ]
    assert "gather 500" in report(classified(40, 40)).problems()[0]


def test_duplicates_and_what_validation_has_too() -> None:
    examples = free(1000)
    (twice,) = report([*examples, *examples[:3]]).problems()
    assert twice.startswith("3 examples stand in the data more than once")
    assert report([*examples, *examples[:3]], dropped_duplicates=True).problems() == []
    (both,) = report(examples, validation=examples[:7]).problems()
    assert both.startswith("7 training examples are in the validation too")


def test_cut_examples_are_said_with_the_length_that_holds_them() -> None:
    long = read_examples([{"prompt": "a", "completion": " word" * 40}] * 5).examples
    assert report([*free(1000), *long], max_length=30).cut == 5
    many = report([*free(1000), *(e for e in long for _ in range(10))], max_length=30, dropped_duplicates=True)
    (said,) = many.problems()
    assert said.startswith("50 examples (5%) lost their end")
    assert f"`max_length={many.longest}` would hold 99 % whole" in said
    assert report(free(1000), max_length=2, malformed=2).problems()[-1] == "2 malformed records were passed over"


def test_left_out_examples_are_said() -> None:
    seen = report([*free(1000), *read_examples([{"prompt": "word " * 90, "completion": "b"}]).examples])
    assert (seen.examples, seen.dropped) == (1000, 1)
    assert seen.problems() == ["1 examples were left out: too long for `max_length`, or no answer within it"]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.floats(0.05, 1.0))
def test_oversampling_keeps_all_and_fills_up_rare_classes(counts: list[int], share: float) -> None:
    examples = classified(*counts)
    chosen = oversampled(examples, share)
    assert chosen[: len(examples)] == list(range(len(examples)))
    if classes_of(examples):
        got = Counter(examples[i].answer for i in chosen)
        assert min(got.values()) >= share * max(counts)
        assert max(got.values()) == max(counts)
    else:
        assert len(chosen) == len(examples)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_oversampling_leaves_free_answers_alone(share: float) -> None:
    assert oversampled(free(50), share) == list(range(50))
