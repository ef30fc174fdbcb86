# SPDX-License-Identifier: Apache-2.0
"""`resumable`: a plain `DataLoader` that tells where in its epoch it is, and can go on from there.

The order of an epoch is a function of the random state in which its sampler began. That state and the number of
batches given out are the place: to go on, the sampler begins in the same state once more and passes over the
indices of those batches. No item is read for it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_lora.rng import RNGState, preserve_rng

# Samplers whose order depends on the random state in which they begin, on `epoch` and `seed`, and on nothing else.
_KNOWN = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def resumable(loader: Any) -> Any:
    """``loader`` with a place that is kept; itself where it keeps its own or none can be kept.

    Args:
        loader: A `DataLoader` over a dataset with indices is copied, sampler and dataset shared, and the copy's
            class extended. Anything else is given back: an iterable dataset, a loader with an ``__iter__`` of
            its own, one that has a state.
    """
    kind = type(loader)
    if not isinstance(loader, DataLoader) or kind.__iter__ is not DataLoader.__iter__ or hasattr(loader, "state_dict"):
        return loader
    if isinstance(loader.dataset, IterableDataset):
        return loader
    loader = copy.copy(loader)
    loader.__class__ = type(f"Resumable{kind.__name__}", (ResumableLoader, kind), {})
    return loader


class ResumableLoader(DataLoader):
    """Put before a `DataLoader`'s class by `resumable`."""

    _place: Place | None = None  # in the epoch begun last
    _loaded: dict[str, Any] | None = None  # where the next iterator begins
    #: Whether the epoch goes on at a place that was loaded.
    resumed = False

    def __iter__(self) -> Any:
        """As `DataLoader`; the first time after a place was loaded, the rest of that epoch."""
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            self._place = Place(_draws(self))
            return _Batches(self, self._place, super().__iter__())
        self._place = Place(loaded["made"], loaded["asked"], loaded["yielded"])
        return _Batches(self, self._place, _rest_of(self, self._place))

    def state_dict(self) -> dict[str, Any]:
        """The place: primitives and tensors."""
        state = {"resumable": 1, "generators": _draws(self)["generators"]}
        if self._place is None or self._place.yielded == 0:
            return state
        sampler = sampler_of(self)
        kept = {name: value for name in ("seed", "epoch") if isinstance(value := getattr(sampler, name, None), int)}
        return {**state, **vars(self._place), "sampler": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin at this place; a state of another kind of loader is not used, and `resumed` stays false."""
        if state.get("resumable") != 1:
            return
        self.resumed, self._loaded = True, dict(state) if "yielded" in state else None
        for generator, kept in zip(_generators(self), state["generators"], strict=False):
            generator.set_state(kept)
        for name, value in state.get("sampler", {}).items():
            setattr(sampler_of(self), name, value)

    def rewind(self) -> None:
        """Begin the next epoch instead of going on inside one."""
        self._loaded = None

    def unknown_sampler(self) -> Any:
        """The sampler, or batch sampler, whose order may depend on something that is not kept; None if all is."""
        sampler = sampler_of(self)
        if type(self.batch_sampler) not in (BatchSampler, type(None)):
            return self.batch_sampler
        return None if type(sampler) in _KNOWN or isinstance(sampler, DistributedSampler) else sampler


@dataclass
class Place:
    """Where in an epoch a loader is.

    A sampler draws its order when it is iterated over or when it is asked for the first entry. For worker
    processes both happen as the loader's iterator is made; without them the second waits for the first batch.

    Args:
        made: Random states before the iterator was made.
        asked: Before the first batch; None where worker processes read.
        yielded: Batches given out.
    """

    made: dict[str, Any]
    asked: dict[str, Any] | None = None
    yielded: int = 0


class _Batches:
    """Gives out the batches and counts them."""

    def __init__(self, loader: DataLoader, place: Place, batches: Iterator[Any]) -> None:
        self.loader, self.place, self.batches = loader, place, batches

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> Any:
        if self.place.yielded == 0 and self.loader.num_workers == 0:
            self.place.asked = _draws(self.loader)
        batch = next(self.batches)
        self.place.yielded += 1
        return batch


def _rest_of(loader: DataLoader, place: Place) -> Iterator[Any]:
    """An epoch's batches from ``place`` on; the random state of the process stays as it is."""
    rest = copy.copy(loader)
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    indices = _Rest(getattr(loader, name), place.yielded, lambda: _restore(loader, place.asked))
    vars(rest)[name] = indices  # by `setattr` a loader lets it be set once only
    rest._iterator = None
    now = _draws(loader)
    try:
        _restore(loader, place.made)
        batches = DataLoader.__iter__(rest)
        indices.begin()
    finally:
        _restore(loader, now)
    return batches


class _Rest:
    """What a sampler gives after its first ``count`` entries, once; ``ask`` is called before the first of all."""

    def __init__(self, sampler: Any, count: int, ask: Callable[[], None]) -> None:
        self.sampler, self.count, self.ask = sampler, count, ask
        self.left: Iterator[Any] = iter(())

    def begin(self) -> None:
        """Pass over the entries, if that has not been done."""
        if self.count:
            self.ask()
            next(itertools.islice(self.left, self.count, self.count), None)
        self.count = 0

    def __iter__(self) -> Iterator[Any]:
        self.left = iter(self.sampler)
        return self

    def __next__(self) -> Any:
        self.begin()
        return next(self.left)


def sampler_of(loader: Any) -> Any:
    """What gives the order; Lightning puts its own in under a batch sampler and leaves ``loader.sampler`` idle."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(batches, "sampler", getattr(loader, "sampler", None))


@contextmanager
def same_draws(loader: Any) -> Iterator[None]:
    """What a look through a loader draws leaves the process's random states and its generators' as they were."""
    if not isinstance(loader, DataLoader):
        with preserve_rng():
            yield
        return
    before = _draws(loader)
    try:
        yield
    finally:
        _restore(loader, before)


def _generators(loader: DataLoader) -> list[torch.Generator]:
    """Generators of the user's, each once."""
    found = [getattr(owner, "generator", None) for owner in (loader, loader.batch_sampler, sampler_of(loader))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _draws(loader: DataLoader) -> dict[str, Any]:
    """The random states that an epoch's order may come from: the process's and those of the user's generators."""
    return {"rng": RNGState.capture().to_dict(), "generators": [g.get_state() for g in _generators(loader)]}


def _restore(loader: DataLoader, state: Mapping[str, Any] | None) -> None:
    if state is None:
        return
    RNGState.from_dict(state["rng"]).restore()
    for generator, kept in zip(_generators(loader), state["generators"], strict=False):
        generator.set_state(kept)
