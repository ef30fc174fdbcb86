# SPDX-License-Identifier: Apache-2.0
"""`validate_adapter`: a folder for each rule, and what each loader does with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.io.adapter import save_adapter
from lightning_lora.io.loader_rules import RULES
from lightning_lora.io.loaders import LOADERS, validate_adapter
from lightning_lora.model.apply import apply_lora
from tests.helpers import random_adapters, tiny_llama

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
ALL = set(LOADERS)
SERVERS = ALL - {"peft"}


def written(tmp_path: Path, **config: Any) -> Path:
    """A folder of a tiny Llama that names its base."""
    base = tiny_llama()
    apply_lora(base, LoRAConfig(**{"r": 8, "lora_alpha": 16, **config}))
    save_adapter(random_adapters(base), tmp_path / "a")
    edit(tmp_path / "a", base_model_name_or_path="someone/base")
    return tmp_path / "a"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rename(old: str, new: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def add(key: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(P + key, torch.ones(shape))


def whole_module(folder: Path) -> None:
    path = folder / "lightning_lora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "names": "module"}))


def fails(folder: Path, **arguments: Any) -> dict[str, set[str]]:
    """By name of a rule, the loaders that have a problem with it."""
    found: dict[str, set[str]] = {}
    for loader, problems in validate_adapter(folder, "all", **arguments).loaders.items():
        for problem in problems:
            found.setdefault(problem.rule, set()).add(loader)
            assert problem.remedy
            assert loader in problem.reason
    return found


def test_a_plain_adapter_is_ok_everywhere(tmp_path: Path) -> None:
    report = validate_adapter(written(tmp_path), "all")
    assert report.ok, str(report)
    assert set(report.loaders) == ALL
    assert report.problems == []
    assert report.to_dict()["ok"] is True
    assert "vllm: ok" in str(report)
    assert "not judged: whether a server knows the base's architecture" in str(report)
    assert "not judged" not in str(validate_adapter(tmp_path / "a", "peft"))


# rule: (configuration of the adapter, what is done to the folder, who has a problem)
Change = Callable[[Path], Any]
CASES: dict[str, tuple[dict[str, Any], Change, set[str]]] = {
    "method": ({}, lambda f: edit(f, peft_type="LOHA"), SERVERS),
    "no_type": ({}, lambda f: edit(f, peft_type=None), {"peft"}),
    "incomplete": ({}, lambda f: edit_tensors(f, lambda t: t.pop(f"{P}{Q}.lora_B.weight")), ALL),
    "prefix": ({}, lambda f: edit_tensors(f, rename(P, "")), {"peft", "tgi"}),
    "names": ({}, lambda f: edit_tensors(f, rename(P, P + "_orig_mod.")), ALL),
    "whole_module": ({}, whole_module, ALL),
    "fields": ({}, lambda f: edit(f, target_modules=None), {"vllm", "sglang"}),
    "dora": ({}, lambda f: edit_tensors(f, add(f"{Q}.lora_magnitude_vector", 64)), SERVERS),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, lambda f: None, SERVERS),
    "bias": ({}, lambda f: edit(f, bias="lora_only"), SERVERS),
    "embeddings": ({}, lambda f: edit_tensors(f, add("model.embed_tokens.lora_embedding_A", 8, 64)), {"tgi"}),
    "token_rows": ({}, lambda f: edit(f, trainable_token_indices=[1, 2]), SERVERS),
    "experts": ({}, lambda f: edit(f, target_parameters=["experts.down_proj"]), SERVERS),
    "convolutions": ({}, lambda f: edit_tensors(f, add(f"{Q}.lora_A.weight", 8, 4, 4, 4)), SERVERS),
    "base_changed": ({}, lambda f: edit(f, init_lora_weights="pissa"), SERVERS),
    "extensions": ({}, lambda f: edit(f, layer_replication=[[0, 1]]), SERVERS),
    "regex": ({}, lambda f: edit(f, target_modules=".*_proj"), {"sglang"}),
    "rank": ({"r": 32}, lambda f: None, {"vllm"}),
    "rank_step": ({"r": 4}, lambda f: None, {"tgi"}),
    "rank_span": ({"r": 256}, lambda f: None, {"tgi"}),
    "uniform_rank": ({"rank_pattern": {r"layers\.0\..*": 16}}, lambda f: None, {"tgi"}),
    "scale": ({"use_rslora": True}, lambda f: None, {"sglang", "llama.cpp"}),
    "siblings": ({"target_modules": ["q_proj", "k_proj", "o_proj"]}, lambda f: None, {"sglang"}),
    "layers": ({"layers_to_transform": [1], "layers_pattern": "layers"}, lambda f: None, {"tgi"}),
    "base_name": ({}, lambda f: edit(f, base_model_name_or_path=None), {"tgi", "llama.cpp"}),
}


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_finds_its_folder_and_nothing_else_does_not(rule: str, tmp_path: Path) -> None:
    config, change, expected = CASES[rule]
    folder = written(tmp_path, **config)
    change(folder)
    found = fails(folder)
    assert found.get(rule) == expected
    beside = {"rank_span": {"rank"}, "uniform_rank": {"scale"}, "no_type": {"method"}}
    assert set(found) - {rule} == beside.get(rule, set())


def test_every_rule_has_a_case_and_every_entry_of_a_loader_a_rule() -> None:
    assert set(CASES) | {"tied_head"} == set(RULES)
    for loader in LOADERS.values():
        assert set(loader.does) <= set(RULES)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_on_a_tied_base_is_known_with_the_bases_folder(tied: bool, tmp_path: Path) -> None:
    folder = written(tmp_path, target_modules=["q_proj", "k_proj", "v_proj", "lm_head"])
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied, "num_hidden_layers": 2}))
    assert fails(folder, base_dir=tmp_path) == ({"tied_head": {"llama.cpp"}} if tied else {})
    assert fails(folder) == {}


def test_the_number_of_layers_comes_from_the_bases_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 3}}))
    assert fails(written(tmp_path), base_dir=tmp_path) == {"layers": {"tgi"}}


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"use_rslora": True}, {"sglang", "llama.cpp"}),
        ({"alpha_pattern": {"q_proj": 4}}, SERVERS),
        ({"rank_pattern": {"q_proj": 16}}, SERVERS - {"llama.cpp"}),
        ({"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"q_proj": 32}}, {"llama.cpp"}),
    ],
)
def test_a_scale_that_a_loader_gets_wrong_is_said_with_both_numbers(
    config: dict[str, Any], wrong: set[str], tmp_path: Path
) -> None:
    folder = written(tmp_path, **config)
    assert fails(folder)["scale"] == wrong
    reason = next(p.reason for p in validate_adapter(folder, "all").problems if p.rule == "scale")
    assert "trained with the scale" in reason
    assert next(iter(config)) in reason


def test_the_servers_limit_can_be_given(tmp_path: Path) -> None:
    folder = written(tmp_path, r=32)
    problem = validate_adapter(folder).loaders["vllm"][0]
    assert problem.rule == "rank"
    assert "--max-lora-rank 32" in str(problem)
    assert validate_adapter(folder, max_rank=32).ok
    assert not validate_adapter(folder, "sglang", max_rank=16).ok
    edit(folder, r=600)
    assert "merge it" in validate_adapter(folder).loaders["vllm"][0].remedy


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: t.clear() or t.update({"x": torch.ones(1)}), "incomplete"),
        (add(f"{Q}.lora_A.default.weight", 2, 2), "names"),
        (lambda t: t.__setitem__(f"{P}{Q}.lora_A.weight", torch.ones(0, 64)), "incomplete"),
        (add(f"{Q}.bias", 64), "bias"),
        (add(f"{Q}.lora_B.bias", 64), "bias"),
        (add("model.norm.weight", 64), "modules_to_save"),
        (add("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 64), "token_rows"),
    ],
)
def test_tensors_tell_too(change: Any, rule: str, tmp_path: Path) -> None:
    folder = written(tmp_path)
    edit_tensors(folder, change)
    assert "vllm" in fails(folder)[rule]


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`target` must be one of"):
        validate_adapter(tmp_path, "ollama")
    with pytest.raises(CheckpointError, match="there is no adapter folder"):
        validate_adapter(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read"):
        validate_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object, got list"):
        validate_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no JSON"):
        validate_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="pickles"):
        validate_adapter(tmp_path)


def test_a_broken_pattern_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path)
    edit(folder, rank_pattern={"(": 2})
    with pytest.raises(CheckpointError, match="no regular expression"):
        validate_adapter(folder)


def test_nulls_are_pefts_defaults(tmp_path: Path) -> None:
    folder = written(tmp_path)
    edit(folder, r=None, lora_alpha=None)
    assert fails(folder) == {"fields": {"vllm", "sglang"}}
