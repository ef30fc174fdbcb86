# SPDX-License-Identifier: Apache-2.0
"""Conversion packs tensor by tensor: above the packed model it takes no more than two of the largest tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT, ROOT = Path(__file__).with_name("converting.py"), Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A random Llama of bf16 in a file, 134 MB a layer, by its number of layers; made when it is asked for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Folders(dict[int, Path]):
        def __missing__(self, layers: int) -> Path:
            self[layers] = tmp_path_factory.mktemp("base")
            config = LlamaConfig(
                hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=16,
                vocab_size=256, tie_word_embeddings=False,
            )  # fmt: skip
            torch.manual_seed(0)
            LlamaForCausalLM(config).bfloat16().save_pretrained(self[layers])
            return self[layers]

    return Folders()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("quantize", "layers", "where"),
    [
        ("nf4", 1, "mapped"),
        *(
            pytest.param(quantize, 4, where, marks=pytest.mark.slow)
            for quantize in ("nf4", "nf4-dq", "fp4", "int8")
            for where in ("mapped", "resident")
        ),
    ],
)
def test_the_peak_is_two_of_the_largest_tensors(
    folders: dict[int, Path], quantize: str, layers: int, where: str
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folders[layers]), quantize, where]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["dense"] > 4 * row["largest"]
    grown = row["end"] - row["start"]
    if where == "mapped":  # what is packed is new, and nothing else is for long
        assert row["packed"] * 0.9 < grown < row["packed"] * 1.3
        assert row["peak"] <= row["end"] + 2 * row["largest"]
    else:  # each dense tensor goes when it is packed
        assert row["peak"] <= row["start"] + 2 * row["largest"]
        assert -grown > 0.8 * (row["dense"] - row["packed"])
