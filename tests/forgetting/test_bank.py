# SPDX-License-Identifier: Apache-2.0
"""The item bank: fresh items, fair shares, the same every time."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.bank import ItemBank

banks = st.tuples(
    st.dictionaries(st.sampled_from("abcd"), st.integers(1, 80), min_size=1), st.integers(1, 100), st.integers(0, 5)
)
looks = st.lists(st.integers(1, 60), min_size=1, max_size=8)


@given(banks, looks)
def test_looks_of_any_size_bring_no_item_twice_before_all_have_come(
    given_bank: tuple[dict[str, int], int, int], given_looks: list[int]
) -> None:
    sizes, items, seed = given_bank
    bank = ItemBank(sizes, items, seed)
    seen: dict[str, list[int]] = {name: [] for name in sizes}
    for look in given_looks:
        for name, ids in bank.take(look).items():
            assert ids == sorted(set(ids))
            seen[name] += ids
    for name, n in sizes.items():
        for start in range(0, len(seen[name]), n):  # each pass through the task
            turn = seen[name][start : start + n]
            assert len(set(turn)) == len(turn)
    assert bank.fresh == sum(n - len(set(seen[name])) for name, n in sizes.items())
    assert bank.used_up == [name for name, n in sizes.items() if len(seen[name]) >= n]


@given(banks)
def test_look_has_the_asked_number_in_proportion(given_bank: tuple[dict[str, int], int, int]) -> None:
    sizes, items, seed = given_bank
    bank = ItemBank(sizes, items, seed)
    assert bank.size == sum(sizes.values())
    quota = {name: len(ids) for name, ids in bank.take().items()}
    total = min(items, sum(sizes.values()))
    assert all(1 <= quota[name] <= n for name, n in sizes.items())
    assert total <= sum(quota.values()) <= total + len(sizes)  # more only where a task would have none
    for name, n in sizes.items():
        assert abs(quota[name] - total * n / sum(sizes.values())) <= 1


@given(banks, looks)
def test_a_cut_changes_nothing(given_bank: tuple[dict[str, int], int, int], given_looks: list[int]) -> None:
    whole, first, second = (ItemBank(*given_bank) for _ in range(3))
    cut = len(given_looks) // 2
    for look in given_looks[:cut]:
        first.take(look)
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    expected = [whole.take(look) for look in given_looks]
    assert [second.take(look) for look in given_looks[cut:]] == expected[cut:]


@st.composite
def grouped_banks(draw: st.DrawFn) -> dict[str, Any]:
    """Tasks, of which some have groups of any sizes whose documents lie anywhere."""
    sizes = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 60), min_size=1))
    of = {
        name: draw(st.lists(st.integers(0, draw(st.integers(0, n))), min_size=n, max_size=n))
        for name, n in sizes.items()
        if draw(st.booleans())
    }
    return {"sizes": sizes, "items_per_look": draw(st.integers(1, 80)), "seed": draw(st.integers(0, 5)), "groups": of}


@given(grouped_banks(), looks)
def test_no_group_is_split_and_none_comes_twice_before_all_have_come(bank: dict[str, Any], given_looks: Any) -> None:
    groups = {name: bank["groups"].get(name, range(n)) for name, n in bank["sizes"].items()}
    one = ItemBank(**bank)
    assert one.largest_groups == {name: max(Counter(of).values()) for name, of in groups.items()}
    before: dict[str, list[int]] = {name: [] for name in groups}
    for look in given_looks:
        expected, fresh = one.ahead(look), one.sample(look)
        taken = one.take(look)
        assert taken == expected
        for name, of in groups.items():
            for ids in (taken[name], fresh[name]):
                chosen = {of[i] for i in ids}
                assert ids == [i for i, group in enumerate(of) if group in chosen]  # whole, ascending
            assert not {of[i] for i in taken[name]} & {of[i] for i in before[name]}
            before[name] = before[name] + taken[name]
            if len(before[name]) == len(of):  # the pass is over
                before[name] = []


@given(grouped_banks())
def test_look_of_groups_is_its_share_and_less_than_one_group_more(bank: dict[str, Any]) -> None:
    singles = ItemBank(bank["sizes"], bank["items_per_look"], bank["seed"]).take()
    for taken in (ItemBank(**bank).take(), ItemBank(**bank).sample(bank["items_per_look"])):
        for name, ids in taken.items():
            most = ItemBank(**bank).largest_groups[name]
            assert len(singles[name]) <= len(ids) < len(singles[name]) + most


@given(grouped_banks(), looks)
def test_a_cut_changes_nothing_where_there_are_groups(bank: dict[str, Any], given_looks: list[int]) -> None:
    whole, first, second = (ItemBank(**bank) for _ in range(3))
    cut = len(given_looks) // 2
    for look in given_looks[:cut]:
        first.take(look)
    assert second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    expected = [whole.take(look) for look in given_looks]
    assert [second.take(look) for look in given_looks[cut:]] == expected[cut:]
    assert second.sample(7) == whole.sample(7)


@given(banks, looks)
def test_groups_of_one_item_are_no_groups(given_bank: tuple[dict[str, int], int, int], given_looks: list[int]) -> None:
    sizes, items, seed = given_bank
    plain = ItemBank(sizes, items, seed)
    grouped = ItemBank(sizes, items, seed, {name: [f"group {i}" for i in range(n)] for name, n in sizes.items()})
    for look in given_looks:
        assert plain.sample(look) == grouped.sample(look)
        assert plain.take(look) == grouped.take(look)


def test_the_order_of_items_without_groups_is_that_of_earlier_versions() -> None:
    """Checkpoints of theirs go on at the same items."""
    bank = ItemBank({"a": 12, "b": 5}, 6, seed=3)
    assert [bank.take() for _ in range(3)] == [
        {"a": [1, 5, 8, 10], "b": [0, 4]},
        {"a": [2, 3, 4, 7], "b": [1, 3]},
        {"a": [0, 6, 9, 11], "b": [2]},
    ]


def test_every_item_comes_and_then_all_again_in_another_order() -> None:
    bank = ItemBank({"a": 30, "b": 10}, 8)
    first = [bank.take() for _ in range(5)]
    assert {name: len(ids) for name, ids in first[0].items()} == {"a": 6, "b": 2}
    assert sorted(i for look in first for i in look["a"]) == list(range(30))
    again = [bank.take() for _ in range(5)]
    assert sorted(i for look in again for i in look["a"]) == list(range(30))
    assert again != first


def test_a_sample_takes_unseen_items_first_and_counts_none() -> None:
    bank = ItemBank({"a": 30, "b": 10}, 8)
    assert bank.sample() == bank.sample(99) == {"a": list(range(30)), "b": list(range(10))}
    seen = bank.take(20)
    part = bank.sample(20)
    assert {name: set(ids) & set(part[name]) for name, ids in seen.items()} == {"a": set(), "b": set()}
    more = bank.sample(24)
    assert {name: len(set(ids) & set(more[name])) for name, ids in seen.items()} == {"a": 3, "b": 1}
    assert bank.fresh == 20
    assert bank.take(20) == part


def test_order_comes_from_the_seed_alone() -> None:
    assert ItemBank({"a": 50}, 10, seed=1).take() == ItemBank({"a": 50}, 10, seed=1).take()
    assert ItemBank({"a": 50}, 10, seed=1).take() != ItemBank({"a": 50}, 10, seed=2).take()


def test_state_of_another_bank_is_not_taken() -> None:
    bank = ItemBank({"a": 50}, 10)
    bank.take()
    grouped = ItemBank({"a": 50}, 10, groups={"a": [i // 2 for i in range(50)]})
    for other in (ItemBank({"a": 50}, 10, seed=1), ItemBank({"a": 51}, 10), ItemBank({"b": 50}, 10), grouped):
        assert not other.load_state_dict(bank.state_dict())
        assert other.fresh == other.size
    grouped.take()
    assert not ItemBank({"a": 50}, 10).load_state_dict(grouped.state_dict())
    assert not ItemBank({"a": 50}, 10, groups={"a": [i // 5 for i in range(50)]}).load_state_dict(grouped.state_dict())


def test_bank_refuses_looks_without_items() -> None:
    with pytest.raises(ConfigError, match="items_per_eval.*got 0"):
        ItemBank({"a": 5}, 0)
    with pytest.raises(ConfigError, match=r"group of each document: got \{'a': 4\}"):
        ItemBank({"a": 5}, 1, groups={"a": [1, 1, 2, 2]})
