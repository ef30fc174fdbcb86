# SPDX-License-Identifier: Apache-2.0
"""The texts of the small base: read, cleaned, and split into training and held-out speeches.

text/state_union, text/inaugural  ->  training speeches | held-out speeches (never trained on)
text/shakespeare                  ->  the target of fine-tuning: train | validation
"""

from __future__ import annotations

import random
import re
from pathlib import Path

TEXT_DIR = Path(__file__).resolve().parent / "text"
SEED = 0
HELD_OUT_CHARS = 340_000
LONGEST_HELD_OUT = 60_000
SHAKESPEARE_VALIDATION = 0.1

_REPLACED = {
    "\u2014": "--",
    "\u2013": "-",
    "\u2018": "'",
    "\u2019": "'",
    "\u201c": '"',
    "\u201d": '"',
    "\xa0": " ",
}
_STAGE = re.compile(r"\((?:Applause|Laughter)[^)]*\)|^\s*THE PRESIDENT:", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]?[A-Z])")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Gen|Sen|Rep|No|Jr|vs)|\b[A-Z])\.$")


def read_text(path: Path) -> str:
    """Read one text and clean it: plain quotes and dashes, single spaces, no stage directions.

    Args:
        path: a text file, UTF-8 or Windows-1252.

    Returns:
        The text, one paragraph a line; headings in capitals are left out.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    for old, new in _REPLACED.items():
        text = text.replace(old, new)
    text = _STAGE.sub(" ", text)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.isupper())


def speeches() -> dict[str, str]:
    """Read every speech.

    Returns:
        The cleaned text by name, for instance `state_union/1961-Kennedy`, in sorted order.
    """
    paths = sorted(p for kind in ("inaugural", "state_union") for p in (TEXT_DIR / kind).glob("*.txt"))
    return {f"{p.parent.name}/{p.stem}": read_text(p) for p in paths}


def split_speeches(seed: int = SEED) -> tuple[dict[str, str], dict[str, str]]:
    """Split the speeches, whole, into those trained on and those held out.

    Args:
        seed: seed of the draw.

    Returns:
        (training, held-out): about an eighth of the characters is held out.
    """
    every = speeches()
    names = [name for name, text in every.items() if len(text) <= LONGEST_HELD_OUT]
    random.Random(seed).shuffle(names)
    held: set[str] = set()
    chars = 0
    for name in names:
        if chars >= HELD_OUT_CHARS:
            break
        held.add(name)
        chars += len(every[name])
    training = {name: text for name, text in every.items() if name not in held}
    return training, {name: text for name, text in every.items() if name in held}


def sentences(text: str) -> list[str]:
    """Cut a cleaned text into sentences.

    Args:
        text: paragraphs, one a line.

    Returns:
        The sentences in order, each on one line.
    """
    found: list[str] = []
    for paragraph in text.splitlines():
        start = 0
        for match in _SENTENCE_END.finditer(paragraph):
            if _ABBREVIATION.search(paragraph[start : match.start()]):
                continue
            found.append(paragraph[start : match.end()].strip())
            start = match.end()
        found.append(paragraph[start:].strip())
    return [sentence for sentence in found if sentence]


def shakespeare(split: str) -> str:
    """Read the target text.

    Args:
        split: `train` (the first nine tenths) or `validation` (the rest).

    Returns:
        The plays, with their line breaks.

    Raises:
        ValueError: `split` is neither of the two.
    """
    text = (TEXT_DIR / "shakespeare" / "input.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", int(len(text) * (1 - SHAKESPEARE_VALIDATION))) + 2
    if split == "train":
        return text[:cut]
    if split == "validation":
        return text[cut:]
    raise ValueError(f"split must be 'train' or 'validation', got {split!r}")
