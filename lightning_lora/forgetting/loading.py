# SPDX-License-Identifier: Apache-2.0
"""Loading: a run's tasks and target tasks on every rank, together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_lora.errors import ConfigError, TaskError
from lightning_lora.forgetting.tasks import LoadedTask, TaskSpec, load_tasks
from lightning_lora.ranks import rank_and_world, together

Tasks = dict[str, LoadedTask]


def load_on_ranks(
    tasks: Sequence[TaskSpec],
    targets: Sequence[TaskSpec],
    num_fewshot: int | None,
    include_path: str | Path | Sequence[str | Path] | None,
    local_rank: int,
    allow_code: Sequence[str] = (),
) -> tuple[Tasks, Tasks]:
    """Load tasks, on the first rank of each machine first: it fills the cache that others read.

    Args:
        tasks: general tasks.
        targets: target tasks; there may be none.
        num_fewshot: as `load_tasks` takes it.
        include_path: as `load_tasks` takes it.
        local_rank: this rank's number on its machine.
        allow_code: as `load_tasks` takes it.

    Raises:
        ConfigError: if a task is in both.
        TaskError: if one cannot be loaded, on every rank.
    """

    def load() -> tuple[Tasks, Tasks]:
        loaded = load_tasks(tasks, num_fewshot, include_path, allow_code)
        learned = load_tasks(targets, num_fewshot, include_path, allow_code) if targets else {}
        both = sorted(loaded.keys() & learned.keys())
        if both:
            raise ConfigError(f"`tasks` and `target_tasks` both have {', '.join(both)}. Leave it out of one of them.")
        return loaded, learned

    found = None
    if rank_and_world()[1] > 1:
        with together("load tasks", TaskError):
            if local_rank == 0:
                found = load()
    with together("load tasks", TaskError):
        found = found or load()
        import lm_eval.evaluator  # noqa: F401 - seconds that are no look's, whose time is measured
    return found
