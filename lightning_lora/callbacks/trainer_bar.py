# SPDX-License-Identifier: Apache-2.0
"""`trainer_bar`: bars that go with the Trainer's own, or none where it has none."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_lora.bars import DELAY, Bar, no_bar, terminal_bar
from lightning_lora.ranks import rank_and_world


def trainer_bar(trainer: Trainer) -> Bar:
    """How a callback shows that it works.

    A line of its own beside tqdm's bars; inside Lightning's rich display while that is up, since two that draw on one
    terminal destroy each other. Nothing under ``enable_progress_bar=False`` and on other ranks than the first.

    Args:
        trainer: Whose progress bar there is or is not.
    """
    callback = trainer.progress_bar_callback
    if callback is None or rank_and_world()[0] != 0:
        return no_bar

    @contextlib.contextmanager
    def bar(what: str, total: int) -> Iterator[Callable[[int], object]]:
        rich = isinstance(callback, RichProgressBar) and callback.progress is not None
        with _line_of(callback, what, total) if rich else terminal_bar(what, total) as advance:
            yield advance

    return bar


@contextlib.contextmanager
def _line_of(callback: Any, what: str, total: int) -> Iterator[Callable[[int], object]]:
    """One line more in a rich display. It is hidden in the end, not removed: Lightning finds its own by their place."""
    display, start = callback.progress, time.monotonic()
    task = display.add_task(what, total=total, visible=False)

    def advance(count: int) -> None:
        display.update(task, advance=count, visible=time.monotonic() - start > DELAY)
        callback.refresh()

    try:
        yield advance
    finally:
        display.update(task, visible=False)
        callback.refresh()
