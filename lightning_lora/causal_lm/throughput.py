# SPDX-License-Identifier: Apache-2.0
"""`Throughput`: tokens a second, over the time that training steps took."""

from __future__ import annotations

import time


class Throughput:
    """Counts tokens and seconds from one reading to the next; what lies between `pause` and `begin` is left out."""

    def __init__(self) -> None:
        self._tokens, self._seconds = 0, 0.0
        self._since: float | None = None

    def begin(self) -> None:
        """A batch begins; the clock goes on from the end of the last one, so that waiting for data counts."""
        if self._since is None:
            self._since = time.perf_counter()

    def end(self, tokens: int) -> None:
        """A batch of so many tokens is done."""
        now = time.perf_counter()
        self._seconds += now - (now if self._since is None else self._since)
        self._tokens += tokens
        self._since = now

    def pause(self) -> None:
        """What follows is no training: validation, a checkpoint."""
        self._since = None

    def read(self) -> float:
        """Tokens a second since the last reading; 0 before anything was counted."""
        rate = self._tokens / self._seconds if self._seconds > 0 else 0.0
        self._tokens, self._seconds = 0, 0.0
        return rate
