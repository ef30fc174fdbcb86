# SPDX-License-Identifier: Apache-2.0
"""Ranks: how processes that train together also save, look, agree and fail together."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_lora.errors import Notice

T = TypeVar("T")

_HEARD = "heard_by_every_rank"  # on an exception: all ranks know of it and stop


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) when nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: T) -> list[T]:
    """Every rank's ``value``, in order of ranks, on every rank.

    Args:
        value: anything that can be pickled.
    """
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def notice(text: str) -> None:
    """A warning, from one rank: all of them come to it."""
    if rank_and_world()[0] == 0:
        warnings.warn(text, Notice, stacklevel=3)


def from_rank_zero(value: T) -> T:
    """Rank 0's ``value``, on every rank: a decision that all must take alike.

    Args:
        value: anything that can be pickled; what other ranks give is not used.
    """
    if rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def together(what: str, kind: type[Exception]) -> Iterator[None]:
    """A block that fails on every rank when it fails on one, so that nobody waits for a rank that is gone.

    Every rank enters and leaves it. Blocks may be nested: an error that every rank has heard of passes the outer
    block without another word. A rank that is killed inside the block closes its connections, by which the others'
    wait ends: under gloo at once, under NCCL when its watchdog's timeout has passed.

    Args:
        what: What the block does, for the text of the error: "save run.ckpt".
        kind: The error on the ranks that had none of their own.

    Raises:
        Exception: Of that kind, where another rank failed or is gone. A rank that failed itself raises its own error.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if getattr(error, _HEARD, False):
            raise
        own = error
    try:
        said = gather(None if own is None else f"{type(own).__name__}: {own}")
    except RuntimeError as broken:
        raise kind(
            f"another rank ended while this one was to {what}: start all of them again from the newest checkpoint"
        ) from (own or broken)
    failed = {rank: text for rank, text in enumerate(said) if text is not None}
    if own is None and failed:
        rank, text = next(iter(failed.items()))
        own = kind(f"rank {rank} failed to {what}, and so all stop: {text}")
    if own is not None:
        setattr(own, _HEARD, True)
        raise own


@contextmanager
def in_step(what: str, kind: type[Exception]) -> Iterator[None]:
    """A block in which ranks wait for one another, as in a sharded model's forward.

    A rank that fails there cannot ask the others to hear it: they wait for its next piece. It leaves a note in the
    store by which the processes found each other, and raises; its end breaks their wait, and they raise with the note.

    Args:
        what: What the block does, for the text of the error.
        kind: The error on the ranks whose wait was broken.

    Raises:
        Exception: Of that kind, where another rank failed. A rank that failed itself raises its own error.
    """
    try:
        yield
    except Exception as error:
        if getattr(error, _HEARD, False):
            raise
        rank, world = rank_and_world()
        failed = {other: text for other in range(world) if other != rank and (text := _note(other)) is not None}
        if failed and isinstance(error, RuntimeError):
            other, text = next(iter(failed.items()))
            error = kind(f"rank {other} failed to {what}, and so all stop: {text}").with_traceback(error.__traceback__)
        elif world > 1:
            _note(rank, f"{type(error).__name__}: {error}")
        setattr(error, _HEARD, True)
        raise error


def _note(rank: int, text: str | None = None) -> str | None:
    """What a rank left for the others, or leave it; None without one, or where the store is gone with its host."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if rank_and_world()[1] == 1 or not host or not port:
        return None
    with suppress(RuntimeError, ValueError):
        store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        key = f"lightning_lora/failed/{rank}"
        if text is not None:
            store.set(key, text)
        return store.get(key).decode() if store.check([key]) else None
    return None
