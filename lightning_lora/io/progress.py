# SPDX-License-Identifier: Apache-2.0
"""Where in its epoch a training checkpoint stands, and which loaders can go on from there.

Lightning counts epochs and batches as ready, started, processed and completed. One and the same place has
several spellings: after the last batch, after validation, at the end of an epoch, after training; and a run
stopped inside an epoch counts that epoch as done. Resumed from some of them it trains a batch too many,
skips an epoch, or begins another epoch's order. `settle` rewrites all to one of

    inside    the epoch has begun and goes on:    ready = started = n, processed = completed = n - 1
    between   n epochs are done:                  ready = started = processed = completed = n
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from torch.utils.data import DistributedSampler

Place = Literal["start", "inside", "between"]


def settle(fit_loop: dict[str, Any]) -> Place:
    """Rewrite the progress in a checkpoint's ``loops.fit_loop``, in place; doing it again changes nothing.

    Returns:
        "inside" an epoch, "between" two, or at the "start" of the run, which is left as it is.
    """
    batches = fit_loop["epoch_loop.batch_progress"]
    epochs = fit_loop["epoch_progress"]
    if batches["current"]["ready"] == 0:
        return "start"
    if not batches["is_last_batch"]:
        for count in (epochs["total"], epochs["current"]):
            count.update(ready=count["started"], processed=count["started"] - 1, completed=count["started"] - 1)
        return "inside"
    if epochs["total"]["processed"] < epochs["total"]["started"]:  # written before the last step was counted for logs
        state = fit_loop["epoch_loop.state_dict"]
        state["_batches_that_stepped"] = state.get("_batches_that_stepped", 0) + 1
    for count in (epochs["total"], epochs["current"]):
        done = count["started"]
        count.update(ready=done, processed=done, completed=done)
    for count in (batches["total"], batches["current"]):
        count["completed"] = count["processed"]
    return "between"


def lost_places(loader: Any, place: Place) -> Iterator[str]:
    """What a train loader does not keep over a resume, one sentence each, with the remedy.

    Args:
        loader: As the Trainer uses it, its sampler perhaps replaced for several processes.
        place: Where the run is resumed.
    """
    sampler = _sampler(loader)
    keeps_place = hasattr(loader, "load_state_dict")
    inside = place == "inside"
    if inside and not keeps_place:
        yield (
            f"the train loader ({type(loader).__name__}) cannot go on inside an epoch: it starts the epoch anew, so "
            "this run will see other batches than an uncut one. Use torchdata's `StatefulDataLoader`"
        )
    elif _forgets_order(sampler, inside):
        yield (
            f"the order of the shuffled train loader is not kept ({type(sampler).__name__}, as Lightning puts it in on "
            "several processes): the resumed run has another. Use torchdata's `StatefulDistributedSampler(dataset, "
            "seed=...)`"
        )
    elif not keeps_place and getattr(sampler, "generator", None) is not None:
        yield (
            "the train loader's sampler has a `generator` of its own, whose state is not kept: the resumed run has "
            "another order. Use torchdata's `StatefulDataLoader`, or leave the generator to the global one"
        )
    if inside and getattr(loader, "num_workers", 0) > 0:
        yield (
            f"the train loader's {loader.num_workers} worker processes start anew inside the epoch: items that are "
            "changed at random as they are read will be changed in another way. Use `num_workers=0` for those, or "
            "resume between epochs"
        )


def _sampler(loader: Any) -> Any:
    """What gives the order; Lightning puts its own in under a batch sampler and leaves ``loader.sampler`` idle."""
    batches = getattr(loader, "batch_sampler", None)
    return getattr(batches, "sampler", getattr(loader, "sampler", None))


def _forgets_order(sampler: Any, inside: bool) -> bool:
    """A distributed sampler without a state; its order is kept between epochs if it is a function of the epoch."""
    if not isinstance(sampler, DistributedSampler) or hasattr(sampler, "state_dict"):
        return False
    wraps_another = type(sampler) is not DistributedSampler
    return wraps_another or (inside and sampler.shuffle)


def rewind(loader: Any) -> None:
    """Let a loader that was put to the end of an epoch begin the next one.

    torchdata's `StatefulDistributedSampler` keeps its place until it is iterated over for the first time.
    """
    sampler = _sampler(loader)
    if isinstance(sampler, DistributedSampler) and hasattr(sampler, "load_state_dict"):
        sampler.load_state_dict({"yielded": 0})
