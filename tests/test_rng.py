# SPDX-License-Identifier: Apache-2.0
"""`RNGState`: every generator goes on where it was, also after a file and after an exception."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lora.rng import RNGState, preserve_rng


def _draw() -> list[Any]:
    gauss = random.gauss(0, 1), float(np.random.randn())  # both keep a second value back
    return [*gauss, random.random(), float(np.random.rand()), torch.rand(3).tolist(), torch.randn(17).tolist()]


def test_restore_goes_back() -> None:
    _draw()
    state = RNGState.capture()
    first = _draw()
    assert _draw() != first
    state.restore()
    assert _draw() == first
    state.restore()
    assert _draw() == first


def test_a_file_keeps_it_and_loads_with_weights_only(tmp_path: Path) -> None:
    state = RNGState.capture()
    first = _draw()
    torch.save(state.to_dict(), tmp_path / "rng.pt")
    RNGState.from_dict(torch.load(tmp_path / "rng.pt", weights_only=True)).restore()
    assert _draw() == first


def test_preserve_undoes_what_is_drawn_inside_on_exceptions_too() -> None:
    state = RNGState.capture()
    first = _draw()
    state.restore()
    with preserve_rng():
        _draw()
    with pytest.raises(ZeroDivisionError), preserve_rng():
        _draw()
        1 / 0  # noqa: B018
    assert _draw() == first


@pytest.mark.gpu
def test_the_gpu_generator_too() -> None:
    torch.rand(1, device="cuda")
    state = RNGState.capture()
    first = torch.rand(4, device="cuda")
    state.restore()
    assert torch.equal(torch.rand(4, device="cuda"), first)
