# SPDX-License-Identifier: Apache-2.0
"""A model that holds many adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

from lightning_lora import load_adapter
from tests.helpers import tiny_llama
from tests.model.many import ADAPTERS, adapter_folder, logits


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Folders of `ADAPTERS` for `tiny_llama`, and the logits of each alone."""
    folder = tmp_path_factory.mktemp("adapters")
    wanted = {n: adapter_folder(folder / n, tiny_llama, i, **c) for i, (n, c) in enumerate(ADAPTERS.items())}
    return folder, {**wanted, "__base__": logits(tiny_llama().eval())}


@pytest.fixture
def many(llamas: tuple[Path, dict[str, Tensor]]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A llama that holds all of `ADAPTERS`, "plain" in use."""
    folder, wanted = llamas
    model = tiny_llama().eval()
    for name in ADAPTERS:
        load_adapter(model, folder / name, name=name)
    return model, wanted
