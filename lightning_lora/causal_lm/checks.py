# SPDX-License-Identifier: Apache-2.0
"""`DataReport`: what the data is like, and what to do about it before training on it.

The limits are what practitioners' guides say: below about 1,000 examples gather more, though 500 may do for telling
classes apart; a class that makes up nine tenths of the answers biases the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_lora.causal_lm.encoding import Encoded
from lightning_lora.causal_lm.formats import Example

FEW, FEW_CLASSIFIED = 1000, 500
IMBALANCE = 0.8  # share of one answer among few answers: said somewhat before the guides' 90 %
MANY_CUT = 0.01  # share of examples that lose their end
_CLASSES, _A_CLASS = 100, 5  # at most so many answers, each given so often on average: those are classes


@dataclass(frozen=True)
class DataReport:
    """Counts over the training examples, and what follows from them.

    Args:
        examples: How many are trained on.
        tokens: Of all of them.
        learned_tokens: Of these, how many have a label.
        longest: Tokens of the longest one before anything was cut.
        length_for_99: Tokens that hold 99 of 100 examples whole.
        cut: Examples that lost their end.
        dropped: Examples that were left out: nothing to learn fitted, or too long as `on_too_long` says.
        malformed: Records that were passed over.
        duplicates: Examples that stand in the data already.
        in_validation: Training examples that the validation has too.
        classes: Answers and how often each is given, most frequent first; empty where answers are free text.
    """

    examples: int
    tokens: int
    learned_tokens: int
    longest: int
    length_for_99: int
    cut: int = 0
    dropped: int = 0
    malformed: int = 0
    duplicates: int = 0
    in_validation: int = 0
    classes: dict[str, int] = field(default_factory=dict)

    @property
    def cut_share(self) -> float:
        """Share of examples that lost their end."""
        return self.cut / self.examples if self.examples else 0.0

    @property
    def largest_class(self) -> float:
        """Share of the most frequent answer; 0 where answers are free text."""
        return max(self.classes.values()) / sum(self.classes.values()) if self.classes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "cut_share": self.cut_share, "largest_class": self.largest_class}

    def problems(self) -> list[str]:
        """What to look at, a sentence each, with the remedy."""
        said = []
        few = FEW_CLASSIFIED if self.classes else FEW
        if self.examples < few:
            said.append(f"{self.examples} examples are few: gather {few} or more, or expect it to learn them by heart")
        if self.largest_class >= IMBALANCE:
            name, count = next(iter(self.classes.items()))
            said.append(
                f"{count} of {sum(self.classes.values())} answers ({self.largest_class:.0%}) are {name[:40]!r}: a "
                "model that always says so is nearly right. Gather others, or set `oversample`"
            )
        if self.duplicates:
            said.append(f"{self.duplicates} examples stand in the data more than once: set `drop_duplicates=True`")
        if self.in_validation:
            said.append(f"{self.in_validation} training examples are in the validation too: its loss says too little")
        if self.cut_share >= MANY_CUT:
            said.append(
                f"{self.cut} examples ({self.cut_share:.0%}) lost their end, where the answer is: "
                f"`max_length={self.length_for_99}` would hold 99 % whole"
            )
        if self.dropped:
            said.append(f"{self.dropped} examples were left out: too long for `max_length`, or no answer within it")
        if self.malformed:
            said.append(f"{self.malformed} malformed records were passed over")
        return said

    def __str__(self) -> str:
        text = (
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.learned_tokens:,} of them learned; longest "
            f"{self.longest:,}, 99 % up to {self.length_for_99:,}"
        )
        return f"{text}; {len(self.classes)} different answers" if self.classes else text


def look_at(
    examples: Sequence[Example],
    encoded: Sequence[Sequence[Encoded]],
    validation: Sequence[Example] = (),
    malformed: int = 0,
    dropped_duplicates: bool = False,
) -> DataReport:
    """The report over training examples and what was made of them.

    Args:
        examples: As read.
        encoded: Of each example its parts; none where it was dropped.
        validation: Examples that are validated on.
        malformed: Records that could not be used.
        dropped_duplicates: Whether each example stands in `examples` once by now.
    """
    kept = [parts for parts in encoded if parts]
    lengths = sorted(sum(len(part) + part.cut for part in parts) for parts in kept)
    keys = Counter(example.key for example in examples)
    held_out = {example.key for example in validation}
    return DataReport(
        examples=len(kept),
        tokens=sum(len(part) for parts in kept for part in parts),
        learned_tokens=sum(part.learned for parts in kept for part in parts),
        longest=lengths[-1] if lengths else 0,
        length_for_99=lengths[max(0, math.ceil(0.99 * len(lengths)) - 1)] if lengths else 0,
        cut=sum(any(part.cut for part in parts) for parts in kept),
        dropped=len(encoded) - len(kept),
        malformed=malformed,
        duplicates=0 if dropped_duplicates else len(examples) - len(keys),
        in_validation=sum(count for key, count in keys.items() if key in held_out),
        classes=classes_of(examples),
    )


def classes_of(examples: Sequence[Example]) -> dict[str, int]:
    """Answers with their counts, most frequent first; empty where they are too many to be classes."""
    counts = Counter(example.answer.strip() for example in examples if not example.is_text)
    if not counts or len(counts) > _CLASSES or len(examples) < _A_CLASS * len(counts):
        return {}
    return dict(counts.most_common())


def oversampled(examples: Sequence[Example], share: float) -> list[int]:
    """Indices of examples, those of rare classes repeated until each class has ``share`` of the largest's number.

    Every example stays; the repeated ones follow in order. Free answers are left alone.

    Args:
        examples: Of the training.
        share: In (0, 1]; 1 makes all classes equally frequent.
    """
    classes = classes_of(examples)
    chosen = list(range(len(examples)))
    if not classes:
        return chosen
    wanted = math.ceil(share * max(classes.values()))
    members: dict[str, list[int]] = {name: [] for name in classes}
    for index, example in enumerate(examples):
        if example.answer.strip() in members:
            members[example.answer.strip()].append(index)
    for own in members.values():
        chosen += [own[i % len(own)] for i in range(max(0, wanted - len(own)))]
    return chosen
