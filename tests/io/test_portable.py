# SPDX-License-Identifier: Apache-2.0
"""The portable layout: the live update under every loader's rule, or a refusal with the remedy."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, MergeError, UnsupportedError
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.folder import AdapterFolder
from lightning_lora.io.loaders import LOADERS, validate_adapter
from lightning_lora.io.names import named_adapters
from lightning_lora.io.portable import check_portable, update_error
from lightning_lora.model.apply import apply_lora, set_adapter_scale
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear
from tests.helpers import LM, random_adapters, tiny_gpt2, tiny_llama

IDS = torch.arange(32).view(2, 16) % 61
P = "base_model.model."

CASES: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "up_proj": 13}, "alpha_pattern": {"v_proj": 3}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "one of three siblings": {"target_modules": ["v_proj"]},
    "one layer": {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
    "regex": {"target_modules": r".*layers\.1.*(q_proj|up_proj)"},
    "excluded": {"exclude_modules": ["k_proj", "down_proj"]},
    "a head": {"target_modules": ["o_proj", "lm_head"]},
    "bf16 masters": {"adapter_dtype": "bf16", "use_rslora": True},
    "packed": {"quantize": "nf4", "target_modules": ["q_proj", "o_proj"]},
}


def adapted(base: nn.Module | None = None, **config: Any) -> nn.Module:
    base = tiny_llama() if base is None else base
    apply_lora(base, LoRAConfig(**{"r": 4, "lora_alpha": 7, **config}))
    return random_adapters(base, std=0.2)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def names_base(folder: Path) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "someone/base"}))
    return folder


def deltas(model: nn.Module) -> dict[str, Tensor]:
    linears = {n: m for n, m in named_adapters(model) if isinstance(m, LoRALinear)}
    return {n: m.delta_weight().t() if m.fan_in_fan_out else m.delta_weight() for n, m in linears.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_loader_gets_the_live_update_by_its_own_rule(case: str, tmp_path: Path) -> None:
    model = adapted(**CASES[case])
    report = save_adapter(model, tmp_path / "a", layout="portable")
    assert report.delta_error < 1e-6
    folder, tensors = AdapterFolder.open(tmp_path / "a"), load_file(tmp_path / "a" / "adapter_model.safetensors")
    live = deltas(model)
    names = {key.removeprefix(P).rpartition(".lora_")[0] for key in tensors}
    assert names >= set(live)
    for loader in LOADERS.values():
        for name in names:
            A, B = (tensors[f"{P}{name}.lora_{x}.weight"] for x in "AB")
            assert A.shape[0] == B.shape[1] == (16 if case == "patterns" else 8)
            delta = loader.scale(folder, name, A.shape[0]) * (B @ A)
            if name in live:
                assert error(delta, live[name]) < 1e-6
            else:
                assert not delta.any()
    if case != "a head":
        found = validate_adapter(names_base(tmp_path / "a"), "all")
        assert found.ok, str(found)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "in a LightningModule"])
def test_peft_loads_it_with_the_live_logits(kind: str, wrap: bool, tmp_path: Path) -> None:
    make = {"llama": tiny_llama, "gpt2": tiny_gpt2}[kind]
    ranks = {"llama": {"q_proj": 2}, "gpt2": {"c_fc": 2}}[kind]
    inner = make()
    model = adapted(LM(inner) if wrap else inner, use_rslora=True, rank_pattern=ranks)
    set_adapter_scale(model, 0.7)
    save_adapter(model, tmp_path / "a", layout="portable")
    plain = logits(make())
    got = logits(PeftModel.from_pretrained(make(), tmp_path / "a"))
    assert error(plain, logits(inner)) > 0.01
    assert error(got, logits(inner)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_we_load_it_too(case: str, tmp_path: Path) -> None:
    model = adapted(**CASES[case])
    save_adapter(model, tmp_path / "a", layout="portable")
    other = tiny_llama()
    load_adapter(other, tmp_path / "a")
    assert error(logits(other), logits(model)) < 1e-5
    packed = [
        {n.removesuffix(".base_layer") for n, m in x.named_modules() if isinstance(m, PackedLinear)}
        for x in (model, other)
    ]
    assert packed[0] == packed[1]


def test_the_files_words(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj", "gate_proj"], use_rslora=True, lora_dropout=0.1)
    set_adapter_scale(model, -0.5)
    save_adapter(model, tmp_path / "a", layout="portable")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["gate_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert (config["rank_pattern"], config["alpha_pattern"], config["modules_to_save"]) == ({}, {}, None)
    assert (config["bias"], config["lora_dropout"], config["task_type"]) == ("none", 0.0, "CAUSAL_LM")
    record = json.loads((tmp_path / "a" / "lightning_lora.json").read_text())
    assert record["layout"] == "portable"
    assert record["trained"]["use_rslora"] is True
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    zero, start = (tensors[f"{P}model.layers.0.self_attn.k_proj.lora_{x}.weight"] for x in "BA")
    assert not zero.any()
    assert torch.equal(start, tensors[f"{P}model.layers.0.self_attn.q_proj.lora_A.weight"])  # training can go on
    padding = tensors[f"{P}model.layers.0.self_attn.q_proj.lora_B.weight"][:, 4:]
    assert not padding.any()


def test_whole_names_where_last_components_are_ambiguous(tmp_path: Path) -> None:
    model = adapted(tiny_gpt2(), target_modules=["attn.c_proj"])  # the MLP's is called c_proj too
    save_adapter(model, tmp_path / "a", layout="portable")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"transformer.h.{i}.attn.c_proj" for i in range(2)]
    assert config["fan_in_fan_out"] is True
    other = tiny_gpt2()
    load_adapter(other, tmp_path / "a")
    assert error(logits(other), logits(model)) < 1e-5


@pytest.mark.parametrize(("r", "expected"), [(8, 8), (9, 16), (16, 16), (100, 128), (300, 320)])
def test_the_rank_is_one_that_servers_take(r: int, expected: int, tmp_path: Path) -> None:
    save_adapter(adapted(r=r, target_modules=["q_proj"]), tmp_path / "a", layout="portable")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_cast_is_reported(dtype: str, tmp_path: Path) -> None:
    report = save_adapter(adapted(), tmp_path / "a", layout="portable", dtype=dtype)
    assert (report.delta_error > 1e-5) is (dtype != "fp32")
    assert report.delta_error < 1e-2
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len({tensor.dtype for tensor in tensors.values()}) == 1


def test_what_has_no_portable_form_is_refused_by_name(tmp_path: Path) -> None:
    def refused(model: nn.Module, match: str, **arguments: Any) -> None:
        with pytest.raises(UnsupportedError, match=match):
            save_adapter(model, tmp_path / "a", layout="portable", **arguments)
        assert not (tmp_path / "a").exists()

    refused(adapted(modules_to_save=["lm_head"]), r"\['lm_head'\] were trained in full .*merge")
    refused(adapted(r=600, target_modules=["q_proj"]), "has rank 600, servers take 512 at most")
    refused(adapted(tiny_gpt2(), target_modules=["c_attn", "lm_head"]), "'lm_head' is adapted and shares its weight")
    large = adapted(target_modules=["q_proj"])
    for _, module in named_adapters(large):
        module.lora_B.data.fill_(1e5)
    refused(large, "do not fit torch.float16: use bf16", dtype="fp16")
    with pytest.raises(AdapterMismatchError, match="no adapters to write"):
        save_adapter(tiny_llama(), tmp_path / "a", layout="portable")

    class WithHead(LM):
        def __init__(self) -> None:
            super().__init__(tiny_llama())
            self.scorer = nn.Linear(64, 3)

    refused(adapted(WithHead(), target_modules=["q_proj", "scorer"]), "lie outside the transformers model")


def test_sharded_or_meta_adapters_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        base = tiny_llama()
    apply_lora(base, LoRAConfig(r=4))
    with pytest.raises(UnsupportedError, match="on the meta device"):
        save_adapter(base, tmp_path / "a", layout="portable")


def test_another_update_than_the_live_one_is_found(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a", layout="portable")
    changed = copy.deepcopy(model)
    next(m for _, m in named_adapters(changed)).lora_B.data[0, 0] += 0.01
    with pytest.raises(MergeError, match="differs from the live one by"):
        check_portable(changed, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 16}))
    with pytest.raises(MergeError, match="which must be 1"):
        check_portable(model, tmp_path / "a")


def test_the_error_from_the_factors_is_that_of_the_products() -> None:
    torch.manual_seed(0)
    A, B, live_A, live_B = torch.randn(4, 30), torch.randn(20, 4), torch.randn(3, 30), torch.randn(20, 3)
    assert update_error(A, B, live_A, live_B) == pytest.approx(error(B @ A, live_B @ live_A), rel=1e-5)
    assert update_error(live_A, live_B, live_A, live_B) < 1e-7
    assert update_error(A, torch.zeros(20, 4), A, torch.zeros(20, 4)) == 0.0


def test_a_classifiers_adapters_without_its_head(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.num_labels = 3
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(config)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as one that was read from files
    apply_lora(model, LoRAConfig(r=4, target_modules=["q_proj"]))
    save_adapter(random_adapters(model), tmp_path / "a", layout="portable")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] is None
