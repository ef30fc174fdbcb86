# SPDX-License-Identifier: Apache-2.0
"""Which modules are chosen, and what is said when the choice is odd."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError, UnsupportedError
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.targets import Targets, find_heads, find_targets
from tests.helpers import LM, TinyNet, tiny_gpt2, tiny_llama
from tests.model.nets import Block, notices, tiny_bert

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


def _targets(model: nn.Module, **config: Any) -> Targets:
    return find_targets(model, LoRAConfig(**config))


def _llama_names(suffixes: list[str], layers: tuple[int, ...] = (0, 1), prefix: str = "") -> list[str]:
    part = {**dict.fromkeys(ATTENTION, "self_attn"), **dict.fromkeys(MLP, "mlp")}
    return [f"{prefix}model.layers.{i}.{part[s]}.{s}" for i in layers for s in suffixes]


# all-linear


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_of_a_llama_is_all_but_the_head(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    chosen = _targets(model)
    assert chosen.adapted == chosen.packed == _llama_names(ATTENTION + MLP)
    assert chosen.saved == []
    assert find_heads(model) == {"lm_head"}


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class Grouped(nn.Linear):
    """Two block-diagonal halves, ``(..., 2, in) -> (..., 2, out / 2)``."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...gi,goi->...go", x, self.weight.view(2, -1, self.in_features))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_linears_by_class_that_are_none_by_what_they_compute_are_left_alone() -> None:
    model = nn.Sequential()
    for name, kind in {"router": Router, "grouped": Grouped, "scaled": Scaled, "plain": nn.Linear}.items():
        model.add_module(name, kind(8, 8))
    said = notices(lambda: _targets(model))
    assert _targets(model).adapted == ["scaled", "plain"]
    assert any("2 layers, 'router' first (Router)" in text for text in said)
    with pytest.raises(TargetError, match="'router', a Router: only linear layers"):
        _targets(model, target_modules=["router", "plain"])


def test_all_linear_inside_a_lightning_module() -> None:
    assert _targets(LM(tiny_llama())).adapted == _llama_names(ATTENTION + MLP, prefix="net.")


def test_all_linear_of_a_gpt2_takes_its_conv1d() -> None:
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert _targets(tiny_gpt2()).adapted == [f"transformer.h.{i}.{n}" for i in range(2) for n in names]


def test_the_head_of_a_plain_net_is_the_last_linear_as_wide_as_the_embedding_is_long() -> None:
    assert _targets(TinyNet()).adapted == ["first", "second"]
    net = TinyNet(vocab=30)
    net.head.weight, net.after = net.embed.weight, nn.Linear(30, 30)
    assert find_heads(net) == {"head"}  # tied to the embedding: that is what it does
    assert _targets(net).adapted == ["first", "second", "after"]


def test_a_plain_net_without_embedding_has_no_head_and_that_is_said() -> None:
    net = nn.Sequential(Block(), nn.Linear(16, 4))
    said = notices(lambda: _targets(net))
    assert said == [
        "the model has no embedding, so no output head was looked for: every linear is adapted (0.up, 0.down, 1); "
        "name one to leave alone in `exclude_modules`"
    ]
    assert _targets(net).adapted == ["0.up", "0.down", "1"]
    assert notices(lambda: _targets(net, target_modules=["up"])) == []


# lists, expressions, ranges


def test_a_list_names_suffixes_at_a_dot() -> None:
    model = tiny_llama()
    assert _targets(model, target_modules=["q_proj"]).adapted == _llama_names(["q_proj"])
    assert _targets(model, target_modules=["0.mlp.up_proj"]).adapted == _llama_names(["up_proj"], (0,))
    with pytest.raises(TargetError):
        _targets(model, target_modules=["_proj"])


@pytest.mark.parametrize("prefix", ["", "net."])
def test_an_expression_matches_whole_names_with_or_without_the_modules_prefix(prefix: str) -> None:
    model = LM(tiny_llama())
    chosen = _targets(model, target_modules=rf"{prefix}model\.layers\.\d\.mlp\.(up|down)_proj")
    assert chosen.adapted == _llama_names(["up_proj", "down_proj"], prefix="net.")
    chosen = _targets(model, target_modules=[f"{prefix}model.layers.1.mlp.up_proj"])
    assert chosen.adapted == _llama_names(["up_proj"], (1,), "net.")


