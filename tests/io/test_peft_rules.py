# SPDX-License-Identifier: Apache-2.0
"""The rules agree with PEFT's own matching, and the shortest configuration says what it must."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key

from lightning_lora.errors import UnsupportedError
from lightning_lora.io.peft_rules import Scale, Spec, shortest_spec
from lightning_lora.io.peft_types import type_of

PARTS = st.sampled_from(["layers", "blocks", "0", "1", "2", "q", "k", "fc", "head", "lm_head", "mlp"])
NAME = st.lists(PARTS, min_size=1, max_size=5).map(".".join)
NAMES = st.lists(NAME, min_size=1, max_size=12, unique=True)


def peft_targets(config: LoraConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    return bool(found) and not isinstance(found, _ExcludedModule)


@given(
    names=NAMES,
    targets=st.one_of(st.lists(NAME, min_size=1, max_size=3), st.sampled_from([".*q", "layers.*(q|k)", "q|fc"])),
    exclude=st.one_of(st.none(), st.lists(NAME, max_size=2), st.just(".*fc")),
    saved=st.one_of(st.none(), st.lists(NAME, max_size=2)),
    layers=st.one_of(st.none(), st.just([]), st.just(1), st.lists(st.integers(0, 2), max_size=2)),
    pattern=st.sampled_from([None, "layers", ["layers", "blocks"]]),
)
def test_targets_agree_with_peft(names, targets, exclude, saved, layers, pattern) -> None:
    if isinstance(targets, str):
        layers = None  # PEFT refuses the pair
    if layers in (None, []):
        pattern = None
    config = LoraConfig(
        target_modules=targets,
        exclude_modules=exclude,
        modules_to_save=saved,
        layers_to_transform=layers,
        layers_pattern=pattern,
    )
    spec = Spec(targets, 8, 8, saved, exclude, layers, pattern)
    try:
        expected = [peft_targets(config, name) for name in names]
    except UnboundLocalError:  # PEFT's own, for several patterns of which none matches
        return
    assert [spec.targets(name) for name in names] == expected


@given(names=NAMES, keys=st.lists(st.one_of(NAME, st.sampled_from(["^q", ".*k", r"layers\.0.*"])), max_size=3))
def test_ranks_agree_with_peft(names, keys) -> None:
    table = {key: i + 1 for i, key in enumerate(keys)}
    spec = Spec(["q"], 99, 99, rank_pattern=table, alpha_pattern=table)
    expected = [table.get(get_pattern_key(table.keys(), name), 99) for name in names]
    assert [spec.rank(name) for name in names] == expected
    assert [spec.alpha(name) for name in names] == expected


@given(data=st.data(), names=NAMES)
def test_shortest_spec_says_exactly_what_it_was_given(data, names) -> None:
    adapted = {
        name: Scale(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([8.0, 16.0])))
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    }
    spec = shortest_spec(names, adapted, [])
    config = LoraConfig(target_modules=spec.target_modules)
    assert {name for name in names if peft_targets(config, name)} == set(adapted)
    for name, scale in adapted.items():
        assert (spec.rank(name), spec.alpha(name)) == (scale.r, scale.lora_alpha)


LLAMA = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in ("self_attn", "self_attn.q_proj", "self_attn.k_proj", "mlp", "mlp.up_proj")
] + ["model", "model.layers", "model.layers.0", "model.layers.1", "lm_head"]


def all_of(*suffixes: str) -> dict[str, Scale]:
    return {name: Scale(8, 16.0) for name in LLAMA if name.endswith(suffixes)}


def test_suffixes_where_they_are_unambiguous() -> None:
    spec = shortest_spec(LLAMA, all_of("q_proj", "up_proj"), ["lm_head"])
    assert spec.target_modules == ["q_proj", "up_proj"]
    assert spec.modules_to_save == ["lm_head"]
    assert spec.rank_pattern == {}


def test_full_paths_where_a_neighbour_shares_the_name() -> None:
    adapted = {"model.layers.0.self_attn.q_proj": Scale(8, 16.0)}
    assert shortest_spec(LLAMA, adapted, []).target_modules == ["model.layers.0.self_attn.q_proj"]


def test_a_layer_range_of_the_users_is_kept() -> None:
    adapted = {"model.layers.1.self_attn.q_proj": Scale(8, 16.0)}
    spec = shortest_spec(LLAMA, adapted, [], Spec("all-linear", 8, 16.0, layers_to_transform=[1]))
    assert (spec.target_modules, spec.layers_to_transform) == (["q_proj"], [1])


def test_a_regex_where_even_the_full_path_ends_another_name() -> None:
    spec = shortest_spec(["fc", "block", "block.fc"], {"fc": Scale(8, 16.0)}, [])
    assert spec.target_modules == "fc"
    assert not spec.targets("block.fc")


def test_rank_patterns_by_suffix_and_by_whole_name() -> None:
    adapted = all_of("q_proj", "up_proj", "k_proj")
    by_suffix = {n: Scale(4, 16.0) if n.endswith("up_proj") else s for n, s in adapted.items()}
    assert shortest_spec(LLAMA, by_suffix, []).rank_pattern == {"up_proj": 4}
    one = dict(adapted) | {"model.layers.1.mlp.up_proj": Scale(4, 16.0)}
    assert shortest_spec(LLAMA, one, []).rank_pattern == {r"^model\.layers\.1\.mlp\.up_proj": 4}


def test_a_saved_module_whose_name_ends_another_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'head' is kept in full and 'lm_head' is not.*Rename one of them"):
        shortest_spec(["head", "lm_head", "fc"], {"fc": Scale(8, 16.0)}, ["head"])


def test_an_adapted_module_below_a_saved_name_takes_the_full_path_of_the_saved_one() -> None:
    names = ["head", "blocks.head", "blocks.head.fc", "fc"]
    with pytest.raises(UnsupportedError, match="'head' is kept in full and 'blocks.head' is not"):
        shortest_spec(names, {"blocks.head.fc": Scale(8, 16.0)}, ["head"])
    with pytest.raises(UnsupportedError, match="'a.b.fc'.*would be excluded"):
        shortest_spec(["b.c", "a.b.fc", "b"], {"a.b.fc": Scale(8, 16.0)}, ["b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "XLORA"}, "`peft_type` is 'XLORA'; this version reads .*LORA"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication`"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights.*path_initial_model"),
        ({"init_lora_weights": "loftq"}, "changes the base weights"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change, message) -> None:
    type_of({"peft_type": "LORA", "bias": "none", "a_key_of_tomorrow": 3}, "file")
    with pytest.raises(UnsupportedError, match=message):
        type_of({"peft_type": "LORA"} | change, "file")
