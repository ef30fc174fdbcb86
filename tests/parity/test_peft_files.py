# SPDX-License-Identifier: Apache-2.0
"""PEFT itself loads our folders and we load PEFT's: the same logits either way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import BaseMismatchError, CheckpointError
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.residents import set_adapter
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear
from tests.helpers import LM, TinyNet, random_adapters, tiny_gpt2, tiny_llama

IDS = torch.arange(32).view(2, 16) % 61


def tiny_classifier() -> nn.Module:
    from transformers import LlamaForSequenceClassification

    config = tiny_llama().config
    config.num_labels = 3
    torch.manual_seed(1)
    return LlamaForSequenceClassification(config)


def plain_net() -> nn.Module:
    torch.manual_seed(2)
    return TinyNet()


def tied_llama() -> nn.Module:
    return tiny_llama(tie_word_embeddings=True)


BASES = {"llama": tiny_llama, "tied": tied_llama, "gpt2": tiny_gpt2, "classifier": tiny_classifier, "plain": plain_net}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama all-linear": ("llama", {}),
    "llama suffixes": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "llama regex": ("llama", {"target_modules": r".*layers\.1.*(q_proj|up_proj)"}),
    "llama layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "llama exclude": ("llama", {"exclude_modules": ["down_proj"]}),
    "llama rank_pattern": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.up_proj": 7}}),
    "llama alpha_pattern": ("llama", {"alpha_pattern": {"v_proj": 3, r".*\.1\.self_attn\.o_proj": 5.5}}),
    "llama rslora": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "llama lm_head kept": ("llama", {"modules_to_save": ["lm_head"]}),
    "llama embeddings kept": ("llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "llama head adapted": ("llama", {"target_modules": ["q_proj", "lm_head"]}),  # PEFT writes its base weight too
    "tied head adapted": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "gpt2 all-linear": ("gpt2", {}),
    "gpt2 one of two c_proj": ("gpt2", {"target_modules": ["attn.c_proj", "c_attn"]}),
    "gpt2 tied head kept": ("gpt2", {"modules_to_save": ["lm_head"]}),
    "llama dora": ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]}),
    "gpt2 dora": ("gpt2", {"use_dora": True, "use_rslora": True}),
    "classifier": ("classifier", {"modules_to_save": ["score"]}),
    "plain": ("plain", {"target_modules": ["first", "second"]}),
    "plain, head kept": ("plain", {"target_modules": ["first"], "modules_to_save": ["head"]}),
}


# Without a transformers model inside, names are those of the module that was given.
RUNS = [(case, wrap) for case in CASES for wrap in (False, True) if not (wrap and CASES[case][0] == "plain")]
IDS_OF_RUNS = [f"{case}{' in a LightningModule' if wrap else ''}" for case, wrap in RUNS]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return out.logits if hasattr(out, "logits") else out


def assert_close(actual: Tensor, expected: Tensor, base: Tensor) -> None:
    assert (expected - base).norm() > 0.01 * base.norm()  # the adapters do something
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def adapted(kind: str, config: dict[str, Any], wrap: bool = False) -> nn.Module:
    base = BASES[kind]()
    model = LM(base) if wrap else base
    apply_lora(model, LoRAConfig(**{"r": 4, "lora_alpha": 8, **config}))
    return random_adapters(model, std=0.2)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("case", "wrap"), RUNS, ids=IDS_OF_RUNS)
def test_peft_loads_our_folder(case: str, wrap: bool, tmp_path: Path) -> None:
    kind, config = CASES[case]
    model = adapted(kind, config, wrap)
    save_adapter(model, tmp_path / "a")
    base = BASES[kind]()
    plain = logits(copy.deepcopy(base))
    loaded = PeftModel.from_pretrained(base, tmp_path / "a")
    assert_close(logits(loaded), logits(model), plain)
    assert {n for n, m in loaded.base_model.model.named_modules() if hasattr(m, "lora_A")} == {
        n.removeprefix("net.") for n, m in adapter_modules(model) if isinstance(m, LoRALinear)
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("case", "wrap"), RUNS, ids=IDS_OF_RUNS)
def test_we_load_pefts_folder(case: str, wrap: bool, tmp_path: Path) -> None:
    kind, config = CASES[case]
    oracle = pefts(kind, config)
    oracle.save_pretrained(tmp_path / "p")
    base = BASES[kind]()
    plain = logits(copy.deepcopy(base))
    model = LM(base) if wrap else base
    load_adapter(model, tmp_path / "p")
    assert_close(logits(model), logits(oracle), plain)
    save_adapter(model, tmp_path / "again")  # and what we then write, PEFT reads
    again = PeftModel.from_pretrained(BASES[kind](), tmp_path / "again")
    assert_close(logits(again), logits(oracle), plain)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_the_heads_own_weight_in_pefts_folder(kind: str, tmp_path: Path) -> None:
    oracle = pefts(kind, {"target_modules": ["q_proj", "lm_head"]})
    oracle.save_pretrained(tmp_path / "p")
    copied = "base_model.model.lm_head.base_layer.weight"
    assert copied in load_file(tmp_path / "p" / "adapter_model.safetensors")
    model = BASES[kind]()
    load_adapter(model, tmp_path / "p")
    load_adapter(model, tmp_path / "p")  # into a converted one
    load_adapter(model, tmp_path / "p", name="other")
    set_adapter(model, "other")
    assert_close(logits(model), logits(oracle), logits(BASES[kind]()))
    load_adapter(BASES[kind]().bfloat16(), tmp_path / "p")  # a cast is no other base
    for tensor in (torch.ones(61, 32), torch.ones(8, 32)):
        tensors = load_file(tmp_path / "p" / "adapter_model.safetensors")
        save_file(tensors | {copied: tensor}, tmp_path / "p" / "adapter_model.safetensors")
        with pytest.raises(BaseMismatchError, match="over another 'lm_head.weight'"):
            load_adapter(BASES[kind](), tmp_path / "p")


def pefts(kind: str, config: dict[str, Any]) -> PeftModel:
    """PEFT's model with random adapters."""
    base = BASES[kind]()
    if "target_modules" not in config:
        config = {**config, "target_modules": "all-linear"}
    task = {"classifier": "SEQ_CLS", "plain": None}.get(kind, "CAUSAL_LM")
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": task, **config}))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_of_pefts_named_adapters_has_a_folder(tmp_path: Path) -> None:
    oracle = pefts("llama", {})
    oracle.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in oracle.named_parameters():
        if ".second." in name:
            parameter.data += 0.1
    oracle.save_pretrained(tmp_path / "p")
    oracle.save_pretrained(tmp_path / "named", selected_adapters=["second"])
    expected = logits(oracle)
    first, second = tiny_llama(), tiny_llama()
    load_adapter(first, tmp_path / "p")
    load_adapter(second, tmp_path / "p" / "second")
    oracle.set_adapter("second")
    assert_close(logits(second), logits(oracle), logits(tiny_llama()))
    assert_close(logits(first), expected, logits(tiny_llama()))
    with pytest.raises(
        CheckpointError, match=r"no adapter_config.json; there are adapters in .* \['second'\]: give one"
    ):
        load_adapter(tiny_llama(), tmp_path / "named")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_configuration_of_the_first_versions_of_peft(tmp_path: Path) -> None:
    oracle = pefts("llama", {"target_modules": ["q_proj", "v_proj"]})
    oracle.save_pretrained(tmp_path / "p")
    words = {
        "base_model_name_or_path": None, "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
        "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
        "peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(words))
    model = tiny_llama()
    load_adapter(model, tmp_path / "p")
    assert_close(logits(model), logits(oracle), logits(tiny_llama()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "fp4", "int8"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_over_the_dequantized_base_equals_the_live_packed_model(kind: str, quantize: str, tmp_path: Path) -> None:
    model = adapted(kind, {"quantize": quantize})
    save_adapter(model, tmp_path / "a")
    base = BASES[kind]()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            dense = base.get_submodule(name.removesuffix(".base_layer"))
            dense.weight.data = module.packed.dequantize(torch.float32)
    plain = logits(copy.deepcopy(base))
    assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "a")), logits(model), plain)


def test_the_configuration_holds_only_keys_that_peft_knows(tmp_path: Path) -> None:
    save_adapter(adapted("llama", {}), tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert set(written) <= set(LoraConfig().to_dict())
    assert written["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip
    assert written["task_type"] == "CAUSAL_LM"
    assert written["inference_mode"] is True
