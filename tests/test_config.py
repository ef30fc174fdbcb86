# SPDX-License-Identifier: Apache-2.0
"""`LoRAConfig`: what it refuses and in which words, its patterns, its round trip."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from lightning_lora.config import LoRAConfig, scaling
from lightning_lora.errors import ConfigError, UnsupportedError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "`r` must be an integer of at least 1, got 0"),
    ({"r": -3}, "`r` must be an integer of at least 1, got -3"),
    ({"r": 2.5}, "`r` must be an integer of at least 1, got 2.5"),
    ({"r": True}, "`r` must be an integer of at least 1, got True"),
    ({"lora_alpha": 0}, "`lora_alpha` must be a positive number, got 0"),
    ({"lora_alpha": math.inf}, "`lora_alpha` must be a positive number, got inf"),
    ({"lora_alpha": "16"}, "`lora_alpha` must be a positive number, got '16'"),
    ({"rank_pattern": {"q_proj": 0}}, "`rank_pattern['q_proj']` must be an integer of at least 1, got 0"),
    ({"alpha_pattern": {"q_proj": -1}}, "`alpha_pattern['q_proj']` must be a positive number, got -1"),
    ({"lora_dropout": 1.0}, "`lora_dropout` must be a number in [0, 1), got 1.0"),
    ({"lora_dropout": -0.1}, "`lora_dropout` must be a number in [0, 1), got -0.1"),
    ({"lora_dropout": math.nan}, "`lora_dropout` must be a number in [0, 1), got nan"),
    ({"lora_dropout": "0.1"}, "`lora_dropout` must be a number in [0, 1), got '0.1'"),
    ({"target_modules": []}, '`target_modules` must name something, got []; use "all-linear", a list of name suffixes'),
    ({"target_modules": ""}, "`target_modules` must name something, got ''"),
    ({"target_modules": None}, "`target_modules` must be a regular expression or a list of names, got None"),
    ({"target_modules": ["q", 3]}, "`target_modules` must be a regular expression or a list of names, got ['q', 3]"),
    ({"target_modules": "q_proj("}, "`target_modules` 'q_proj(' is no regular expression: missing )"),
    ({"exclude_modules": "["}, "`exclude_modules` '[' is no regular expression: unterminated character set"),
    ({"exclude_modules": 3}, "`exclude_modules` must be a regular expression or a list of names or null, got 3"),
    ({"modules_to_save": "head"}, "`modules_to_save` must be a list of names or null, got 'head'"),
    ({"rank_pattern": {"(": 4}}, "`rank_pattern` '(' is no regular expression"),
    ({"alpha_pattern": {"(": 4}}, "`alpha_pattern` '(' is no regular expression"),
    ({"layers_pattern": "(", "layers_to_transform": 0}, "`layers_pattern` '(' is no regular expression"),
    ({"layers_pattern": "layers"}, "`layers_pattern` is given without `layers_to_transform`; give both or none"),
    ({"init_lora_weights": "pisa"}, "'eva', 'pissa', 'olora', 'loftq', 'pissa_niter_N'], got 'pisa'"),
    ({"init_lora_weights": "pissa_niter_"}, "`init_lora_weights` must be one of ['kaiming', 'gaussian',"),
    ({"init_lora_weights": True}, "`init_lora_weights` must be one of ['kaiming', 'gaussian',"),
    (
        {"init_lora_weights": "loftq"},
        '`init_lora_weights="loftq"` begins with what packing leaves out: give `quantize`',
    ),
    ({"loftq_iter": 0}, "`loftq_iter` must be an integer of at least 1, got 0"),
    ({"eva_batches": 1.5}, "`eva_batches` must be an integer of at least 1, got 1.5"),
    ({"freeze_lora_A": 1}, "`freeze_lora_A` must be true or false, got 1"),
    ({"freeze_lora_A": True, "loraplus_lr_ratio": 4}, "with `freeze_lora_A=True` A has none: leave the ratio out"),
    ({"quantize": "int3"}, "`quantize` must be one of ['none', 'nf4', 'nf4-dq', 'fp4', 'int8'], got 'int3'"),
    ({"compute_dtype": "fp8"}, "`compute_dtype` must be one of ['auto', 'fp32', 'bf16', 'fp16'], got 'fp8'"),
    ({"loraplus_lr_ratio": 0}, "`loraplus_lr_ratio` must be a positive number, such as 16, or null, got 0"),
    ({"loraplus_lr_ratio": -4.0}, "`loraplus_lr_ratio` must be a positive number, such as 16, or null, got -4.0"),
    ({"loraplus_lr_ratio": math.inf}, "`loraplus_lr_ratio` must be a positive number, such as 16, or null, got inf"),
    ({"loraplus_lr_ratio": math.nan}, "`loraplus_lr_ratio` must be a positive number, such as 16, or null, got nan"),
    ({"loraplus_lr_ratio": True}, "`loraplus_lr_ratio` must be a positive number, such as 16, or null, got True"),
    ({"loraplus_lr_ratio": "16"}, "`loraplus_lr_ratio` must be a positive number, such as 16, or null, got '16'"),
    ({"adapter_dtype": "auto"}, "`adapter_dtype` must be one of ['fp32', 'bf16', 'fp16'], got 'auto'"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoRAConfig(**values)


def test_arguments_without_a_method_are_absent() -> None:
    with pytest.raises(TypeError, match="init_from"):
        LoRAConfig(init_from="somewhere")


def test_scaling() -> None:
    assert scaling(16, 32.0, False) == 2.0
    assert scaling(16, 32.0, True) == 8.0


def test_patterns_match_a_name_its_end_or_as_a_regular_expression_and_the_first_wins() -> None:
    config = LoRAConfig(
        r=4,
        lora_alpha=8.0,
        rank_pattern={"q_proj": 2, r"layers\.1\..*": 3, "model.layers.0.mlp.up_proj": 5},
        alpha_pattern={"v_proj": 1.5},
    )
    ranks = {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.self_attn.v_proj": 3,
        "net.model.layers.0.mlp.up_proj": 5,
        "q_proj": 2,
        "model.layers.0.self_attn.other_q_proj": 4,
        "model.layers.0.q_proj.inner": 4,
    }
    assert {name: config.rank_for(name) for name in ranks} == ranks
    assert config.alpha_for("a.v_proj") == 1.5
    assert config.alpha_for("a.q_proj") == 8.0


def test_round_trip_through_json() -> None:
    config = LoRAConfig(
        r=3, lora_alpha=1, lora_dropout=0, target_modules=["a", "b"], exclude_modules=".*x", layers_to_transform=[0, 2],
        layers_pattern="h", modules_to_save=["head"], rank_pattern={"a": 2}, use_rslora=True, quantize="nf4-dq",
    )  # fmt: skip
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_keys_of_a_file_are_named() -> None:
    with pytest.raises(ConfigError, match=r"LoRAConfig does not know \['lora_magic'\]; it knows \['adapter_dtype', "):
        LoRAConfig.from_dict({"r": 2, "lora_magic": 1})


@pytest.mark.parametrize("value", ["1", [True], [-1], 1.5, ["0"]])
def test_layer_indices_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match="`layers_to_transform` must be a number of 0 or more, or a list of them"):
        LoRAConfig(layers_to_transform=value)


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_table(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`{name}` must be a table of names to numbers"):
        LoRAConfig(**{name: [1]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True, "init_lora_weights": "olora"}, "`use_dora=True` with `init_lora_weights='olora'` is not"),
        ({"use_dora": True, "freeze_lora_A": True}, "`freeze_lora_A=True` with `use_dora=True` is not built"),
    ],
)
def test_methods_that_do_not_go_together_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        LoRAConfig(**values)
