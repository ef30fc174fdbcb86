# SPDX-License-Identifier: Apache-2.0
"""Every strategy, dense and packed, however a run is cut: resumed, it ends with the bits of one that never was."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.matrix import CASES, assert_resumed, played

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, by one process that forks the ranks of each run."""
    return played(tmp_path_factory.mktemp("matrix"), CASES)


@pytest.mark.parametrize("case", CASES)
def test_resumes_to_the_same_bits(results: dict[str, Any], case: str) -> None:
    assert_resumed(results[case])


def test_both_signals_are_among_the_cuts(results: dict[str, Any]) -> None:
    cuts = {found["cut"].rsplit("-", 3)[0].rpartition("-")[2] for found in results.values()}
    assert cuts == {"SIGKILL", "SIGTERM"}


def test_the_whole_matrix_is_there() -> None:
    assert len(CASES) == 4 * 2 * 3
