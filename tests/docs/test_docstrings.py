# SPDX-License-Identifier: Apache-2.0
"""Our docstrings' markup in Markdown. Needs the tools of the documentation; `make docs` runs it."""

from __future__ import annotations

import pytest

pytest.importorskip("griffe", reason="the extra `docs` is not installed")
pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")

from docs.tools.docstrings import markdown


def test_equations_become_mathml() -> None:
    text = markdown("Of :math:`x A^T`.\n\n.. math::\n    d_i = a, \\qquad\n    b\n\nAfter.")
    assert text.count("<math") == 2
    assert 'display="inline"' in text
    assert 'display="block"' in text
    assert "Of <span><math" in text
    assert ":math:" not in text
    assert ".. math" not in text
    assert text.endswith("\n\nAfter.")


def test_an_equation_on_the_line_of_its_directive() -> None:
    text = markdown(".. math:: a\n\nAfter.")
    assert text.count("<math") == 1
    assert "After." in text


def test_literal_blocks_become_fences() -> None:
    assert markdown("Example::\n\n    a = 1\n\n    b = 2\n\nArgs:\n    x: y") == (
        "Example:\n\n```python\na = 1\n\nb = 2\n```\n\nArgs:\n    x: y"
    )
    assert markdown("So::\n\n    a  b") == "So:\n\n```text\na  b\n```"


def test_tables() -> None:
    text = markdown("=====  =====\nrow    full\n=====  =====\na      1\nb      2\n=====  =====\n\nAfter.")
    assert text == "| row | full |\n|---|---|\n| a | 1 |\n| b | 2 |\n\nAfter."
    assert markdown("== ==\na  b\n== ==").splitlines() == ["|  |  |", "|---|---|", "| a | b |"]


def test_what_is_plain_stays() -> None:
    text = "Mean.\n\nArgs:\n    x: one of ``a`` or `b`.\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    assert markdown(text) == text
