# SPDX-License-Identifier: Apache-2.0
"""Many adapters, one base: whatever was in use before, an adapter computes what it computes alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_lora import (
    LoRAConfig,
    active_adapter,
    adapter_state_dict,
    apply_lora,
    delete_adapter,
    disable_adapters,
    list_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_adapter,
    set_adapter_scale,
    use_adapter,
)
from lightning_lora.errors import AdapterMismatchError, ConfigError, UnsupportedError
from lightning_lora.io.checkpoint import metadata
from lightning_lora.model.residents import rename_adapter
from lightning_lora.model.sharding import shard_model
from tests.helpers import tiny_llama
from tests.model.many import ADAPTERS, adapter_folder, logits
from tests.model.nets import Normed, notices, tiny_bert


def test_each_adapter_computes_what_it_does_alone(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    assert list_adapters(model) == list(ADAPTERS)
    for name in [*ADAPTERS, *reversed(ADAPTERS)]:
        set_adapter(model, name)
        assert active_adapter(model) == name
        assert torch.equal(logits(model), wanted[name]), name


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_ends_where_a_fresh_load_does(data: st.DataObject, llamas: tuple[Path, dict[str, Tensor]]) -> None:
    """Set, borrow, load, scale, delete in any order: what is in use is what a fresh model with it would be."""
    folder, wanted = llamas
    model = tiny_llama().eval()
    first = data.draw(st.sampled_from(list(ADAPTERS)))
    load_adapter(model, folder / first, name="x")
    content = {"x": first}
    for _ in range(data.draw(st.integers(1, 6))):
        action = data.draw(st.sampled_from(["set", "load", "borrow", "delete", "fail", "off"]))
        slot = data.draw(st.sampled_from(["x", "y", "z"]))
        source = data.draw(st.sampled_from(list(ADAPTERS)))
        if action == "load":
            load_adapter(model, folder / source, name=slot)
            content[slot] = source
        elif slot in content and action == "set":
            set_adapter(model, slot)
        elif slot in content and action == "borrow":
            with use_adapter(model, slot):
                assert torch.equal(logits(model), wanted[content[slot]])
        elif slot in content and slot != active_adapter(model) and action == "delete":
            delete_adapter(model, slot)
            del content[slot]
        elif slot in content and action == "fail":
            with pytest.raises(KeyError), use_adapter(model, slot):
                raise KeyError
        elif action == "off":
            with disable_adapters(model):
                assert torch.equal(logits(model), wanted["__base__"])
        assert sorted(list_adapters(model)) == sorted(content)
        assert torch.equal(logits(model), wanted[content[active_adapter(model)]])


def test_waiting_adapters_are_seen_by_nothing(many: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path) -> None:
    model, _ = many
    set_adapter(model, "wide")
    alone = tiny_llama()
    apply_lora(alone, LoRAConfig(**ADAPTERS["wide"]))
    assert adapter_state_dict(model).keys() == adapter_state_dict(alone).keys()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in alone.named_parameters() if p.requires_grad}
    assert all(p.numel() == 0 for n, p in model.named_parameters() if "adapter" in n and n not in trained)
    entry = metadata(model)
    assert entry["targets"] == metadata(alone)["targets"]
    assert entry["config"]["r"] == 9
    assert save_adapter(model, tmp_path / "out").tensors == 8
    assert not [name for name in model.state_dict() if "waiting" in name]


def test_parameters_stay_the_same_objects(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, _ = many
    before = dict(model.named_parameters())
    storages = {n: p.data_ptr() for n, p in before.items() if p.requires_grad}
    set_adapter(model, "scaled")
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in before.items())
    assert all(after[name].data_ptr() != storages[name] for name in storages)
    set_adapter(model, "plain")
    assert {n: before[n].data_ptr() for n in storages} == storages, "a swap copies nothing"


def test_contexts_nest_and_restore(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    before = dict(model.named_parameters())
    with use_adapter(model, "wide"):
        with use_adapter(model, "plain"), use_adapter(model, "head"):
            assert torch.equal(logits(model), wanted["head"])
        assert torch.equal(logits(model), wanted["wide"])
        set_adapter(model, "scaled")
        assert torch.equal(logits(model), wanted["scaled"])
        with pytest.raises(ConfigError, match="'plain' is in use: put another one"):
            delete_adapter(model, "plain")
    with use_adapter(model, "plain"):
        set_adapter(model, "twin")
    assert active_adapter(model) == "plain"
    assert all(p is before[name] for name, p in model.named_parameters())
    assert all(p.requires_grad == before[name].requires_grad for name, p in model.named_parameters())
    for name in ADAPTERS:
        set_adapter(model, name)
        assert torch.equal(logits(model), wanted[name]), name


def test_strength_belongs_to_the_adapter(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    set_adapter_scale(model, 0.0)
    assert torch.equal(logits(model), wanted["__base__"])
    set_adapter(model, "wide")
    assert torch.equal(logits(model), wanted["wide"])
    set_adapter(model, "plain")
    assert torch.equal(logits(model), wanted["__base__"])
    set_adapter_scale(model, 1.0)
    assert torch.equal(logits(model), wanted["plain"])


def test_disabled_stays_disabled_over_a_swap(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    with disable_adapters(model):
        set_adapter(model, "head")
        assert torch.equal(logits(model), wanted["__base__"])
    assert torch.equal(logits(model), wanted["head"])


@pytest.mark.parametrize("name", ["head", "plain"])
def test_merge_takes_the_adapter_in_use(name: str, many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    set_adapter(model, name)
    report = merge_adapters(model)
    assert len(report.layers) == (3 if name == "head" else 14)
    assert torch.allclose(logits(model), wanted[name], atol=1e-5)


def test_named_adapters_are_written_as_they_were_read(
    many: tuple[nn.Module, dict[str, Tensor]], tmp_path: Path
) -> None:
    model, wanted = many
    for name in ADAPTERS:
        save_adapter(model, tmp_path / name, name=name)
        fresh = tiny_llama().eval()
        load_adapter(fresh, tmp_path / name)
        assert torch.equal(logits(fresh), wanted[name]), name
    assert active_adapter(model) == "plain"
    with pytest.raises(ConfigError, match=r"no adapter 'wid' \(nearest: 'wide'\)"):
        save_adapter(model, tmp_path / "none", name="wid")


def test_a_copy_has_adapters_of_its_own(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        set_adapter(other, "wide")
        assert torch.equal(logits(other), wanted["wide"])
        assert active_adapter(model) == "plain"
        assert torch.equal(logits(model), wanted["plain"])


def test_adapters_follow_a_model_that_was_cast(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    """The base goes to bf16, the master adapters stay fp32, waiting or not."""
    model, wanted = many
    model.bfloat16()
    for name in ("wide", "plain"):
        set_adapter(model, name)
        assert {t.dtype for t in adapter_state_dict(model).values()} == {torch.float32}
        assert torch.allclose(logits(model).float(), wanted[name], atol=0.05)


def test_folders_of_another_dtype_are_cast_with_a_notice(llamas: tuple[Path, dict[str, Tensor]]) -> None:
    folder, wanted = llamas
    model = tiny_llama().eval()
    apply_lora(model, LoRAConfig(adapter_dtype="bf16"))
    (said,) = notices(lambda: load_adapter(model, folder / "wide", name="wide"))
    assert "is torch.float32, this model holds adapters in torch.bfloat16: it is rounded" in said
    set_adapter(model, "wide")
    assert torch.allclose(logits(model), wanted["wide"], atol=0.02)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_packed_base(quantize: str, tmp_path: Path) -> None:
    configs = {"a": {"r": 4, "quantize": quantize}, "b": {"r": 3, "quantize": quantize, "target_modules": ["k_proj"]}}
    wanted = {n: adapter_folder(tmp_path / n, tiny_llama, i, **c) for i, (n, c) in enumerate(configs.items())}
    for order in ("ab", "ba"):
        model = tiny_llama().eval()
        for name in order:
            load_adapter(model, tmp_path / name, name=name)
        for name in (*order, *order):
            set_adapter(model, name)
            assert torch.equal(logits(model), wanted[name]), (order, name)


def test_modules_to_save(tmp_path: Path) -> None:
    """Modules trained in full are exchanged too; what one adapter does not train is the base's."""
    configs: dict[str, dict[str, Any]] = {
        "both": {"r": 2, "modules_to_save": ["classifier"]},
        "other": {"r": 3, "modules_to_save": ["classifier", "pooler"], "target_modules": ["query"]},
    }
    wanted = {n: adapter_folder(tmp_path / n, tiny_bert, i + 5, **c) for i, (n, c) in enumerate(configs.items())}
    model = tiny_bert().eval()
    load_adapter(model, tmp_path / "both", name="both")
    before = {id(p) for p in model.parameters()}
    # `pooler.dense` is adapted by the first and trained in full by the second
    with pytest.raises(UnsupportedError, match="trained in full by another"):
        load_adapter(model, tmp_path / "other", name="other")
    assert {id(p) for p in model.parameters()} == before
    model = tiny_bert().eval()
    configs["both"] |= {"exclude_modules": ["pooler.dense"]}
    wanted["both"] = adapter_folder(tmp_path / "both", tiny_bert, 5, **configs["both"])
    load_adapter(model, tmp_path / "both", name="both")
    load_adapter(model, tmp_path / "other", name="other")
    for name in ("other", "both", "other"):
        set_adapter(model, name)
        assert torch.equal(logits(model), wanted[name])
        with use_adapter(model, "both"):
            assert torch.equal(logits(model), wanted["both"])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == set(adapter_state_dict(model)), name
        assert any("pooler" in n for n in trained) == (name == "other")


