# SPDX-License-Identifier: Apache-2.0
r"""A griffe extension: our docstrings' reStructuredText becomes Markdown, equations become MathML.

:math:`x A^T`, ``.. math::``  -->  <math>, which browsers draw by themselves: no script, nothing from a network
``Example::``                 -->  a fenced block
``====  ====`` tables         -->  | tables |
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe
from latex2mathml.converter import convert

INLINE = re.compile(r":math:`([^`]+)`")
DISPLAY = re.compile(r"^\.\. math::[ ]*(.*(?:\n(?:[ ]+.*)?)*)", re.MULTILINE)
LITERAL = re.compile(r"^(.*)::\n\n((?:[ ]{4}.*\n|\n)+)", re.MULTILINE)
TABLE = re.compile(r"^=+(?: +=+)+\n(?:(?P<head>.+)\n=+(?: +=+)+\n)?(?P<rows>(?:.+\n)+?)=+(?: +=+)+$", re.MULTILINE)


class Markup(griffe.Extension):
    """Rewrites every docstring before its sections are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called once for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The docstring `text` in Markdown."""
    text = TABLE.sub(_table, text + "\n")
    text = DISPLAY.sub(lambda m: f"\n{mathml(m.group(1), 'block')}\n\n", text)
    # Markdown takes a line that begins with <math> for a block of HTML, and one that begins with <span> for text.
    text = INLINE.sub(lambda m: f"<span>{mathml(m.group(1), 'inline')}</span>", text)
    return LITERAL.sub(_fenced, text).rstrip()


def mathml(latex: str, display: str) -> str:
    """One equation as a ``<math>`` element on one line."""
    return convert(" ".join(latex.split()), display=display)


def _fenced(match: re.Match[str]) -> str:
    lead, body = match.group(1), textwrap.dedent(match.group(2)).strip("\n")
    kind = "python" if lead.strip() == "Example" else "text"
    head = f"{lead}:\n\n" if lead.strip() else ""
    return f"{head}```{kind}\n{body}\n```\n\n"


def _table(match: re.Match[str]) -> str:
    starts = [m.start() for m in re.finditer(r"=+", match.group(0).splitlines()[0])]

    def cells(line: str) -> str:
        parts = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        return "| " + " | ".join(parts) + " |"

    head = cells(match.group("head") or " " * (starts[-1] + 1))
    return "\n".join([head, "|" + "---|" * len(starts), *map(cells, match.group("rows").splitlines())])
