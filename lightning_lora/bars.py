# SPDX-License-Identifier: Apache-2.0
"""Bars: how work that may take more than a moment shows how far it is.

A bar is what is called with the work's name and size, and is told of progress inside::

    with bar("packing", total) as advance:
        ...
        advance(1)

Library functions take one and show nothing by default; commands give `terminal_bar`, callbacks that of the Trainer.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from tqdm import tqdm

from lightning_lora.ranks import rank_and_world

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]

#: What takes less shows no bar [s].
DELAY = 2.0


@contextlib.contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Shows nothing.

    Args:
        what: Name of the work.
        total: Its size.
    """
    yield _nothing


@contextlib.contextmanager
def terminal_bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A line on the terminal once the work has taken `DELAY`, gone when it is done.

    Nothing where standard error is no terminal, and on other processes than the first.

    Args:
        what: Name of the work.
        total: Its size.
    """
    off = None if rank_and_world()[0] == 0 else True
    screen = getattr(sys.stderr, "behind", sys.stderr)  # while items are scored others' bars are kept away from it
    with tqdm(desc=what, total=total, unit_scale=True, delay=DELAY, leave=False, disable=off, file=screen) as shown:
        yield shown.update


def _nothing(count: int) -> None:
    """What `no_bar` does with progress."""
