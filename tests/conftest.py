# SPDX-License-Identifier: Apache-2.0
"""What every test shares: a fixed seed, a working folder of its own, and the GPU mark."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

# Before the tests: pytest-xdist takes its workers' warnings in threads, and each would begin to import Lightning.
import lightning_lora.errors  # noqa: F401

settings.register_profile("house", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("house")

ROOT = Path(__file__).parents[1]
BEFORE = pytest.StashKey[set[str]]()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test's numbers do not depend on the tests before it."""
    random.seed(0)
    np.random.seed(0)  # the legacy generator is the one that libraries draw from
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_no_process_group() -> Iterator[None]:
    """A Trainer on "ddp" leaves a group and its environment variables, by which a next one would wait for others."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a Trainer writes by default (logs, checkpoints) lands in the test's folder."""
    monkeypatch.chdir(tmp_path)


def _at_the_root() -> set[str]:
    """What lies at the root and is not for git to ignore."""
    names = {name for name in os.listdir(ROOT) if not name.startswith(".") and not name.endswith(".egg-info")}
    return names - {"build", "dist", "outputs", "site"}


def pytest_sessionstart(session: pytest.Session) -> None:
    """What lies there before the tests."""
    session.config.stash[BEFORE] = _at_the_root()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A test that writes into the repository is a failure: processes of their own start at its root."""
    left = _at_the_root() - session.config.stash[BEFORE]
    if left and not hasattr(session.config, "workerinput"):
        session.exitstatus = 1
        print(f"\nFAILED: tests left {', '.join(sorted(left))} at the root of the repository")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none, with the reason said."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
