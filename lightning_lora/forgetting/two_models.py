# SPDX-License-Identifier: Apache-2.0
"""Two models: a whole model beside the base that it was tuned from, asked as though it were an adapter on and off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import LoadedTask


class TwoModels(Scorer):
    """A `Scorer` whose base is another model. Both are in memory.

    Args:
        module: The tuned model.
        base: The base; what it has to know is the same tokens.
        options: As `Scorer` takes them, for both.
    """

    def __init__(self, module: nn.Module, base: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self._other = Scorer(base, **options)

    @property
    def exact(self) -> bool:
        """False after a pass of either whose logits came in 16 bits."""
        return super().exact and self._other.exact

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """See `Scorer.quietly`; for both."""
        with super().quietly(), self._other.quietly():
            yield

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the base is asked."""
        with self._other.base():
            self._in_base = True
            try:
                yield
            finally:
                self._in_base = False

    def score(self, tasks: Mapping[str, LoadedTask], picked: Mapping[str, Sequence[int]]) -> dict[str, list[ItemScore]]:
        """See `Scorer.score`; of the base inside `base`."""
        return self._other.score(tasks, picked) if self._in_base else super().score(tasks, picked)
