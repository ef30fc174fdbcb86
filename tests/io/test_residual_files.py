# SPDX-License-Identifier: Apache-2.0
"""PiSSA, OLoRA and LoftQ over a whole model: folders against the base, merges, checkpoints, what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import (
    LoRA,
    LoRAConfig,
    MergeOnFitEnd,
    add_weighted_adapter,
    apply_lora,
    disable_adapters,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
    mixed_batch,
    save_adapter,
    set_adapter_scale,
    use_adapter,
    validate_adapter,
)
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.errors import AdapterMismatchError, ConfigError, UnsupportedError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.io.checkpoint_file import read_checkpoint, write_checkpoint
from lightning_lora.model.sharding import shard_model
from lightning_lora.model.slots import adapter_modules, adapter_record
from lightning_lora.model.spectrum import adapter_spectra, base_norms
from lightning_lora.strategies.zero_options import refuse_adapters
from tests.helpers import LM, TinyNet, loader, make_trainer, tiny_gpt2, tiny_llama
from tests.io.merging import IDS, error, logits
from tests.model.many import adapter_folder

STARTS = [("pissa", "none"), ("olora", "none"), ("pissa_niter_4", "nf4"), ("loftq", "nf4-dq")]


def moved(model: nn.Module, std: float = 0.03) -> nn.Module:
    """Factors that training has moved; their start stays."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def started(init: str, quantize: str = "none", make: Any = tiny_llama, **config: Any) -> nn.Module:
    model = make()
    words = {"r": 4, "lora_alpha": 6, "init_lora_weights": init, "quantize": quantize, **config}
    apply_lora(model, LoRAConfig(**words))
    return model


def as_pefts(folder: Path) -> Path:
    """The folder as PEFT would have written it, without the fingerprint of the base."""
    (folder / "lightning_lora.json").unlink()
    return folder


