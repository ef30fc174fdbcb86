# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: found, copied, and split where lm-eval splits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.encoding import Encoder, find_tokenizer, longest_input
from tests.forgetting import tiny


def test_tokenizer_is_a_folder_an_object_or_the_modules_own(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    text = "the cat sleeps"
    expected = tokenizer.encode(text)
    assert Encoder(find_tokenizer(str(tmp_path / "base"), nn.Identity())).encode(text) == expected
    assert find_tokenizer(tokenizer, nn.Identity()) is tokenizer
    owner = nn.Identity()
    owner.tokenizer = tokenizer
    assert find_tokenizer(None, owner) is tokenizer
    assert Encoder(tokenizer.backend_tokenizer).encode(text) == expected  # without transformers around it


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Identity has no attribute `tokenizer`"):
        find_tokenizer(None, nn.Identity())
    with pytest.raises(ConfigError, match="must have a method `encode`: got int"):
        find_tokenizer(3, nn.Identity())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty'? cannot be loaded"):
        find_tokenizer(str(tmp_path / "empty"), nn.Identity())


def test_beginning_of_sequence_is_not_doubled() -> None:
    encoder = Encoder(tiny.tokenizer(bos=True))
    assert encoder.encode("the cat").count(0) == 1
    assert encoder.encode("<s>the cat") == encoder.encode("the cat")
    assert encoder.encode("the cat", special=False).count(0) == 0
    assert encoder.prefix == 0


def test_longest_input_is_the_models_then_the_tokenizers() -> None:
    plain = SimpleNamespace(model_max_length=10**30)
    assert longest_input(SimpleNamespace(max_position_embeddings=64), plain) == 64
    assert longest_input(SimpleNamespace(text_config=SimpleNamespace(n_positions=32), n_positions=9), plain) == 32
    assert longest_input(None, SimpleNamespace(model_max_length=77)) == 77
    assert longest_input(None, plain) == 2048