def test_running_statistics_of_a_second_adapter_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normed()
    apply_lora(model, LoRAConfig(modules_to_save=["batch"]))
    save_adapter(model, tmp_path / "a")
    torch.manual_seed(0)
    other = Normed()
    apply_lora(other, LoRAConfig())
    with pytest.raises(UnsupportedError, match="'batch' is trained in full and has running statistics"):
        load_adapter(other, tmp_path / "a", name="a")


def test_the_adapter_in_use_is_replaced_in_place(llamas: tuple[Path, dict[str, Tensor]]) -> None:
    """Without a name it must fit; with its name it may be any."""
    folder, wanted = llamas
    model = tiny_llama().eval()
    load_adapter(model, folder / "plain")
    assert list_adapters(model) == ["default"]
    parameters = {n: (p, p.data_ptr()) for n, p in model.named_parameters() if p.requires_grad}
    load_adapter(model, folder / "twin")
    assert torch.equal(logits(model), wanted["twin"])
    assert all(
        p is parameters[n][0] and p.data_ptr() == parameters[n][1]
        for n, p in model.named_parameters()
        if p.requires_grad
    )
    for name in ("scaled", "wide"):
        with pytest.raises(AdapterMismatchError):
            load_adapter(model, folder / name)
        assert torch.equal(logits(model), wanted["twin"])
    for name in ("scaled", "wide", "head", "plain"):
        load_adapter(model, folder / name, name="default")
        assert list_adapters(model) == ["default"]
        assert torch.equal(logits(model), wanted[name])


