# SPDX-License-Identifier: Apache-2.0
"""Arguments that callbacks of this topic take alike: each is checked when it is given, hours before it is used."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_lora.errors import ConfigError


def check_counts(least: int = 1, none_too: bool = False, **counts: Any) -> None:
    """Refuse what is no whole number, or too small.

    Args:
        least: the smallest that will do.
        none_too: whether None will do.
        counts: values by the names of their arguments.

    Raises:
        ConfigError: for the first that will not do.
    """
    for name, value in counts.items():
        if value is None and none_too:
            continue
        if not _is_int(value):
            raise ConfigError(f"`{name}` must be a whole number{' or None' if none_too else ''}: got {value!r}.")
        if value < least:
            raise ConfigError(f"`{name}` must be {least} or more: got {value}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ConfigError: with the choices in its text.
    """
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}: got {value!r}.")


def check_levels(tolerance: float, alpha: float) -> None:
    """Refuse a tolerance or an alpha out of range.

    Raises:
        ConfigError: unless 0 <= tolerance < 1 and 0 < alpha < 1.
    """
    if not _is_real(tolerance) or not 0.0 <= tolerance < 1.0:
        raise ConfigError(f"`tolerance` is a drop of accuracy in [0, 1), 0.005 for half a point: got {tolerance!r}.")
    if not _is_real(alpha) or not 0.0 < alpha < 1.0:
        raise ConfigError(f"`alpha` is an error probability in (0, 1), such as 0.05: got {alpha!r}.")


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share of the run's time; None is no budget.

    Raises:
        ConfigError: unless it is None or 0 < value < 1.
    """
    if value is not None and (not _is_real(value) or not 0.0 < value < 1.0):
        raise ConfigError(f"`{name}` is a share of the run's time in (0, 1), such as 0.05, or None: got {value!r}.")


def check_seed(seed: Any) -> None:
    """Refuse what is no seed.

    Raises:
        ConfigError: unless it is a whole number.
    """
    if not _is_int(seed):
        raise ConfigError(f"`seed` must be a whole number, such as 0: got {seed!r}.")


def check_real(name: str, value: Any, below: float = math.inf) -> None:
    """Refuse what is no number from 0 on.

    Args:
        name: of the argument.
        value: what was given.
        below: what it may not come to.

    Raises:
        ConfigError: unless 0 <= value < below.
    """
    if not _is_real(value) or not 0.0 <= value < below:
        wanted = "a finite number of 0 or more" if math.isinf(below) else f"a number in [0, {below:g})"
        raise ConfigError(f"`{name}` must be {wanted}: got {value!r}.")


def check_metric(name: str, value: Any) -> None:
    """Refuse what is no name of a metric.

    Raises:
        ConfigError: unless it is a text that is not empty.
    """
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f'`{name}` must be the name of a metric that validation logs, such as "val_loss": got {value!r}.'
        )


def as_names(name: str, values: Any) -> list[str]:
    """Names from one or from a list of them.

    Raises:
        ConfigError: for anything else.
    """
    given = [values] if isinstance(values, str) else None if isinstance(values, Mapping) else _as_tuple(values)
    if given is None or not all(isinstance(value, str) for value in given):
        raise ConfigError(f'`{name}` must be a name or a list of names, such as ["humaneval"]: got {values!r}.')
    return list(given)


def as_steps(at_steps: Any) -> tuple[int, ...]:
    """Optimizer steps from a list of them.

    Raises:
        ConfigError: for anything but whole numbers from 1.
    """
    steps = _as_tuple(at_steps)
    if steps is None:
        raise ConfigError(f"`at_steps` must be a list of optimizer steps, such as [100]: got {at_steps!r}.")
    wrong = [step for step in steps if not _is_int(step) or step < 1]
    if wrong:
        raise ConfigError(
            f"`at_steps` must hold whole numbers of 1 or more: got {wrong}. `on_fit_start` looks before the first step."
        )
    return steps


def as_fractions(at_fractions: Any) -> tuple[float, ...]:
    """Shares of the run from a list of them.

    Raises:
        ConfigError: for anything but numbers above 0, up to 1.
    """
    fractions = _as_tuple(at_fractions)
    if fractions is None:
        raise ConfigError(
            f"`at_fractions` must be a list of shares of the run, such as [0.25, 0.5]: got {at_fractions!r}."
        )
    wrong = [share for share in fractions if not _is_real(share) or not 0.0 < share <= 1.0]
    if wrong:
        raise ConfigError(
            f"`at_fractions` must hold shares of the run above 0, up to 1: got {wrong}. `on_fit_start` looks before "
            f"the first step."
        )
    return tuple(map(float, fractions))


def as_tasks(name: str, tasks: Any) -> list[Any]:
    """Tasks from one or from a list.

    Raises:
        ConfigError: for anything but names, paths and dicts, or for none at all.
    """
    kinds = (str, Mapping, Path)
    given = [tasks] if isinstance(tasks, kinds) else list(tasks) if isinstance(tasks, Iterable) else None
    if given is None or not all(isinstance(task, kinds) for task in given):
        raise ConfigError(f"`{name}` must be task names, YAML paths or dicts, one or a list of them: got {tasks!r}.")
    joined = next((task for task in given if isinstance(task, str) and "," in task and not Path(task).exists()), None)
    if joined is not None:
        parts = [part.strip() for part in joined.split(",")]
        raise ConfigError(f"`{name}` takes several tasks as a list, not in one text: got {joined!r}, write {parts!r}.")
    if not given:
        raise ConfigError(f"`{name}` is empty: give at least one task name, YAML path or dict.")
    return given


def task_label(task: Any) -> str:
    """What a task is called before it is loaded."""
    return str(task.get("task")) if isinstance(task, Mapping) else str(task)


def _as_tuple(values: Any) -> tuple[Any, ...] | None:
    return None if isinstance(values, str) or not isinstance(values, Iterable) else tuple(values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
