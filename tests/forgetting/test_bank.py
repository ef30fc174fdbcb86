# SPDX-License-Identifier: Apache-2.0
"""The item bank: fresh items, fair shares, the same every time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.bank import ItemBank

banks = st.tuples(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 80), min_size=1), st.integers(1, 100), st.integers(0, 5)
)


@given(banks)
def test_looks_bring_no_item_twice_before_all_have_come(given_bank: tuple[dict[str, int], int, int]) -> None:
    sizes, items, seed = given_bank
    bank = ItemBank(sizes, items, seed)
    seen: dict[str, list[int]] = {name: [] for name in sizes}
    for look in range(bank.fresh_looks):
        for name, ids in bank.items(look).items():
            assert ids == sorted(set(ids))
            seen[name] += ids
    assert all(len(set(ids)) == len(ids) for ids in seen.values())


@given(banks)
def test_look_has_the_asked_number_in_proportion(given_bank: tuple[dict[str, int], int, int]) -> None:
    sizes, items, seed = given_bank
    quota = ItemBank(sizes, items, seed).quota
    total = min(items, sum(sizes.values()))
    assert all(1 <= quota[name] <= n for name, n in sizes.items())
    assert total <= sum(quota.values()) <= total + len(sizes)  # more only where a task would have none
    for name, n in sizes.items():
        assert abs(quota[name] - total * n / sum(sizes.values())) <= 1


def test_every_item_comes_when_looks_divide_the_bank() -> None:
    bank = ItemBank({"a": 30, "b": 10}, 8)
    assert bank.quota == {"a": 6, "b": 2}
    assert bank.fresh_looks == 5
    assert sorted(i for look in range(5) for i in bank.items(look)["a"]) == list(range(30))
    assert bank.items(5) == bank.items(0)  # the same order again
    assert bank.everything() == {"a": list(range(30)), "b": list(range(10))}


def test_order_comes_from_the_seed_alone() -> None:
    assert ItemBank({"a": 50}, 10, seed=1).items(2) == ItemBank({"a": 50}, 10, seed=1).items(2)
    assert ItemBank({"a": 50}, 10, seed=1).items(2) != ItemBank({"a": 50}, 10, seed=2).items(2)
    assert ItemBank({"a": 50}, 10).describe() == {"seed": 0, "sizes": {"a": 50}, "quota": {"a": 10}}


def test_bank_refuses_looks_without_items() -> None:
    with pytest.raises(ConfigError, match="items_per_eval.*got 0"):
        ItemBank({"a": 5}, 0)
