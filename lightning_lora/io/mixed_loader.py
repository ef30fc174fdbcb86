# SPDX-License-Identifier: Apache-2.0
"""`mixed`: a train loader among whose batches stand some of another data set, at places that need no draw.

With ``share = a / b`` the batch number i of an epoch (from 0) comes from the other data where

    (i + 1) * a // b > i * a // b

so that on every process the same batches do, and a place in the epoch is told by one number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import torch

from lightning_lora.errors import UnsupportedError

_KEY = "replay_mix"  # in a loader's state


class Replay:
    """An endless stream of batches from a data set, shuffled by a seed that is its own; each pass in another order.

    Batch k of the run on rank r of W is made of items ``(k W + r) n ... (k W + r + 1) n - 1`` of the endless row of
    passes: no item comes twice before all came once, on any number of processes.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        batch_size: Items in a batch, n.
        collate: Makes a batch of a list of items.
        seed: Of the order.
        rank: This process's place among those that read different batches.
        world: How many there are.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Callable[[list[Any]], Any],
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.dataset, self.batch_size, self.collate = dataset, batch_size, collate
        self.seed, self.rank, self.world = seed, rank, world
        #: Batches given out on this process.
        self.taken = 0
        self._orders: dict[int, list[int]] = {}

    def __next__(self) -> Any:
        """The next batch."""
        start = (self.taken * self.world + self.rank) * self.batch_size
        self.taken += 1
        size = len(self.dataset)
        places = [divmod(i, size) for i in range(start, start + self.batch_size)]
        return self.collate([self.dataset[self._order(turn)[i]] for turn, i in places])

    def _order(self, turn: int) -> list[int]:
        if turn not in self._orders:
            generator = torch.Generator().manual_seed(self.seed + turn)
            kept = {t: order for t, order in self._orders.items() if t >= turn - 1}
            self._orders = {**kept, turn: torch.randperm(len(self.dataset), generator=generator).tolist()}
        return self._orders[turn]


def mixed(loader: Any, replay: Replay, share: Fraction, rewinds: bool = False) -> Any:
    """A copy of ``loader`` that gives out ``replay``'s batches among its own, and ends where it has no more.

    Args:
        loader: Any loader; one with a state keeps its own and the place in the mixture.
        replay: The other data.
        share: Of all batches, how many are the other data's; at least 0 and below 1.
        rewinds: Whether a place at the end of an epoch is to be taken for the beginning of the next. The strategies
            of this package see to that themselves.

    Raises:
        UnsupportedError: The loader is of a kind that cannot be extended.
    """
    try:
        own = copy.copy(loader)
        own.__class__ = _mixing(type(loader))
    except TypeError as error:
        raise UnsupportedError(
            f"batches cannot be mixed into a {type(loader).__name__}: give the Trainer a `DataLoader` or an iterable "
            f"of a class of your own ({error})."
        ) from error
    vars(own).update(_replay=replay, _share=share, _given=0, _begin=0, _rewinds=rewinds, epochs=0, began_at=0)
    return own


def apart(loader: Any) -> Any:
    """A copy of ``loader`` through which a look takes none of the other data from the run."""
    copied = copy.copy(loader)
    if isinstance(replay := vars(copied).get("_replay"), Replay):
        vars(copied)["_replay"] = copy.copy(replay)
    return copied


def is_general(place: int, share: Fraction) -> bool:
    """Whether the batch at a place of an epoch comes from the other data, see the module.

    Args:
        place: Its number, from 0.
        share: Of all batches, how many are the other data's.
    """
    return int((place + 1) * share) > int(place * share)


def _mixing(kind: Any) -> type:
    """A loader's class, extended. A mixin would change the layout of its objects, which then could not be of it."""

    class Mixing(kind):
        _replay: Replay
        _share: Fraction
        _given: int  # batches given out in this epoch, of both kinds
        _begin: int  # where the next iterator begins
        _rewinds: bool
        epochs: int  # iterators begun
        began_at: int  # where the newest did

        def __iter__(self) -> Iterator[Any]:
            batches = super().__iter__()  # made now: loaders draw as they make it
            self._given, self._begin = self._begin, 0
            self.epochs, self.began_at = self.epochs + 1, self._given
            return self._mix(batches)

        def __len__(self) -> int:
            if not hasattr(kind, "__len__"):
                raise TypeError(f"a {kind.__name__} has no length")
            n = super().__len__()
            a, b = self._share.numerator, self._share.denominator
            return n * b // (b - a)

        def _mix(self, batches: Iterator[Any]) -> Iterator[Any]:
            while True:
                if is_general(self._given, self._share):
                    self._given += 1
                    yield next(self._replay)
                    continue
                try:
                    batch = next(batches)
                except StopIteration:
                    self._given = 0
                    return
                self._given += 1
                yield batch

    class StatefulMixing(Mixing):
        def state_dict(self) -> dict[str, Any]:
            """The loader's own state and the place in the mixture."""
            try:
                ended = self._given >= len(self)
            except (TypeError, NotImplementedError):
                ended = False
            place = {"given": 0 if ended else self._given, "taken": self._replay.taken, "ended": ended}
            return {**super().state_dict(), _KEY: place}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            """Begin at this place; where a run without a mixture wrote the state, with the first general batch."""
            place = state.get(_KEY, {"given": 0, "taken": 0})
            self._begin, self._replay.taken = place["given"], place["taken"]
            super().load_state_dict({key: value for key, value in state.items() if key != _KEY})
            if place.get("ended") and self._rewinds:
                self.rewind()

        def rewind(self) -> None:
            """Begin the next epoch instead of going on inside one."""
            self._begin = 0
            super().rewind()

    found: type = StatefulMixing if hasattr(kind, "state_dict") else Mixing
    found.__name__ = found.__qualname__ = f"Mixed{kind.__name__}"
    return found
