# SPDX-License-Identifier: Apache-2.0
"""A merged module without this package: its state dict by the user's own names, and `torch.export` of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import LoRA, LoRAConfig, MergeOnFitEnd, apply_lora, merge_adapters, merged_state_dict
from lightning_lora.errors import ConfigError, MergeError
from tests.helpers import LM, TinyNet, loader, make_trainer, named_tensors, random_adapters, tiny_gpt2, tiny_llama
from tests.model.nets import Normed, Shared

IDS = torch.arange(32).view(2, 16) % 64
FLOATS = torch.linspace(-1, 1, 64).view(4, 16)


class Tied(TinyNet):
    """Head and embedding share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embed.weight


class Counting(TinyNet):
    """A buffer, and a state of its own that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def get_extra_state(self) -> dict[str, str]:
        return {"vocabulary": "v1"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.extra = state


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Tensor]] = {
    "plain": (TinyNet, {}, IDS),
    "nf4": (TinyNet, {"quantize": "nf4"}, IDS),
    "int8, not all adapted": (TinyNet, {"quantize": "int8", "target_modules": ["first"]}, IDS),
    "saved": (TinyNet, {"modules_to_save": ["head"], "use_rslora": True}, IDS),
    "tied": (Tied, {}, IDS),
    "tied, head adapted": (Tied, {"target_modules": ["head", "first"]}, IDS),
    "buffers": (Counting, {}, IDS),
    "shared": (Shared, {}, FLOATS),
    "llama": (tiny_llama, {}, IDS),
    "gpt2, packed": (tiny_gpt2, {"quantize": "nf4"}, IDS),
}


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    out = model.eval()(x)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("case", NETS)
def test_the_plain_lightning_module_loads_it_strictly(case: str) -> None:
    build, config, x = NETS[case]
    torch.manual_seed(0)
    live = LM(build())
    apply_lora(live, LoRAConfig(**{"r": 4, **config}))
    random_adapters(live)
    want, before = outputs(live, x), {name: tensor.clone() for name, tensor in named_tensors(live)}
    state = merged_state_dict(live)
    torch.manual_seed(1)
    plain = LM(build())
    untied = case == "tied, head adapted"  # its one weight cannot be both
    if untied:
        plain.net.head.weight = nn.Parameter(plain.net.head.weight.clone())
    plain.load_state_dict(state, strict=True)
    assert float((outputs(plain, x) - want).norm() / want.norm()) < 1e-5
    if case == "buffers":
        assert plain.net.extra == {"vocabulary": "v1"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in named_tensors(live)), "the live model moved"


def test_running_statistics_are_in_it() -> None:
    torch.manual_seed(0)
    live = Normed()
    with torch.no_grad():
        live.batch.running_mean.uniform_()
    apply_lora(live, LoRAConfig(modules_to_save=["instance"]))
    random_adapters(live)
    plain = Normed()
    plain.load_state_dict(merged_state_dict(live), strict=True)
    x = torch.randn(4, 8)
    assert torch.allclose(outputs(plain, x), outputs(live, x), atol=1e-5)


def test_a_narrower_dtype_and_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="no adapters to merge; its own"):
        merged_state_dict(TinyNet())
    live = TinyNet()
    apply_lora(live, LoRAConfig())
    random_adapters(live)
    assert {t.dtype for t in merged_state_dict(live, dtype="bf16").values()} == {torch.bfloat16}
    with torch.no_grad():
        live.first.lora_B.fill_(float("inf"))
    with pytest.raises(MergeError, match="not finite in 1 modules, 'first' first"):
        merged_state_dict(live)


@pytest.mark.parametrize("case", NETS)
def test_torch_export_of_the_merged_module_equals_the_live_one(case: str) -> None:
    build, config, x = NETS[case]
    torch.manual_seed(0)
    live = build()
    apply_lora(live, LoRAConfig(**{"r": 4, **config}))
    random_adapters(live)
    want = outputs(live, x)
    merged = copy.deepcopy(live).eval()
    merge_adapters(merged)
    options = {"kwargs": {"use_cache": False}} if hasattr(merged, "config") else {}  # a cache is no tensor
    with torch.no_grad():
        program = torch.export.export(merged, (x,), **options)
        got = program.module()(x, **options.get("kwargs", {}))
    got = getattr(got, "logits", got)
    assert float((got - want).norm() / want.norm()) < 1e-5
    names = [name for name, _ in merged.named_parameters(remove_duplicate=False)]
    assert set(program.state_dict) <= {*names, *(name for name, _ in merged.named_buffers())}
    assert not [name for name in program.state_dict if "lora" in name or "adapter" in name]


def test_what_a_run_writes_is_loaded_by_the_plain_module(tmp_path: Path) -> None:
    """From `fit` to a module of the user's, and to a program without any Python of theirs."""
    torch.manual_seed(0)
    module = LM(TinyNet())
    make_trainer(tmp_path, [LoRA(r=4, quantize="nf4"), MergeOnFitEnd(tmp_path / "merged")]).fit(module, loader())
    plain = LM(TinyNet())
    plain.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"), strict=True)
    want = outputs(module, IDS)
    assert float((outputs(plain, IDS) - want).norm() / want.norm()) < 1e-5
    with torch.no_grad():
        torch.export.save(torch.export.export(plain.net.eval(), (IDS,)), tmp_path / "net.pt2")
        got = torch.export.load(tmp_path / "net.pt2").module()(IDS)
    assert float((got - want).norm() / want.norm()) < 1e-5