def test_a_head_that_is_named_is_adapted_and_packed_unless_an_embedding_reads_its_weight() -> None:
    chosen = _targets(tiny_llama(), target_modules=["lm_head", "q_proj"])
    assert "lm_head" in chosen.adapted
    assert "lm_head" in chosen.packed
    chosen = _targets(tiny_llama(tie_word_embeddings=True), target_modules=["lm_head", "q_proj"])
    assert "lm_head" in chosen.adapted
    assert "lm_head" not in chosen.packed


def test_excluded_linears_are_neither_adapted_nor_packed() -> None:
    for exclude in (["q_proj", "down_proj"], r".*\.(q|down)_proj"):
        chosen = _targets(tiny_llama(), exclude_modules=exclude)
        assert chosen.adapted == chosen.packed == _llama_names(["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"])


def test_layer_ranges() -> None:
    model = tiny_llama(num_hidden_layers=3)
    assert _targets(model, layers_to_transform=1).adapted == _llama_names(ATTENTION + MLP, (1,))
    chosen = _targets(model, layers_to_transform=[0, 2], layers_pattern="layers", target_modules=["q_proj"])
    assert chosen.adapted == _llama_names(["q_proj"], (0, 2))
    assert len(chosen.packed) == 21  # the base is packed everywhere
    with pytest.raises(TargetError, match="layers_pattern='h'"):
        _targets(model, layers_to_transform=[0], layers_pattern="h")


def test_a_list_entry_chooses_what_it_matches_and_the_others_are_named() -> None:
    model = tiny_llama()
    said = notices(lambda: _targets(model, target_modules=["q_proj", "upproj"]))
    near = "['up_proj', 'v_proj', 'q_proj']"
    assert said == [f"`target_modules` entries ['upproj'] match no linear layer; the nearest names are {near}"]


def test_excludes_and_layers_that_match_nothing_are_named() -> None:
    model = tiny_llama()
    said = notices(lambda: _targets(model, exclude_modules=["q_proj", "qproj"]))
    assert said == [
        "`exclude_modules` entry 'qproj' matches no linear layer; the nearest names are ['q_proj', 'v_proj', 'o_proj']"
    ]
    said = notices(lambda: _targets(model, exclude_modules=r"\.none"))
    assert len(said) == 1
    assert said[0].startswith(r"`exclude_modules` entry '\\.none' matches no linear layer; ")
    said = notices(lambda: _targets(model, layers_to_transform=[1, 7]))
    assert said == ["`layers_to_transform` [7] are no blocks of the model; there are [0, 1]"]


# nothing matched


NOTHING: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["qproj"]}, "`target_modules`=['qproj'] chose none of 15 linear layers; the nearest names are"),
    ({"target_modules": ["qproj"]}, "['q_proj'"),
    ({"target_modules": ["xxxxxxxx"]}, "; there are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
    ({"target_modules": "q_proj"}, "a string is a regular expression for whole names: write ['q_proj'] for a name"),
    (
        {"exclude_modules": ".*"},
        "`target_modules`='all-linear' with exclude_modules='.*' chose none of 15 linear layers",
    ),
    ({"layers_to_transform": [9]}, "with layers_to_transform=[9] chose none of 15 linear layers; there are q_proj"),
]


