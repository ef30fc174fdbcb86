# SPDX-License-Identifier: Apache-2.0
"""LitGPT's adapter files, built by its written layout, against weights that are changed densely."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, CheckpointError
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import LM
from tests.parity.architectures import IDS, causal

R, ALPHA, SIZE = 4, 6, 8

#: By name: the model, its query heads and key heads, and LitGPT's names beside q, k, v with the model's.
MODELS: dict[str, tuple[Any, int, int, dict[str, str]]] = {
    "llama": (
        causal("llama"), 4, 2,
        {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj",
         "mlp.proj": "mlp.down_proj"},
    ),
    "gemma": (causal("gemma", head_dim=SIZE), 4, 2, {"mlp.fc_1": "mlp.gate_proj", "mlp.proj": "mlp.down_proj"}),
    "phi": (causal("phi"), 4, 2, {"attn.proj": "self_attn.dense", "mlp.fc": "mlp.fc1", "mlp.proj": "mlp.fc2"}),
    "phi3": (causal("phi3"), 4, 2, {"attn.proj": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}),
    "gpt_neox": (
        causal("gpt_neox"), 4, 4,
        {"attn.proj": "attention.dense", "mlp.fc": "mlp.dense_h_to_4h", "mlp.proj": "mlp.dense_4h_to_h"},
    ),
    "falcon": (
        causal("falcon", new_decoder_architecture=True, num_kv_heads=2), 4, 2,
        {"attn.proj": "self_attention.dense", "mlp.fc": "mlp.dense_h_to_4h"},
    ),
}  # fmt: skip
ENABLED = {"qkv": (True, True, True), "q, v": (True, False, True), "k": (False, True, False)}


def blocks_of(model: nn.Module) -> Any:
    for name in ("model.layers", "gpt_neox.layers", "transformer.h"):
        try:
            return model.get_submodule(name)
        except AttributeError:
            continue
    raise AssertionError


def write(
    folder: Path, kind: str, enabled: tuple[bool, bool, bool], old: bool = False, head: bool = False, **words: Any
) -> nn.Module:
    """A checkpoint folder as LitGPT writes it, and the transformers model with the same updates added densely."""
    case, n_head, groups, others = MODELS[kind]
    model = case.build()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    state: dict[str, Tensor] = {}
    for i, block in enumerate(blocks_of(model)):
        rows = [n_head * SIZE * enabled[0], groups * SIZE * enabled[1], groups * SIZE * enabled[2]]
        A, B = random(R * sum(enabled), 32), random(sum(rows), R)
        name = f"transformer.h.{i}.attn.{'attn' if old else 'qkv'}"
        state |= {f"{name}.lora_A": A, f"{name}.lora_B": B}
        add_qkv(block, qkv_update(A, B, enabled, n_head, groups, old), n_head, groups, old)
        for own, theirs in others.items():
            weight = block.get_submodule(theirs).weight
            A, B = random(R, weight.shape[1]), random(weight.shape[0], R)
            state |= {f"transformer.h.{i}.{own}.lora_A": A, f"transformer.h.{i}.{own}.lora_B": B}
            weight.data += ALPHA / R * B @ A
        if kind == "phi3":
            weight = block.mlp.gate_up_proj.weight
            for own, part in (("mlp.fc_1", weight.data[:48]), ("mlp.fc_2", weight.data[48:])):
                A, B = random(R, 32), random(48, R)
                state |= {f"transformer.h.{i}.{own}.lora_A": A, f"transformer.h.{i}.{own}.lora_B": B}
                part += ALPHA / R * B @ A
    if head:
        A, B = random(R, 32), random(64 + 16, R)  # the vocabulary is padded
        state |= {"lm_head.lora_A": A, "lm_head.lora_B": B}
        model.lm_head.weight.data += ALPHA / R * B[:64] @ A
    folder.mkdir()
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    names = dict(zip(("lora_query", "lora_key", "lora_value"), enabled, strict=True))
    settings = {"lora_r": R, "lora_alpha": ALPHA, "lora_dropout": 0.05, **names, **words}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    config = {"n_head": n_head, "n_query_groups": groups, "head_size": SIZE, "n_embd": 32, "name": kind}
    (folder / "model_config.yaml").write_text(yaml.safe_dump(config))
    return model


def qkv_update(A: Tensor, B: Tensor, enabled: tuple[bool, ...], n_head: int, groups: int, old: bool) -> Tensor:
    """LitGPT's update of its one weight for q, k and v, in the order of that weight's rows."""
    sizes = [n_head * SIZE * enabled[0], groups * SIZE * enabled[1], groups * SIZE * enabled[2]]
    parts = zip(A.split(R), B.split([size for size in sizes if size]), strict=True)
    dense = torch.cat([b @ a for a, b in parts]) * ALPHA / R
    if all(enabled):
        return dense
    per_group = n_head // groups + 2
    full = torch.zeros((n_head + 2 * groups) * SIZE, A.shape[1])
    row = 0
    for which in range(3):
        for i in range(len(full) if enabled[which] else 0):
            head = i // SIZE
            if old:
                place = head % per_group
                kind = 0 if place < per_group - 2 else place - (per_group - 3)
            else:
                kind = 0 if head < n_head else 1 if head < n_head + groups else 2
            if kind == which:
                full[i] = dense[row]
                row += 1
    assert row == len(dense)
    return full


def add_qkv(block: nn.Module, update: Tensor, n_head: int, groups: int, old: bool) -> None:
    """Add it to the model's own weights, heads taken to their places one by one."""
    heads = list(update.split(SIZE))
    per = n_head // groups
    if old:  # q q k v, q q k v
        order = [(g, p) for g in range(groups) for p in range(per + 2)]
    else:  # q q q q, k k, v v
        order = [(g, p) for g in range(groups) for p in range(per)]
        order += [(g, per) for g in range(groups)] + [(g, per + 1) for g in range(groups)]
    at = dict(zip(order, heads, strict=True))
    q = torch.cat([at[g, p] for g in range(groups) for p in range(per)])
    k, v = (torch.cat([at[g, per + x] for g in range(groups)]) for x in range(2))
    attention = next(m for n, m in block.named_children() if n in ("attention", "self_attention", "self_attn"))
    if hasattr(attention, "q_proj"):
        for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            getattr(attention, name).weight.data += part
    elif hasattr(attention, "qkv_proj"):
        attention.qkv_proj.weight.data += torch.cat([q, k, v])
    else:
        attention.query_key_value.weight.data += torch.cat([at[g, p] for g in range(groups) for p in range(per + 2)])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("old", [False, True], ids=["qkv", "interleaved"])
