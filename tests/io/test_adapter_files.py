# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: what is written, what is loaded, and every way in which a folder can be wrong."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    AdapterMismatchError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    Notice,
    UnsupportedError,
)
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.peft_config import peft_config
from lightning_lora.model.apply import apply_lora, set_adapter_scale
from lightning_lora.model.slots import adapter_modules, adapter_record
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import LM, TinyNet, random_adapters, tiny_gpt2, tiny_llama

IDS = torch.arange(32).view(2, 16) % 61
WEIGHTS, CONFIG, RECORD = "adapter_model.safetensors", "adapter_config.json", "lightning_lora.json"
A_KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return out.logits if hasattr(out, "logits") else out


def adapted(base: nn.Module | None = None, **config: Any) -> nn.Module:
    base = tiny_llama() if base is None else base
    apply_lora(base, LoRAConfig(**{"r": 4, **config}))
    return random_adapters(base)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = adapter_state_dict(a), adapter_state_dict(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def edit(folder: Path, name: str, **changes: Any) -> None:
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, **changes}))


def edit_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_plain_model_is_converted_as_the_folder_says(quantize: str, tmp_path: Path) -> None:
    config = {"quantize": quantize, "rank_pattern": {"q_proj": 2}, "lora_dropout": 0.1}
    model = adapted(**config, modules_to_save=["lm_head"])
    report = save_adapter(model, tmp_path / "a")
    other = tiny_llama()
    load_adapter(other, tmp_path / "a")
    assert same(model, other)
    assert torch.equal(logits(other), logits(model))
    assert adapter_record(other).config == adapter_record(model).config
    assert report.tensors == len(adapter_state_dict(model))
    assert report.delta_error < 1e-7


def test_a_converted_model_is_filled_in_place(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    other = LM(tiny_llama())
    apply_lora(other, LoRAConfig(r=4))
    held = {k: v.data_ptr() for k, v in adapter_state_dict(other).items()}
    load_adapter(other, tmp_path / "a")
    assert torch.equal(logits(other), logits(model))
    assert {k: v.data_ptr() for k, v in adapter_state_dict(other).items()} == held


def test_names_are_those_inside_the_transformers_model_whatever_holds_it(tmp_path: Path) -> None:
    model = LM(tiny_llama())
    model.net = torch.compile(model.net, backend="eager")
    save_adapter(adapted(model), tmp_path / "a")
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert file.metadata()["format"] == "pt"
    assert A_KEY in keys
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)