@pytest.mark.parametrize(("config", "message"), NOTHING)
def test_when_nothing_matches_the_nearest_names_are_given(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        _targets(tiny_llama(), **config)


def test_a_model_without_linears() -> None:
    with pytest.raises(TargetError, match="the model has no linear layer to adapt .was it built yet"):
        _targets(nn.Sequential(nn.Conv2d(3, 3, 3)))
    with pytest.raises(TargetError, match="the model has no linear layer to adapt"):
        _targets(LM(build_late=True))


def test_a_module_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(
        TargetError, match="entry 'self_attn' names 'model.layers.0.self_attn', a LlamaAttention: only "
    ):
        _targets(tiny_llama(), target_modules=["q_proj", "self_attn"])
    with pytest.raises(TargetError, match="'embed_tokens' names 'model.embed_tokens', a Embedding"):
        _targets(tiny_llama(), target_modules=["embed_tokens"])


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_fits_no_adapted_layer_is_an_error(pattern: str) -> None:
    with pytest.raises(TargetError, match=f"`{pattern}` entry 'up_porj' matches no adapted layer; the nearest names"):
        _targets(tiny_llama(), **{pattern: {"up_porj": 4}})
    with pytest.raises(TargetError, match=f"`{pattern}` entry 'up_proj' matches no adapted layer"):
        _targets(tiny_llama(), target_modules=["q_proj"], **{pattern: {"up_proj": 4}})


# modules_to_save and task heads


def test_saved_modules_are_neither_adapted_nor_packed_nor_given_twice() -> None:
    chosen = _targets(tiny_llama(), modules_to_save=["mlp", "up_proj", "lm_head"])
    assert chosen.saved == ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"]
    assert chosen.adapted == chosen.packed == _llama_names(ATTENTION)


def test_saved_modules_that_are_not_there() -> None:
    with pytest.raises(
        TargetError, match="`modules_to_save` entry 'lm_haed' matches no module; the nearest names are "
    ):
        _targets(tiny_llama(), modules_to_save=["lm_haed"])
    with pytest.raises(
        TargetError, match=r"only `modules_to_save` matched \(\['lm_head'\]\); `target_modules`=\['z'\]"
    ):
        _targets(tiny_llama(), modules_to_save=["lm_head"], target_modules=["z"])


def test_a_freshly_initialised_task_head_is_trained_in_full_and_one_from_a_file_is_adapted(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = tiny_bert()
    said = notices(lambda: _targets(model))
    assert said == ["the task head ['classifier'] was freshly initialised: it is trained in full, as `modules_to_save`"]
    chosen = _targets(LM(model))
    assert chosen.saved == ["net.classifier"]
    assert "net.bert.encoder.layer.0.attention.self.query" in chosen.adapted
    assert notices(lambda: _targets(model, modules_to_save=["classifier"])) == []

    model.save_pretrained(tmp_path / "task")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "task")
    assert _targets(loaded).saved == []
    assert "classifier" in _targets(loaded).adapted
    model.bert.save_pretrained(tmp_path / "base")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert _targets(loaded).saved == ["classifier"]


# other owners


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
def test_a_base_that_bitsandbytes_quantized_is_not_packed_again(kind: type[nn.Linear]) -> None:
    net = TinyNet()
    net.first = kind(64, 128)
    assert _targets(net, target_modules=["second"]).adapted == ["second"]
    message = "1 layers, 'first' first, are already quantized by bitsandbytes: leave `quantize=\"none\"`"
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        _targets(net, target_modules=["second"], quantize="nf4")


def test_eight_billion_parameters_on_meta_are_converted_in_a_moment() -> None:
    config = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = tiny_llama(vocab=128256, num_key_value_heads=8, **config)
    start = time.process_time()
    report = apply_lora(model, LoRAConfig(quantize="nf4"))
    assert time.process_time() - start < 1  # a tenth of that on one quiet core
    assert len(report.adapted) == 224
    assert report.logical_params == 8_030_261_248
    assert report.trainable_params == 41_943_040
    assert report.fingerprint is None


def test_patterns_see_names_inside_the_transformers_model_too() -> None:
    report = apply_lora(module := LM(tiny_llama()), LoRAConfig(rank_pattern={"^model.layers.0.self_attn.q_proj": 3}))
    ranks = {name: module.get_submodule(name).r for name in report.adapted}
    assert {name for name, r in ranks.items() if r == 3} == {"net.model.layers.0.self_attn.q_proj"}


def test_a_saved_module_that_comes_apart_from_its_tie_is_said() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    (said,) = notices(lambda: _targets(model, modules_to_save=["embed_tokens"]))
    assert "'lm_head.weight' shares its weight with a module of `modules_to_save` (['model.embed_tokens'])" in said
    assert notices(lambda: _targets(model, modules_to_save=["embed_tokens", "lm_head"])) == []
