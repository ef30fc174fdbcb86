# SPDX-License-Identifier: Apache-2.0
"""Paired scores: the same items, in one order, by the model and by its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import LoadedTask

#: Scores by task, in the order of the documents.
Scores = Mapping[str, Sequence[ItemScore]]


class PairedScores:
    """Asks the model and its base about the same items, and the base once only where that is exact.

    In 16 bits a score depends a little on what shared its batch; there the base is asked in the very
    batches of the model. In 32 bits only unseen items are asked.

    Args:
        tasks: loaded tasks.
    """

    def __init__(self, tasks: Mapping[str, LoadedTask]) -> None:
        self.tasks = dict(tasks)
        self._base: dict[str, dict[int, ItemScore]] = {name: {} for name in self.tasks}

    def score(self, scorer: Scorer, picked: Mapping[str, Sequence[int]]) -> tuple[Scores, Scores]:
        """The scores of the model as it stands and of its base. Call it inside `Scorer.quietly`.

        Args:
            scorer: the model.
            picked: documents by task, ascending.

        Returns:
            Both by task; tasks without an item that has a right choice are left out.
        """
        model = {name: found for name, found in scorer.score(self.tasks, picked).items() if found}
        known = self._base if scorer.exact else {name: {} for name in self.tasks}
        if scorer.exact:
            ask = {name: [s.doc_id for s in found if not self._knows(name, s)] for name, found in model.items()}
        else:
            ask = {name: list(picked[name]) for name in model}
        if any(ask.values()):
            with scorer.base():
                for name, found in scorer.score(self.tasks, ask).items():
                    known[name].update({score.doc_id: score for score in found})
        return model, {name: [known[name][score.doc_id] for score in found] for name, found in model.items()}

    def unseen(self, picked: Mapping[str, Sequence[int]]) -> int:
        """How many of these documents the base has still to be asked about.

        Args:
            picked: documents by task.
        """
        return sum(doc_id not in self._base[name] for name, ids in picked.items() for doc_id in ids)

    def state_dict(self) -> dict[str, Any]:
        """The base's scores, in primitives: some 250 bytes an item."""
        return {name: [list(astuple(score)) for score in found.values()] for name, found in self._base.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the base's scores from `state_dict`; an item whose text or prompt has changed is asked again.

        Args:
            state: what `state_dict` gave. Tasks that are not loaded here are left out.
        """
        for name in self._base.keys() & state.keys():
            for row in state[name]:
                fields: Any = [tuple(x) if isinstance(x, list) else x for x in row]  # JSON makes lists of tuples
                score = ItemScore(*fields)
                self._base[name][score.doc_id] = score

    def _knows(self, name: str, score: ItemScore) -> bool:
        known = self._base[name].get(score.doc_id)
        return known is not None and known.key == score.key
