# SPDX-License-Identifier: Apache-2.0
"""Two local tasks, loaded once for all tests of forgetting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_lora.forgetting.tasks import LoadedTask, load_tasks
from tests.forgetting import tiny


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tiny.write_task(folder, "alpha", tiny.items(40, seed=1))
    tiny.write_task(folder, "beta", tiny.items(20, seed=2, choices=3))
    tiny.write_task(folder, "known", tiny.known_items(tiny.llama(), 60, seed=3))
    return folder


@pytest.fixture(scope="session")
def loaded(task_folder: Path) -> dict[str, LoadedTask]:
    return load_tasks([str(task_folder / "alpha.yaml"), str(task_folder / "beta.yaml")])


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny.tokenizer()
