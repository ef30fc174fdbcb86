# SPDX-License-Identifier: Apache-2.0
"""`together`: an error on one rank is one on all, so that none waits for ever for the one that failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from lightning_lora.errors import WriteError


@contextlib.contextmanager
def together(world_size: int, what: str) -> Iterator[None]:
    """Run a block that every rank enters and leaves; at its end all hear of an error on any.

    A rank that is killed inside the block closes its connections, by which the others' wait ends.

    Args:
        world_size: Number of ranks.
        what: What the block does, for the text of the error: "save run.ckpt".

    Raises:
        WriteError: Another rank failed or is gone. A rank that failed itself raises its own error.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if world_size > 1 and torch.distributed.is_initialized():
        told: list[str | None] = [None] * world_size
        try:
            torch.distributed.all_gather_object(told, None if error is None else f"{type(error).__name__}: {error}")
        except RuntimeError as broken:
            raise WriteError(
                f"another rank ended while this one was to {what}: start all of them again from the newest checkpoint"
            ) from (error or broken)
        failed = [rank for rank, text in enumerate(told) if text is not None]
        if error is None and failed:
            raise WriteError(f"rank {failed[0]} failed to {what}, and so all stop: {told[failed[0]]}")
    if error is not None:
        raise error