def packing_error(model: nn.Module, base: nn.Module) -> nn.Module:
    """``base`` with what the start of ``model`` and its packed residual leave out of it."""
    for name, module in adapter_modules(model):
        base.get_submodule(name).weight.data.copy_(module.base_weight(torch.float32))
    return base


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(("init", "quantize"), STARTS)
def test_the_folder_over_the_base_is_the_trained_model(init: str, quantize: str, make: Any, tmp_path: Path) -> None:
    base = logits(make())
    model = started(init, quantize, make, use_rslora=init == "olora", rank_pattern={"q_proj|c_fc": 3})
    assert error(logits(model), base) < (1e-5 if quantize == "none" else 0.2)
    start = logits(model)
    moved(model)
    for strength in (0.4, 1.0):
        set_adapter_scale(model, strength)
        trained = logits(model)
        saved = save_adapter(model, tmp_path / f"a{strength}")
        assert saved.delta_error < 1e-6
    with disable_adapters(model):
        assert error(logits(model), start) < 1e-5
    assert error(trained, start) > 0.02
    config = json.loads((tmp_path / "a1.0" / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    # Over a packed base the update is the same, and the base has not its error of packing: put that in first.
    ours, theirs = (packing_error(model, make()) if quantize != "none" else make() for _ in range(2))
    load_adapter(ours, as_pefts(tmp_path / "a1.0"))
    assert error(logits(ours), trained) < 1e-5
    assert error(logits(PeftModel.from_pretrained(theirs, tmp_path / "a1.0")), trained) < 1e-5
    assert {m.r for _, m in adapter_modules(ours)} == {8, 6}
    set_adapter_scale(model, 0.4)
    weak = packing_error(model, make()) if quantize != "none" else make()
    load_adapter(weak, as_pefts(tmp_path / "a0.4"))
    assert error(logits(weak), logits(model)) < 1e-5


def test_the_folder_says_that_it_is_for_the_base_as_it_is(tmp_path: Path) -> None:
    model = moved(started("pissa", "nf4"))
    save_adapter(model, tmp_path / "a")
    record = json.loads((tmp_path / "a" / "lightning_lora.json").read_text())
    assert (record["config"]["quantize"], record["config"]["init_lora_weights"]) == ("none", "kaiming")
    assert (record["trained"]["quantize"], record["trained"]["init_lora_weights"]) == ("nf4", "pissa")
    assert record["packed"] == []
    plain = tiny_llama()
    before = adapter_record(model).fingerprint
    load_adapter(plain, tmp_path / "a")
    assert adapter_record(plain).fingerprint == before
    assert validate_adapter(tmp_path / "a", "vllm").ok
    save_adapter(model, tmp_path / "p", layout="portable")
    other = tiny_llama()
    load_adapter(other, tmp_path / "p", quantize="none")
    assert error(logits(other), logits(plain)) < 1e-5


@pytest.mark.parametrize(("init", "quantize"), STARTS)
def test_merged_in_memory_it_is_the_trained_model(init: str, quantize: str) -> None:
    for make in (tiny_llama, tiny_gpt2):
        model = moved(started(init, quantize, make))
        set_adapter_scale(model, 0.7)
        live = logits(model)
        report = merge_adapters(model, IDS)
        assert report.logit_error is not None
        assert report.logit_error < 1e-5
        assert error(logits(model), live) < 1e-5


@pytest.mark.parametrize(("init", "quantize"), [("pissa", "none"), ("loftq", "nf4")])
def test_a_run_is_merged_and_its_checkpoint_taken_elsewhere(init: str, quantize: str, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    module = LM(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    words: dict[str, Any] = {"r": 4, "lora_alpha": 4, "init_lora_weights": init, "quantize": quantize}
    kept = AdapterCheckpoint(tmp_path / "run", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    ends = [MergeOnFitEnd(tmp_path / "last"), MergeOnFitEnd(tmp_path / "best", weights="best")]
    trainer = make_trainer(tmp_path, [LoRA(**words), kept, *ends], max_steps=4)
    trainer.fit(module, loader())
    for name in ("last", "best"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert error(logits(merged), logits(module.net)) < 1e-5
    last = tmp_path / "run" / "step=4.ckpt"
    state = read_checkpoint(last)["state_dict"]
    assert {key.rpartition(".")[2] for key in state} == {"lora_A", "lora_B", "start_A", "start_B"}
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    load_adapter(other, last)
    assert torch.equal(logits(other), logits(module.net))
    facts = adapter_facts(last)
    assert facts.config["init_lora_weights"] == init
    mine = adapter_spectra(module)
    for name, spectrum in facts.modules.items():
        assert spectrum.r == 8
        torch.testing.assert_close(
            torch.tensor(spectrum.singular_values), torch.tensor(mine[name].singular_values), rtol=1e-4, atol=1e-6
        )
    if quantize == "none":
        weight = tiny_llama().model.layers[0].self_attn.q_proj.weight
        norm = base_norms(module)["net.model.layers.0.self_attn.q_proj"]
        assert norm == pytest.approx(float(weight.norm()), rel=1e-5)


class Net(LM):
    """Builds its net from a seed."""

    def __init__(self) -> None:
        torch.manual_seed(2)
        super().__init__(TinyNet())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_checkpoint_of_another_start(quantize: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Net()
    lora = LoRA(r=4, lora_alpha=4, init_lora_weights="pissa", quantize=quantize)  # type: ignore[arg-type]
    trainer = make_trainer(tmp_path, [lora], max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(logits(load_from_checkpoint(Net, tmp_path / "a.ckpt")), logits(module))
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    state = checkpoint["state_dict"]
    for key in [key for key in state if key.endswith("start_B")]:  # another machine's: each pair turned, and larger
        turn = torch.linalg.qr(torch.randn(4, 4))[0]
        state[key] = 1.1 * state[key] @ turn.t()
        state[key.replace("start_B", "start_A")] = turn @ state[key.replace("start_B", "start_A")]
    write_checkpoint(checkpoint, tmp_path / "b.ckpt")
    if quantize != "none":
        with pytest.raises(AdapterMismatchError, match=r"b\.ckpt: the start of 'pissa' comes out by 1\.\de-01"):
            load_from_checkpoint(Net, tmp_path / "b.ckpt")
        return
    again = load_from_checkpoint(Net, tmp_path / "b.ckpt")
    with disable_adapters(again), disable_adapters(module):
        assert error(logits(again), logits(module)) < 1e-5
    assert error(logits(again), logits(module)) > 1e-3


def test_what_it_is_not_built_for_is_refused_by_name(tmp_path: Path) -> None:
    model = moved(started("olora")).eval()
    save_adapter(model, tmp_path / "own")
    adapter_folder(tmp_path / "lora", tiny_llama, 5, r=4)
    before = logits(model)
    for folder, name in (("own", None), ("lora", None), ("lora", "other")):
        with pytest.raises(UnsupportedError, match="others do not fit what is left of the base"):
            load_adapter(model, tmp_path / folder, name=name)
    with pytest.raises(UnsupportedError, match="not built for"), mixed_batch(model, ["default"] * 2):
        model(IDS)
    with pytest.raises(UnsupportedError, match="has no two factors to combine"):
        add_weighted_adapter(model, ["default"], [1.0], "sum", "linear")
    with use_adapter(model, "default"):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
    with pytest.raises(UnsupportedError, match=r"PiSSA, OLoRA, LoftQ\) is not built for DeepSpeed: use \"lora_ddp\""):
        refuse_adapters(model)
    with pytest.raises(UnsupportedError, match=r"PiSSA, OLoRA, LoftQ\) is not built for FSDP 2"):
        shard_model(model, None)
    frozen = tiny_llama()
    apply_lora(frozen, LoRAConfig(r=4, freeze_lora_A=True))
    with pytest.raises(UnsupportedError, match=r"LoRA-FA \(`freeze_lora_A`\) is not built for DeepSpeed"):
        refuse_adapters(frozen)
    plain = tiny_llama()
    load_adapter(plain, tmp_path / "lora")
    trainer = make_trainer(tmp_path, [LoRA(init_lora_weights="pissa", r=4)], max_steps=1)
    trainer.fit(LM(tiny_llama()), loader())
    trainer.save_checkpoint(tmp_path / "p.ckpt")
    with pytest.raises(UnsupportedError, match="others do not fit what is left of the base"):
        load_adapter(plain, tmp_path / "p.ckpt", name="beside")
    with torch.device("meta"):
        empty = TinyNet()
    with pytest.raises(UnsupportedError, match="no values on the meta device"):
        apply_lora(empty, LoRAConfig(r=4, init_lora_weights="pissa"))
    with pytest.raises(ConfigError, match=r"`r` is 100, and a layer of"):
        started("pissa", r=100)


def test_layers_that_bitsandbytes_packed_are_refused() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    net = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    net = net.to("cpu")
    with pytest.raises(UnsupportedError, match="a Linear4bit is packed already"):
        apply_lora(net, LoRAConfig(r=4, init_lora_weights="pissa"))