@pytest.mark.parametrize("enabled", ENABLED)
@pytest.mark.parametrize("kind", MODELS)
def test_the_update_is_the_dense_one(kind: str, enabled: str, old: bool, tmp_path: Path) -> None:
    expected = logits(write(tmp_path / "lit", kind, ENABLED[enabled], old))
    model = MODELS[kind][0].build()
    base = logits(model)
    load_adapter(LM(model), tmp_path / "lit")
    assert error(base, expected) > 0.01
    assert error(logits(model), expected) < 1e-5


@pytest.mark.parametrize("enabled", ENABLED)
def test_an_untrained_file_adapts_what_it_names(enabled: str, tmp_path: Path) -> None:
    write(tmp_path / "lit", "llama", ENABLED[enabled])
    path = tmp_path / "lit" / "lit_model.pth.lora"
    state = torch.load(path, weights_only=True)["model"]
    kept = {key: tensor for key, tensor in state.items() if ".attn.qkv." in key}
    torch.save({"model": {k: torch.zeros_like(t) if k.endswith("B") else t for k, t in kept.items()}}, path)
    model = MODELS["llama"][0].build()
    base = logits(model)
    load_adapter(model, tmp_path / "lit")
    assert torch.equal(logits(model), base)
    attention = blocks_of(model)[0].self_attn
    adapted = [isinstance(getattr(attention, f"{x}_proj"), LoRALinear) for x in "qkv"]
    assert adapted == list(ENABLED[enabled])
    A = torch.cat([getattr(attention, f"{x}_proj").lora_A for x, on in zip("qkv", adapted, strict=True) if on])
    assert torch.equal(A, state["transformer.h.0.attn.qkv.lora_A"])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_loads_what_we_then_write(tmp_path: Path) -> None:
    expected = logits(write(tmp_path / "lit", "llama", (True, True, True), old=True, head=True))
    case = MODELS["llama"][0]
    model = case.build()
    load_adapter(model, tmp_path / "lit")
    save_adapter(model, tmp_path / "a")
    assert error(logits(PeftModel.from_pretrained(case.build(), tmp_path / "a")), expected) < 1e-5


def test_a_table_of_tensors_alone_is_read_too(tmp_path: Path) -> None:
    expected = logits(write(tmp_path / "lit", "llama", (True, False, True)))
    path = tmp_path / "lit" / "lit_model.pth.lora"
    torch.save(torch.load(path, weights_only=True)["model"], path)
    model = MODELS["llama"][0].build()
    load_adapter(model, tmp_path / "lit")
    assert error(logits(model), expected) < 1e-5


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_what_is_broken_or_does_not_fit_is_said(tmp_path: Path) -> None:
    write(tmp_path / "lit", "llama", (True, True, True))
    folder, fresh = tmp_path / "lit", MODELS["llama"][0].build
    weights = folder / "lit_model.pth.lora"
    good, state = weights.read_bytes(), torch.load(weights, weights_only=True)["model"]

    def refused(kind: type[Exception], match: str, model: nn.Module | None = None) -> None:
        model = fresh() if model is None else model
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(kind, match=match):
            load_adapter(model, folder)
        assert model.state_dict().keys() == before.keys()

    torch.save({"model": {"transformer.h.0.attn.qkv.lora_A": Evil(tmp_path / "evil")}}, weights)
    refused(CheckpointError, "is broken, or holds more than tensors")
    assert not (tmp_path / "evil").exists()
    weights.write_bytes(good[:1000])
    refused(CheckpointError, "is broken")
    torch.save({"model": {k: t for k, t in state.items() if k != "transformer.h.1.mlp.proj.lora_B"}}, weights)
    refused(CheckpointError, "lacks 'transformer.h.1.mlp.proj.lora_B'")
    torch.save({"model": {k.replace("mlp.fc_1", "mlp.experts.0.fc_1"): t for k, t in state.items()}}, weights)
    refused(AdapterMismatchError, "no place for LitGPT's 'transformer.h.0.mlp.experts.0.fc_1'")
    weights.write_bytes(good)
    refused(AdapterMismatchError, "is it the model that was tuned", causal("llama", hidden_size=64).build())
    refused(
        AdapterMismatchError, "no place for LitGPT's 'transformer.h.1.", causal("llama", num_hidden_layers=1).build()
    )
    (folder / "model_config.yaml").write_text("n_head: 2\nn_embd: 32\n")
    refused(AdapterMismatchError, "has factors")
    (folder / "hyperparameters.yaml").write_text("lora_r: 4\n")
    refused(CheckpointError, "`lora_alpha` must be a number")
    (folder / "hyperparameters.yaml").unlink()
    refused(CheckpointError, r"hyperparameters.yaml is missing")
