# SPDX-License-Identifier: Apache-2.0
"""Weighted combinations: PEFT as the oracle where it is deterministic, dense matrices where it is not exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    add_weighted_adapter,
    apply_lora,
    list_adapters,
    load_adapter,
    save_adapter,
    set_adapter,
    set_adapter_scale,
    use_adapter,
)
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import TinyNet, random_adapters, tiny_gpt2, tiny_llama
from tests.model.nets import tiny_bert

IDS = torch.arange(32).view(2, 16) % 64
NAMES = ("a", "b", "c")


def folders(path: Path, build: Any = tiny_llama, **configs: dict[str, Any]) -> None:
    for seed, (name, config) in enumerate(configs.items()):
        model = build()
        apply_lora(model, LoRAConfig(**config))
        save_adapter(random_adapters(model, seed=seed), path / name)


def loaded(path: Path, model: nn.Module, names: tuple[str, ...] = NAMES) -> nn.Module:
    for name in names:
        load_adapter(model, path / name, name=name)
    return model.eval()


def deltas(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """The update of every layer of an adapter, by layer."""
    if name is None:
        layers = ((n, m) for n, m in adapter_modules(model) if isinstance(m, LoRALinear))
        return {n: m.delta_weight(torch.float32) for n, m in layers}
    with use_adapter(model, name):
        return deltas(model)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


# As PEFT

SAME_RANK = {"a": {"r": 4, "lora_alpha": 8}, "b": {"r": 4, "lora_alpha": 3}, "c": {"r": 4, "lora_alpha": 4}}
OTHER_RANKS = {"a": {"r": 4}, "b": {"r": 6, "target_modules": ["q_proj", "up_proj"]}, "c": {"r": 2}}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": (SAME_RANK, {}),
    "cat": (OTHER_RANKS, {}),
    "svd": (OTHER_RANKS, {}),
    "svd of rank 3": (OTHER_RANKS, {"svd_rank": 3}),
    "ties": (SAME_RANK, {"density": 0.4}),
    "ties by frequency": (SAME_RANK, {"density": 0.7, "majority_sign_method": "frequency"}),
    "dare_linear": (SAME_RANK, {"density": 1.0}),
    "dare_ties": (SAME_RANK, {"density": 1.0}),
}


@pytest.mark.filterwarnings("ignore:The density 1.0:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_as_peft_combines(case: str, tmp_path: Path) -> None:
    configs, arguments = CASES[case]
    kind = case.split()[0]
    weights = [0.7, -1.3, 0.4]
    folders(tmp_path, **configs)
    ours = loaded(tmp_path, tiny_llama())
    add_weighted_adapter(ours, list(NAMES), weights, "mix", kind, **arguments)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), adapter_name="a")
    for name in NAMES[1:]:
        theirs.load_adapter(str(tmp_path / name), name)
    theirs.add_weighted_adapter(list(NAMES), weights, "mix", combination_type=kind, **arguments)
    got = deltas(ours, "mix")
    assert len(got) == 14
    for name, delta in got.items():
        twin = theirs.base_model.model.get_submodule(name)
        assert relative(delta, twin.get_delta_weight("mix")) < 1e-4, name
    theirs.set_adapter("mix")
    set_adapter(ours, "mix")
    with torch.no_grad():
        assert relative(ours(IDS).logits, theirs.eval()(IDS).logits) < 1e-5


# Against dense matrices


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, TinyNet])
@pytest.mark.parametrize("rank", [1, 3, 10, 40])
def test_svd_is_the_dense_truncation(rank: int, build: Any, tmp_path: Path) -> None:
    """Ranks above what there is too; Conv1D layers as well; no other approximation is nearer."""
    torch.manual_seed(0)
    base = build().state_dict()

    def same() -> nn.Module:
        model = build()
        model.load_state_dict(base)
        return model

    folders(tmp_path, same, a={"r": 4}, b={"r": 5, "use_rslora": True}, c={"r": 2})
    model = loaded(tmp_path, same())
    weights = [0.7, -1.3, 0.4]
    add_weighted_adapter(model, list(NAMES), weights, "mix", svd_rank=rank)
    parts = [deltas(model, name) for name in NAMES]
    for name, delta in deltas(model, "mix").items():
        whole = sum(w * part[name].double() for w, part in zip(weights, parts, strict=True))
        U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
        assert relative(delta.double(), (U[:, :rank] * S[:rank]) @ Vh[:rank]) < 1e-5, name


@settings(max_examples=15, deadline=None)
@given(
    weights=st.lists(st.floats(-2, 2).filter(lambda w: abs(w) > 1e-3), min_size=3, max_size=3),
    factor=st.floats(-3, 3).filter(lambda f: abs(f) > 1e-2),
    ranks=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    strength=st.floats(0.1, 2),
    seed=st.integers(0, 1000),
)
def test_exact_kinds_are_linear_in_the_weights(
    weights: list[float], factor: float, ranks: tuple[int, ...], strength: float, seed: int
) -> None:
    """cat, and svd at full rank: the sum of the updates, each at its strength, times any factor."""
    torch.manual_seed(seed)
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=ranks[0]))
    random_adapters(model, seed=seed)
    set_adapter_scale(model, strength)
    for name, rank in zip("bc", ranks[1:], strict=True):
        add_weighted_adapter(model, ["default"], [1.0], name, svd_rank=rank)
    names = ["default", "b", "c"]
    parts = [deltas(model, name) for name in names]
    full = sum(ranks)
    for kind, more in (("cat", {}), ("svd", {"svd_rank": full})):
        add_weighted_adapter(model, names, weights, "mix", kind, **more)
        add_weighted_adapter(model, names, [factor * w for w in weights], "scaled", kind, **more)
        mix, scaled = deltas(model, "mix"), deltas(model, "scaled")
        for name, delta in mix.items():
            want = sum(w * part[name] for w, part in zip(weights, parts, strict=True))
            size = sum(abs(w) * part[name].norm() for w, part in zip(weights, parts, strict=True))
            assert (delta - want).norm() < 1e-5 * size
            assert (scaled[name] - factor * want).norm() < 1e-5 * abs(factor) * size
    assert list_adapters(model) == ["default", "b", "c", "mix", "scaled"]


def test_dare_keeps_the_mean_and_is_seeded(tmp_path: Path) -> None:
    folders(tmp_path, a={"r": 4}, b={"r": 4}, c={"r": 4})
    model = loaded(tmp_path, tiny_llama())
    state = torch.get_rng_state()
    add_weighted_adapter(model, ["a"], [1.0], "one", "dare_linear", density=0.25, seed=3)
    add_weighted_adapter(model, ["a"], [1.0], "same", "dare_linear", density=0.25, seed=3)
    add_weighted_adapter(model, ["a"], [1.0], "other", "dare_linear", density=0.25, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (deltas(model, name) for name in ("one", "same", "other"))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)
    with use_adapter(model, "one"):
        layers = dict(adapter_modules(model))
        pruned = torch.cat([m.lora_A.flatten() for m in layers.values()]).clone()
    whole = torch.cat([m.lora_A.flatten() for m in layers.values()])
    root = layers["model.layers.0.mlp.up_proj"].scaling ** 0.5
    kept = pruned != 0
    assert abs(float(kept.float().mean()) - 0.25) < 0.02
    assert torch.allclose(pruned[kept], root * whole[kept] / 0.25)


def test_ties_leaves_out_the_minority(tmp_path: Path) -> None:
    """Where two adapters pull one way and one the other, only the two are averaged."""
    folders(tmp_path, TinyNet, a={"r": 2, "lora_alpha": 2}, b={"r": 2, "lora_alpha": 2}, c={"r": 2, "lora_alpha": 2})
    torch.manual_seed(0)
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=2, lora_alpha=2))
    with torch.no_grad():
        for name, value in (("b", 3.0), ("c", -1.0), ("default", 1.0)):
            for _, module in adapter_modules(model):
                module.lora_A.fill_(value)
                module.lora_B.fill_(value)
            if name != "default":
                add_weighted_adapter(model, ["default"], [1.0], name, "linear")
    add_weighted_adapter(model, ["default", "b", "c"], [1.0, 1.0, 1.0], "ties", "ties", density=1.0)
    with use_adapter(model, "ties"):
        for _, module in adapter_modules(model):
            assert torch.allclose(module.lora_A, torch.full_like(module.lora_A, 2.0))
            assert torch.allclose(module.lora_B, torch.full_like(module.lora_B, 2.0))


# What comes out is an adapter like any other


def test_the_result_is_written_and_read(tmp_path: Path) -> None:
    folders(tmp_path, a={"r": 4}, b={"r": 3, "target_modules": ["k_proj"]}, c={"r": 2, "target_modules": ["lm_head"]})
    model = loaded(tmp_path, tiny_llama())
    for kind, adapters in (("cat", list(NAMES)), ("svd", ["b", "c"]), ("cat", ["b"])):
        add_weighted_adapter(model, adapters, [1.0] * len(adapters), "mix", kind)
        save_adapter(model, tmp_path / "mix", name="mix")
        fresh = tiny_llama().eval()
        load_adapter(fresh, tmp_path / "mix")
        with torch.no_grad(), use_adapter(model, "mix"):
            assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    assert list_adapters(model) == ["a", "b", "c", "mix"]


def test_over_a_packed_base(tmp_path: Path) -> None:
    folders(tmp_path, a={"r": 4, "quantize": "nf4"}, b={"r": 4, "quantize": "nf4"}, c={"r": 2, "quantize": "nf4"})
    model = loaded(tmp_path, tiny_llama())
    add_weighted_adapter(model, list(NAMES), [1.0, 2.0, 3.0], "mix", "cat")
    parts = [deltas(model, name) for name in NAMES]
    for name, delta in deltas(model, "mix").items():
        assert relative(delta, parts[0][name] + 2 * parts[1][name] + 3 * parts[2][name]) < 1e-5


def test_messages(tmp_path: Path) -> None:
    folders(tmp_path, a={"r": 4}, b={"r": 3}, c={"r": 4})
    model = loaded(tmp_path, tiny_llama())

    def refused(match: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            add_weighted_adapter(model, *args, **kwargs)
        assert list_adapters(model) == ["a", "b", "c"]

    refused("no adapter 'd'", ["a", "d"], [1.0, 1.0], "mix")
    refused("lists of one length", ["a", "b"], [1.0], "mix")
    refused("lists of one length", [], [], "mix")
    refused("must be finite", ["a"], [float("nan")], "mix")
    refused("`combination_type` must be one of", ["a"], [1.0], "mix", "magnitude")
    refused("needs `density`", ["a"], [1.0], "mix", "ties")
    refused("takes no `density`", ["a"], [1.0], "mix", "svd", density=0.5)
    refused(r"must be in \(0, 1\]", ["a"], [1.0], "mix", "ties", density=0.0)
    refused("`svd_rank` must be an integer", ["a"], [1.0], "mix", "cat", svd_rank=2)
    refused("takes no `majority_sign_method`", ["a"], [1.0], "mix", "cat", majority_sign_method="frequency")
    refused(r"has ranks \[4, 3\] in these adapters: 'linear' adds factors up", ["a", "b"], [1.0, 1.0], "mix", "linear")
    refused("must be a word", ["a"], [1.0], "__base__")


def test_modules_trained_in_full_are_refused() -> None:
    model = tiny_bert()
    apply_lora(model, LoRAConfig(modules_to_save=["classifier"]))
    with pytest.raises(UnsupportedError, match="'classifier' is trained in full: only low-rank adapters"):
        add_weighted_adapter(model, ["default"], [1.0], "mix")
