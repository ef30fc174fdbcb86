# SPDX-License-Identifier: Apache-2.0
"""Rows of one batch through different adapters: each row as its adapter computes it alone, and as PEFT does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    apply_lora,
    disable_adapters,
    list_adapters,
    load_adapter,
    mixed_batch,
    save_adapter,
    set_adapter,
    set_adapter_scale,
    use_adapter,
)
from lightning_lora.errors import ConfigError, UnsupportedError
from tests.helpers import LM, TinyNet, random_adapters, tiny_gpt2, tiny_llama
from tests.model.nets import tiny_bert

IDS = torch.arange(64).view(4, 16) % 64
CONFIGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 7, "use_rslora": True, "target_modules": ["q_proj", "down_proj", "c_attn", "first"]},
    "c": {"r": 2, "target_modules": ["v_proj", "up_proj", "c_fc", "second"]},
}


def same_net() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet()


def held(path: Path, build: Any, configs: dict[str, dict[str, Any]] = CONFIGS) -> nn.Module:
    """A model that holds all adapters, and a folder of each."""
    for seed, (name, config) in enumerate(configs.items()):
        model = build()
        apply_lora(model, LoRAConfig(**config))
        save_adapter(random_adapters(model, seed=seed), path / name)
    model = build().eval()
    for name in configs:
        load_adapter(model, path / name, name=name)
    return model


@torch.no_grad()
def run(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    out = model(*args, **kwargs)
    return getattr(out, "logits", out)


def alone(model: nn.Module, name: str, *args: Any) -> Tensor:
    if name == "__base__":
        with disable_adapters(model):
            return run(model, *args)
    with use_adapter(model, name):
        return run(model, *args)


def close(got: Tensor, want: Tensor) -> bool:
    return float((got - want).norm() / want.norm()) < 1e-6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    path = tmp_path_factory.mktemp("mixed")
    return path, held(path, tiny_llama)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.sampled_from(["a", "b", "c", "__base__"]), min_size=1, max_size=6),
    active=st.sampled_from(["a", "b", "c"]),
    strength=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_each_row_as_alone(names: list[str], active: str, strength: float, llama: tuple[Path, nn.Module]) -> None:
    _, model = llama
    set_adapter(model, active)
    set_adapter_scale(model, strength)
    ids = torch.arange(16 * len(names)).view(-1, 16) % 64
    with mixed_batch(model, names):
        got = run(model, ids)
    for row, name in enumerate(names):
        assert close(got[row], alone(model, name, ids)[row]), name
    set_adapter_scale(model, 1.0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_as_peft_mixes(build: Any, tmp_path: Path) -> None:
    model = held(tmp_path, build)
    theirs = peft.PeftModel.from_pretrained(build(), str(tmp_path / "a"), adapter_name="a")
    for name in "bc":
        theirs.load_adapter(str(tmp_path / name), name)
    names = ["b", "__base__", "a", "c"]
    with mixed_batch(model, names):
        got = run(model, input_ids=IDS)
    assert close(got, run(theirs.eval(), input_ids=IDS, adapter_names=names))


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(beams: int, llama: tuple[Path, nn.Module]) -> None:
    """`generate` repeats rows for its beams; each sequence is what its adapter alone generates."""
    _, model = llama
    names = ["a", "__base__", "c", "b"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "min_new_tokens": 6}
    with torch.no_grad():
        with mixed_batch(model, names):
            got = model.generate(IDS, **options)
        for row, name in enumerate(names):
            if name == "__base__":
                with disable_adapters(model):
                    want = model.generate(IDS[row : row + 1], **options)
            else:
                with use_adapter(model, name):
                    want = model.generate(IDS[row : row + 1], **options)
            assert torch.equal(got[row], want[0]), name


def test_a_plain_network_over_packed_weights(tmp_path: Path) -> None:
    configs = {name: {**config, "quantize": "nf4"} for name, config in CONFIGS.items()}
    model = held(tmp_path, same_net, configs)
    names = ["c", "a", "__base__", "b"]
    with mixed_batch(model, names):
        got = run(model, IDS)
    for row, name in enumerate(names):
        assert close(got[row], alone(model, name, IDS)[row]), name


def test_modules_trained_in_full_are_routed(tmp_path: Path) -> None:
    configs = {"a": {"r": 2, "modules_to_save": ["classifier"]}, "b": {"r": 3, "target_modules": ["query"]}}
    model = held(tmp_path, tiny_bert, configs)
    set_adapter_scale(model, 0.5)
    names = ["a", "__base__", "b", "a"]
    with mixed_batch(model, names):
        got = run(model, IDS)
    for row, name in enumerate(names):
        assert close(got[row], alone(model, name, IDS)[row]), name


def test_the_layers_are_as_before_afterwards(llama: tuple[Path, nn.Module]) -> None:
    _, model = llama
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    want = run(model, IDS)
    with pytest.raises(KeyError), mixed_batch(model, ["a"] * 4):
        raise KeyError
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert torch.equal(run(model, IDS), want)


def test_compiled_code_is_not_passed_by(tmp_path: Path) -> None:
    model = held(tmp_path, same_net)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    run(compiled, IDS)
    names = ["c", "a", "__base__", "b"]
    for _ in range(2):
        with mixed_batch(model, names):
            got = run(compiled, IDS)
        for row, name in enumerate(names):
            assert close(got[row], alone(model, name, IDS)[row]), name
        assert close(run(compiled, IDS), run(model, IDS))


def test_off_is_the_base_and_gradients_reach_the_input(llama: tuple[Path, nn.Module]) -> None:
    _, model = llama
    with disable_adapters(model):
        base = run(model, IDS)
        with mixed_batch(model, ["a", "b", "c", "a"]):
            assert torch.equal(run(model, IDS), base)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with mixed_batch(model, ["a", "b", "c", "a"]):
        model(inputs_embeds=embedded).logits[1].sum().backward()
    got = embedded.grad[1].clone()
    with use_adapter(model, "b"):
        (want,) = torch.autograd.grad(model(inputs_embeds=embedded).logits[1].sum(), embedded)
    assert close(got, want[1])


def test_messages(llama: tuple[Path, nn.Module], tmp_path: Path) -> None:
    _, model = llama
    with pytest.raises(ConfigError, match="no adapter 'd'"), mixed_batch(model, ["a", "d"]):
        pass
    for wrong in ("a", []):
        with pytest.raises(ConfigError, match="must be a list with one name a row"), mixed_batch(model, wrong):
            pass
    with (
        pytest.raises(ConfigError, match="has 3 names and a layer was called with 4 rows"),
        mixed_batch(model, ["a", "b", "c"]),
    ):
        run(model, IDS)
    module = LM(tiny_llama())
    apply_lora(module, LoRAConfig())
    with pytest.raises(ConfigError, match="is for inference"), mixed_batch(module.train(), ["default"] * 4):
        pass
    assert list_adapters(module) == ["default"]
    with mixed_batch(module.eval(), ["default"] * 4):
        run(module, IDS)

    class Flat(nn.Module):
        """A network whose layers see tokens, not sequences."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(64, 8), nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(self.embed(ids).flatten(0, 1))

    flat = Flat().eval()
    apply_lora(flat, LoRAConfig(target_modules=["layer"]))
    with (
        pytest.raises(ConfigError, match="keep the batch as their first dimension"),
        mixed_batch(flat, ["default"] * 4),
    ):
        run(flat, IDS)


def test_a_saved_module_that_does_not_map_rows_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.pool = nn.Linear(8, 8), Mean()

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.enter(x))

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).mean(0)

    model = Pooled().eval()
    apply_lora(model, LoRAConfig(modules_to_save=["pool"]))
    refused = pytest.raises(UnsupportedError, match="'pool' is trained in full and does not map rows")
    with refused, mixed_batch(model, ["default"] * 4):
        run(model, torch.randn(4, 8))