def test_a_base_of_other_shapes_changes_nothing(llamas: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    folder, _ = llamas
    model = tiny_llama(hidden_size=32).eval()
    apply_lora(model, LoRAConfig(target_modules=["q_proj"]))
    names = [name for name, _ in model.named_modules()]
    (folder / "plain" / "lightning_lora.json").rename(tmp_path / "record")  # as a folder of PEFT's
    try:
        with pytest.raises(AdapterMismatchError):
            load_adapter(model, folder / "plain", name="b")
    finally:
        (tmp_path / "record").rename(folder / "plain" / "lightning_lora.json")
    assert [name for name, _ in model.named_modules()] == names
    assert list_adapters(model) == ["default"]


def test_messages(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, _ = many
    with pytest.raises(ConfigError, match=r"no adapter 'wyde' \(nearest: 'wide'\); it has \['plain', 'twin'"):
        set_adapter(model, "wyde")
    with pytest.raises(ConfigError, match="give the whole model"):
        set_adapter(model.model.layers[0], "wide")
    with pytest.raises(ConfigError, match="has no adapters"):
        set_adapter(tiny_llama(), "wide")
    with pytest.raises(ConfigError, match="is in use: put another one"):
        delete_adapter(model, "plain")
    with pytest.raises(ConfigError, match="has an adapter 'wide' already"):
        rename_adapter(model, "wide")
    for name in ("", "__base__", 3):
        with pytest.raises(ConfigError, match="must be a word other than '__base__'"):
            rename_adapter(model, name)  # type: ignore[arg-type]
    meta = tiny_llama()
    apply_lora(meta, LoRAConfig())
    two = nn.ModuleList([model, meta])
    with pytest.raises(ConfigError, match="converted one by one"):
        list_adapters(two)


def test_adapters_on_the_meta_device_are_refused(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, _ = many
    model.to("meta")
    for swap in (set_adapter, lambda m, n: use_adapter(m, n).__enter__()):
        with pytest.raises(UnsupportedError, match="sharded or on the meta device"):
            swap(model, "twin")
        assert active_adapter(model) == "plain"


def test_sharded_adapters_are_refused_and_vacant_layers_shard(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    set_adapter(model, "wide")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard_model(model, init_device_mesh("cpu", (1,)))
        assert torch.allclose(logits(model), wanted["wide"], atol=1e-5)
        for swap in (set_adapter, lambda m, n: use_adapter(m, n).__enter__()):
            with pytest.raises(UnsupportedError, match="before `fully_shard`"):
                swap(model, "plain")
        assert active_adapter(model) == "wide"
        assert torch.allclose(logits(model), wanted["wide"], atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
