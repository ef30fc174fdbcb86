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

from lightning_lora.io.resumable import ResumableLoader, sampler_of

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
    sampler = sampler_of(loader)
    ours = isinstance(loader, ResumableLoader)
    inside = place == "inside"
    if inside and not (loader.resumed if ours else hasattr(loader, "load_state_dict")):
        yield (
            f"the train loader ({type(loader).__name__}) cannot go on inside an epoch: it starts the epoch anew, so "
            f"this run will see other batches than an uncut one. {_remedy(loader)}"
        )
    elif ours and (unknown := loader.unknown_sampler()) is not None:
        yield (
            f"the order of the train loader is that of a {type(unknown).__name__}: the batches that were seen are "
            "passed over, which is exact if the order of an epoch depends on the global random generators and on "
            "`epoch` only. Otherwise give it a `state_dict` and use torchdata's `StatefulDataLoader`"
        )
    elif not ours and _forgets_order(sampler, inside):
        yield (
            f"the order of the shuffled train loader is not kept ({type(sampler).__name__}, as Lightning puts it in on "
            "several processes): the resumed run has another. Use a plain `DataLoader`, or torchdata's "
            "`StatefulDistributedSampler(dataset, seed=...)`"
        )
    if inside and getattr(loader, "num_workers", 0) > 0:
        yield (
            f"the train loader's {loader.num_workers} worker processes start anew inside the epoch: items that are "
            "changed at random as they are read will be changed in another way. Use `num_workers=0` for those, or "
            "resume between epochs"
        )


def _remedy(loader: Any) -> str:
    if isinstance(loader, ResumableLoader):
        return "The checkpoint holds no place for this loader: use the loader that the run was begun with"
    return "Use a `DataLoader` over a dataset with indices, or torchdata's `StatefulDataLoader`"


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
    if isinstance(loader, ResumableLoader):
        loader.rewind()
        return
    sampler = sampler_of(loader)
    if isinstance(sampler, DistributedSampler) and hasattr(sampler, "load_state_dict"):
        sampler.load_state_dict({"yielded": 0})
