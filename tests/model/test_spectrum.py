# SPDX-License-Identifier: Apache-2.0
"""Spectra from the core equal those of the whole update, and what is said of them is so."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lora import LoRAConfig, apply_lora, set_adapter_scale
from lightning_lora.errors import AdapterMismatchError
from lightning_lora.model.diagnosis import Diagnosis, grid
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.spectrum import Spectrum, adapter_spectra, base_norms, gradient_norms, singular_values
from tests.helpers import random_adapters, tiny_gpt2, tiny_llama


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.floats(-3, 3), st.integers(0, 99))
def test_singular_values_are_those_of_the_whole_update(r: int, inn: int, out: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=generator) for shape in ((r, inn), (out, r)))
    whole = torch.linalg.svdvals((scale * B @ A).double())
    found = torch.tensor(singular_values(A, B, scale), dtype=torch.float64)
    n = min(len(found), len(whole))
    torch.testing.assert_close(found[:n], whole[:n], atol=1e-4, rtol=1e-4)
    assert not len(whole[n:]) or float(whole[n:].max()) < 1e-4
    assert list(found) == sorted(found, reverse=True)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=16))
def test_ranks_lie_between_one_and_r_and_do_not_know_the_scale(values: list[float]) -> None:
    values = sorted(values, reverse=True)
    found, scaled = (Spectrum(len(values), tuple(f * v for v in values)) for f in (1.0, 7.0))
    for rank in (found.stable_rank, found.effective_rank):
        assert 1 - 1e-9 <= rank <= len(values) + 1e-9
    assert math.isclose(found.stable_rank, scaled.stable_rank, rel_tol=1e-9)
    assert math.isclose(found.effective_rank, scaled.effective_rank, rel_tol=1e-9)
    assert found.condition >= 1
    for energy in (0.5, 0.9, 0.99):
        count = found.rank_for(energy)
        kept = [math.fsum(v * v for v in values[:n]) for n in (count - 1, count)]
        assert kept[1] >= energy * found.norm**2 * (1 - 1e-9)
        assert kept[0] < energy * found.norm**2 * (1 + 1e-9)


def test_known_spectra() -> None:
    flat, one, nothing = Spectrum(4, (2.0,) * 4), Spectrum(4, (3.0, 0, 0, 0)), Spectrum(4, (0.0,) * 4)
    assert (flat.stable_rank, flat.condition, flat.dead_ranks, flat.rank_for()) == (4, 1, 0, 4)
    assert math.isclose(flat.effective_rank, 4)
    assert (one.stable_rank, one.effective_rank, one.condition, one.dead_ranks, one.rank_for()) == (
        1,
        1,
        math.inf,
        3,
        1,
    )
    assert (nothing.dead_ranks, nothing.rank_for()) == (4, 0)
    assert all(math.isnan(v) for v in (nothing.stable_rank, nothing.effective_rank, nothing.condition))
    for spectrum in (flat, one, nothing):
        json.dumps(spectrum.to_dict(), allow_nan=False)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_models_spectra_are_those_of_its_updates(build, quantize: str) -> None:
    model = build()
    apply_lora(model, LoRAConfig(r=3, lora_alpha=7, quantize=quantize))
    set_adapter_scale(random_adapters(model), 0.5)
    modules = dict(adapter_modules(model))
    found = adapter_spectra(model, base_norms(model))
    assert list(found) == list(modules)
    for name, spectrum in found.items():
        delta = modules[name].delta_weight(torch.float64)
        torch.testing.assert_close(
            torch.tensor(spectrum.singular_values), torch.linalg.svdvals(delta)[:3].float(), rtol=1e-4, atol=1e-5
        )
        size = float(modules[name].base_weight(torch.float32).norm())
        assert math.isclose(spectrum.base_norm, size, rel_tol=1e-4)
        assert math.isclose(spectrum.relative_update, float(delta.norm()) / size, rel_tol=1e-4)


def test_gradients_are_looked_at_by_module() -> None:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=2))
    assert all(math.isnan(a) and math.isnan(b) for a, b in gradient_norms(model).values())
    ids = torch.arange(16).view(1, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    for name, (a, b) in gradient_norms(model).items():
        module = model.get_submodule(name)
        assert math.isclose(a, float(module.lora_A.grad.norm()), abs_tol=1e-9)
        assert b > 0


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(AdapterMismatchError, match=r"no low-rank adapters to look at; add the `LoRA` callback"):
        adapter_spectra(tiny_llama())


def advice_on(*values: float, r: int = 16) -> list[str]:
    spectrum = Spectrum(r, (*values, *[0.0] * (r - len(values))))
    return list(Diagnosis(9, {f"layers.{i}.q": spectrum for i in range(4)}).advice())


def test_collapse_waste_and_want_are_named() -> None:
    assert advice_on(1.0) == ["rank collapse", "wasted rank"]
    assert advice_on(*[1.0] * 6) == ["wasted rank"]
    assert advice_on(*[1.0] * 16) == ["full rank"]
    assert advice_on(*[0.8**i for i in range(16)]) == []
    assert advice_on() == advice_on(1.0, r=2) == []


def test_waste_says_which_rank_would_do() -> None:
    spectrum = Spectrum(16, (*[1.0] * 5, *[0.0] * 11))
    (text,) = Diagnosis(9, {"a.0.q": spectrum}).advice().values()
    assert "`r=5` would hold 99 % of the update" in text


def test_names_become_a_table() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up", "model.layers.1.mlp.up", "score"]
    layers, projections, places = grid(dict.fromkeys(names))
    assert layers == ["model.layers.0", "model.layers.1", ""]
    assert projections == ["self_attn.q_proj", "mlp.up", "score"]
    assert places["model.layers.1", "mlp.up"] == names[2]
    assert places["", "score"] == "score"
    assert len(places) == 4
