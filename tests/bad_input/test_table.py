# SPDX-License-Identifier: Apache-2.0
"""The page's table and the tests' rows are the same."""

from __future__ import annotations

import itertools

from lightning_lora import errors
from tests.bad_input import test_adapters, test_checkpoints, test_ranks, test_shards, test_writing
from tests.bad_input.row import page_rows

ROWS = [
    *test_checkpoints.ROWS,
    *test_shards.ROWS,
    *test_adapters.ROWS,
    *test_adapters.MODELS,
    *test_writing.ROWS,
    *test_writing.RUNS,
    test_writing.GOES_ON,
    test_writing.MERGE,
    *test_ranks.ROWS,
    *test_ranks.TWO_RUNS,
]


def test_each_row_of_the_page_has_a_test_and_each_test_a_row() -> None:
    page = page_rows()
    assert list(page) == [row.name for row in ROWS]
    assert len(page) >= 30


def test_the_page_says_what_the_tests_ask_for() -> None:
    page = page_rows()
    for row in ROWS:
        assert page[row.name] == (row.error, row.says), row.name


def test_names_and_errors_are_sound() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    known = {*vars(errors), "FileNotFoundError", "-"}
    assert {row.error for row in ROWS} <= known
    pairs = itertools.groupby(names, key=lambda name: name.split("-")[0])
    assert sum(1 for _ in pairs) >= 8