def test_a_users_attribute_called_module_keeps_its_name(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.module = nn.Linear(8, 8)

    save_adapter(adapted(Holder()), tmp_path / "a")
    keys = set(load_file(tmp_path / "a" / WEIGHTS))
    assert keys == {f"base_model.model.module.lora_{x}.weight" for x in "AB"}
    load_adapter(Holder(), tmp_path / "a")


def test_adapters_outside_the_transformers_model_are_written_with_it(tmp_path: Path) -> None:
    class WithHead(LM):
        def __init__(self) -> None:
            super().__init__(tiny_llama())
            torch.manual_seed(4)
            self.scorer = nn.Linear(64, 3)

    model = adapted(WithHead(), modules_to_save=["scorer"])
    with pytest.warns(Notice, match="adapters lie outside the transformers model"):
        save_adapter(model, tmp_path / "a")
    assert "base_model.model.scorer.weight" in load_file(tmp_path / "a" / WEIGHTS)
    other = WithHead()
    load_adapter(other, tmp_path / "a")
    assert same(model, other)


def test_master_weights_stay_fp32_over_a_bf16_base_unless_cast(tmp_path: Path) -> None:
    model = adapted(tiny_llama().bfloat16())
    save_adapter(model, tmp_path / "a")
    assert {t.dtype for t in load_file(tmp_path / "a" / WEIGHTS).values()} == {torch.float32}
    report = save_adapter(model, tmp_path / "b", dtype="bf16")
    assert {t.dtype for t in load_file(tmp_path / "b" / WEIGHTS).values()} == {torch.bfloat16}
    assert 0 < report.delta_error < 1e-2
    load_adapter(tiny_llama().bfloat16(), tmp_path / "b")


def test_a_strength_is_part_of_the_written_scale(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"], use_rslora=True)
    set_adapter_scale(model, 0.25)
    save_adapter(model, tmp_path / "a")
    other = tiny_llama()
    load_adapter(other, tmp_path / "a")
    assert torch.allclose(logits(other), logits(model), atol=1e-5)
    set_adapter_scale(model, 0.0)
    with pytest.raises(ConfigError, match="strength is 0.0"):
        save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("layout", ["peft", "portable"])
def test_a_folder_saved_at_a_strength_is_loaded_into_the_model_that_wrote_it(layout: str, tmp_path: Path) -> None:
    model = adapted(use_rslora=layout == "peft", modules_to_save=["lm_head"] if layout == "peft" else None)
    set_adapter_scale(model, 0.5)
    live = logits(model)
    if layout == "portable":  # of rank 8 and scale 1: for a plain model
        save_adapter(model, tmp_path / "a", layout=layout)
        with pytest.raises(AdapterMismatchError, match="has rank 8 there and 4 in the model"):
            load_adapter(model, tmp_path / "a")
        return
    for _ in range(2):
        save_adapter(model, tmp_path / "a")
        load_adapter(model, tmp_path / "a")
        assert torch.allclose(logits(model), live, atol=1e-6)
    other = tiny_llama()
    for _ in range(2):  # plain, then converted by the first load
        load_adapter(other, tmp_path / "a")
        assert torch.allclose(logits(other), live, atol=1e-5)
    set_adapter_scale(model, 1.0)
    save_adapter(model, tmp_path / "b")
    set_adapter_scale(model, 0.5)
    load_adapter(model, tmp_path / "b")
    assert {m.strength for _, m in adapter_modules(model)} == {1.0}


def test_weights_that_became_nan_are_written_as_they_are(tmp_path: Path) -> None:
    model = adapted()
    next(iter(adapter_state_dict(model).values())).fill_(float("nan"))
    save_adapter(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / WEIGHTS)[A_KEY].isnan().all()


def test_what_a_cast_does_is_measured_and_an_overflow_refused(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    for _, module in adapter_modules(model):
        if isinstance(module, LoRALinear):
            module.lora_B.data.zero_()
    assert save_adapter(model, tmp_path / "a").delta_error < 1e-7
    assert 1e-4 < save_adapter(model, tmp_path / "a", dtype="bf16").delta_error < 1e-2  # of the head
    factor = next(iter(adapter_state_dict(model).values()))
    factor.fill_(1e6)
    for large in (factor, model.lm_head.trained.weight.data):
        large.fill_(1e6)
        with pytest.raises(UnsupportedError, match="values up to 1e\\+06 do not fit torch.float16: use bf16"):
            save_adapter(model, tmp_path / "b", dtype="fp16")
        large.zero_()
    assert not (tmp_path / "b").exists()
    factor.fill_(float("nan"))
    for dtype in (None, "fp16"):
        assert math.isnan(save_adapter(model, tmp_path / "a", dtype=dtype).delta_error)


@pytest.mark.parametrize("dtype", [None, "bf16"])
@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_a_folder_says_whether_its_values_are_finite(value: float, dtype: Any, tmp_path: Path) -> None:
    """So that a digest is enough where they are; they are looked at where it says nothing, or no."""
    model = adapted()
    next(iter(adapter_state_dict(model).values())).fill_(value)
    save_adapter(model, tmp_path / "a", dtype=dtype)
    finite = math.isfinite(value)
    assert json.loads((tmp_path / "a" / RECORD).read_text())["finite"] is finite
    for _ in range(2):
        if finite:
            load_adapter(adapted(), tmp_path / "a")
        else:
            with pytest.raises(CheckpointError, match="holds NaN or inf"):
                load_adapter(adapted(), tmp_path / "a")
        edit(tmp_path / "a", RECORD, finite=None)  # as written by an earlier version


def test_batchnorm_statistics_of_a_saved_module_travel(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    torch.manual_seed(0)
    base = Normed()
    model = adapted(copy.deepcopy(base), modules_to_save=["norm"])
    model.train()(torch.randn(8, 4))
    save_adapter(model, tmp_path / "a")
    load_adapter(base, tmp_path / "a")
    assert same(model, base)


@pytest.mark.parametrize("layout", ["peft", "portable"])
def test_a_folder_of_the_users_is_not_replaced(layout: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds 'thesis.tex': it is not replaced. Choose another folder"):
        save_adapter(adapted(), tmp_path / "mine", layout=layout)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_adapter_folder_is_replaced_unless_it_holds_more(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    model = adapted()
    for _ in range(2):
        save_adapter(model, tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("PEFT's model card")
    save_adapter(model, tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {CONFIG, WEIGHTS, RECORD}
    (tmp_path / "a" / "runs").mkdir()
    with pytest.raises(CheckpointError, match="holds 'runs'"):
        save_adapter(model, tmp_path / "a")
    (tmp_path / "f").write_text("a file")
    with pytest.raises(CheckpointError, match="a file stands there"):
        save_adapter(model, tmp_path / "f")


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = adapted()
    assert save_adapter(model, "~/a").path == tmp_path / "a"
    load_adapter(model, "~/a")


def test_another_layout_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`layout` must be .* got 'gguf'"):
        save_adapter(adapted(), tmp_path / "a", layout="gguf")


def test_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='`dtype` must be "fp32", "bf16", "fp16" or null, got \'int4\''):
        save_adapter(adapted(), tmp_path / "a", dtype="int4")


def test_a_model_without_adapters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterMismatchError, match="no adapters to write"):
        save_adapter(tiny_llama(), tmp_path / "a")


def test_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    for other in (tiny_llama(seed=1), adapted(tiny_llama(seed=1))):
        with pytest.raises(
            BaseMismatchError,
            match="the adapters in .*a were trained on another base: expected LlamaForCausalLM with fingerprint",
        ):
            load_adapter(other, tmp_path / "a")


def test_a_base_that_cannot_be_compared_is_said_unless_the_folder_is_pefts(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    edit(tmp_path / "a", RECORD, fingerprint=None)
    for other in (tiny_llama(), model):
        with pytest.warns(Notice, match="could not be compared with the one that the adapters in .*a were trained"):
            load_adapter(other, tmp_path / "a")
    (tmp_path / "a" / RECORD).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path / "a")


def test_another_packing_is_said(tmp_path: Path) -> None:
    save_adapter(adapted(quantize="nf4"), tmp_path / "a")
    with pytest.warns(Notice, match="over a base packed as 'nf4', this one is 'none'"):
        load_adapter(adapted(), tmp_path / "a")


@pytest.mark.parametrize("convert", [False, True], ids=["plain", "converted"])
def test_a_missing_and_an_unknown_key_name_the_nearest(convert: bool, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[A_KEY.replace("q_proj", "q_porj")] = tensors.pop(A_KEY)

    edit_tensors(tmp_path / "a", rename)
    model = adapted() if convert else tiny_llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match=r"1 of 28 tensors are missing.*q_proj.*nearest.*q_porj"):
        load_adapter(model, tmp_path / "a")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("convert", [False, True], ids=["plain", "converted"])
def test_another_shape_is_refused(convert: bool, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors[A_KEY] = tensors[A_KEY][:, :10].contiguous()

    edit_tensors(tmp_path / "a", narrow)
    with pytest.raises(AdapterMismatchError, match=r"has shape \(4, 10\), the model needs \(4, 64\)"):
        load_adapter(adapted() if convert else tiny_llama(), tmp_path / "a")


def test_another_scale_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(lora_alpha=8), tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="is scaled by 2 there and by 4 in the model"):
        load_adapter(adapted(lora_alpha=16), tmp_path / "a")


def test_another_rank_is_said_as_such(tmp_path: Path) -> None:
    save_adapter(adapted(r=2), tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="q_proj' has rank 2 there and 4 in the model: convert it with the"):
        load_adapter(adapted(r=4), tmp_path / "a")


def test_another_choice_of_modules_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(target_modules=["q_proj"]), tmp_path / "a")
    with pytest.raises(AdapterMismatchError, match="tensors are missing"):
        load_adapter(adapted(), tmp_path / "a")
    edit(tmp_path / "a", "lightning_lora.json", fingerprint=None)
    with pytest.raises(AdapterMismatchError, match="unknown to the model"):
        load_adapter(tiny_gpt2(), tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), CheckpointError, "has no adapter_config.json"),
        (lambda f: (f / CONFIG).write_text("{"), CheckpointError, "adapter_config.json is no JSON"),
        (lambda f: (f / CONFIG).write_text("[]"), CheckpointError, "must hold a JSON object, got list"),
        (lambda f: (f / WEIGHTS).unlink(), CheckpointError, "has no adapter_model.safetensors"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), CheckpointError, "a pickle, which is not"),
        (lambda f: (f / WEIGHTS).write_bytes(b"\x00" * 40), CheckpointError, "no whole safetensors file"),
        (lambda f: edit(f, CONFIG, lora_bias=True), UnsupportedError, "`lora_bias` is True"),
        (lambda f: edit(f, CONFIG, use_dora=True), AdapterMismatchError, "first .*lora_magnitude_vector"),
        (lambda f: edit(f, CONFIG, target_modules="("), CheckpointError, "no regular expression"),
        (lambda f: edit(f, CONFIG, r="many"), CheckpointError, "adapter_config.json: `r`"),
        (lambda f: edit(f, RECORD, config={"colour": 1}), CheckpointError, "may be of a newer version"),
    ],
)
def test_a_damaged_folder_is_a_clear_error(damage: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(kind, match=message):
        load_adapter(tiny_llama(), tmp_path / "a")


def test_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no adapter folder at"):
        load_adapter(tiny_llama(), tmp_path / "nowhere")


def test_keys_of_a_newer_peft_are_ignored(tmp_path: Path) -> None:
    model = adapted()
    save_adapter(model, tmp_path / "a")
    edit(tmp_path / "a", "adapter_config.json", a_key_of_tomorrow=[1], runtime_config={"x": 1}, peft_version="9")
    other = tiny_llama()
    load_adapter(other, tmp_path / "a")
    assert same(model, other)


def test_a_choice_that_peft_cannot_express_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.lm_head, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    model = adapted(Two(), target_modules=["fc"], modules_to_save=["head"])
    with pytest.raises(UnsupportedError, match="'head' is kept in full and 'lm_head' is not"):
        peft_config(model)
    with pytest.raises(UnsupportedError, match="Rename one of them"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_without_peft_or_transformers_a_plain_net_goes_there_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = TinyNet()
    model = adapted(copy.deepcopy(net), quantize="nf4")
    save_adapter(model, tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(net, tmp_path / "a")
    assert torch.equal(logits(net), logits(model))
