# SPDX-License-Identifier: Apache-2.0
"""What commands print: text for people or JSON for programs on standard output, and nothing else there."""

from __future__ import annotations

import contextlib
import importlib.util
import json as json_lib
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def work(quiet: bool = False) -> Iterator[None]:
    """Inside, what libraries print goes to standard error, warnings are a line each, bars are for terminals only.

    Args:
        quiet: Whether transformers shows none there either.
    """
    with contextlib.redirect_stdout(sys.stderr), notices(quiet):
        yield


@contextlib.contextmanager
def notices(quiet: bool = False) -> Iterator[None]:
    """Inside, warnings are a line each, bars are for terminals only; what is printed stays where it is.

    Args:
        quiet: Whether transformers shows none there either.
    """
    hidden = (quiet or not sys.stderr.isatty()) and importlib.util.find_spec("transformers") is not None
    with warnings.catch_warnings():
        warnings.showwarning = _show
        with _no_bars_of_others() if hidden else contextlib.nullcontext():
            yield


def show(text: object, values: Any, json: bool) -> None:
    """Print a command's answer.

    Args:
        text: For people.
        values: The same for programs, in primitives.
        json: Which of the two.
    """
    print(json_lib.dumps(finite(values), indent=2, allow_nan=False) if json else text)  # noqa: T201


def finite(value: Any) -> Any:
    """The value with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {str(key): finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Aligned text.

    Args:
        header: Titles of the columns.
        rows: Their cells.
        left: How many columns are aligned to the left.
    """
    every = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*every, strict=True)]
    sides = ["<" if column < left else ">" for column in range(len(header))]
    lines = ("  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)) for row in every)
    return "\n".join(line.rstrip() for line in lines)


def _show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
    print(f"{category.__name__}: {' '.join(str(message).split())}", file=sys.stderr)  # noqa: T201


@contextlib.contextmanager
def _no_bars_of_others() -> Iterator[None]:
    """Transformers' bars off for a moment, as they were after it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
