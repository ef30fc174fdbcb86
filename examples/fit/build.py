# SPDX-License-Identifier: Apache-2.0
"""Makes the example's data from Shakespeare: who is asked, what is said to them, what they answer.

python examples/fit/build.py
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "small_base/text/shakespeare/input.txt"
COUNT, LONGEST = 1000, 120  # examples, and letters of a speech


def main() -> None:
    """Write every so manieth exchange of two short speeches."""
    speeches = [part.partition(":\n")[::2] for part in TEXT.read_text().strip().split("\n\n")]
    short = [(who, " ".join(said.split())) for who, said in speeches]
    asked = [
        {"instruction": f"Answer as {b}.", "input": f"{a}: {heard}", "output": said}
        for (a, heard), (b, said) in pairwise(short)
        if a != b and heard and said and max(len(heard), len(said)) <= LONGEST
    ]
    chosen = [asked[i * len(asked) // COUNT] for i in range(COUNT)]
    (HERE / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chosen))


if __name__ == "__main__":
    main()
