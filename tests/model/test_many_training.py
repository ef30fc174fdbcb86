# SPDX-License-Identifier: Apache-2.0
"""Many adapters, one base, in training and under `torch.compile`: a swap moves no gradient and compiles nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_lora import (
    LoRA,
    LoRAConfig,
    adapter_state_dict,
    apply_lora,
    load_adapter,
    set_adapter,
    set_adapter_scale,
    use_adapter,
)
from lightning_lora.errors import UnsupportedError
from lightning_lora.model.slots import adapter_modules, adapter_record
from lightning_lora.model.state import load_adapter_state
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import LM, TinyNet, loader, make_trainer, tiny_llama
from tests.model.many import ADAPTERS, IDS, adapter_folder, logits
from tests.model.nets import notices


def test_training_moves_the_adapter_in_use_alone(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, wanted = many
    set_adapter(model, "patterns")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    trained = logits(model)
    assert not torch.allclose(trained, wanted["patterns"], atol=1e-3)
    (said,) = notices(lambda: set_adapter(model, "head"))
    assert "adapter 'patterns' went out of use and its gradients were dropped" in said
    assert all(p.grad is None for p in model.parameters())
    for name in ADAPTERS:
        assert notices(lambda name=name: set_adapter(model, name)) == []
        assert torch.equal(logits(model), trained if name == "patterns" else wanted[name]), name


def test_a_backward_through_an_adapter_that_was_swapped_is_an_error(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, _ = many
    loss = model(IDS, labels=IDS).loss
    set_adapter(model, "twin")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_borrowing_in_the_middle_of_a_step_changes_no_gradient(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    """As a reference model in DPO: forward, another forward with another adapter, backward; and accumulated."""
    model, wanted = many

    def grads(borrow: bool) -> list[Tensor]:
        model.zero_grad()
        for _ in range(2):
            loss = model(IDS, labels=IDS).loss
            if borrow:
                for name in ("twin", "wide"):
                    with use_adapter(model, name):
                        assert torch.equal(logits(model), wanted[name])
            loss.backward()
            if borrow:
                with use_adapter(model, "scaled"):
                    model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain, borrowed = grads(False), grads(True)
    assert len(plain) == 28
    assert all(torch.equal(a, b) for a, b in zip(plain, borrowed, strict=True))


def test_a_graph_made_while_borrowing_is_of_the_borrowed_adapter(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    model, _ = many
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def input_grad(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, embedded)[0]

    with use_adapter(model, "wide"):
        inside = input_grad(model(inputs_embeds=embedded, labels=IDS).loss)
        loss = model(inputs_embeds=embedded, labels=IDS).loss
    assert torch.equal(input_grad(loss), inside)


def test_inside_fit_a_swap_is_refused_and_borrowing_is_not(tmp_path: Path) -> None:
    wanted = adapter_folder(tmp_path / "b", tiny_llama, 3, r=2)
    adapter_folder(tmp_path / "same", tiny_llama, 4, r=4, lora_alpha=8)
    trainer = make_trainer(tmp_path, [LoRA(r=4, lora_alpha=8)])
    trainer.fit(LM(), loader())
    trainer.save_checkpoint(tmp_path / "same.ckpt")

    class Curious(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            with use_adapter(self, "b"):
                assert torch.equal(logits(self.eval()), wanted)
            self.train()
            with pytest.raises(UnsupportedError, match="`fit` is training adapter 'default'"):
                set_adapter(self, "b")
            before = {n: t.clone() for n, t in adapter_state_dict(self).items()}
            for name in (None, "default"):
                for source in ("same", "same.ckpt"):
                    with pytest.raises(UnsupportedError, match="`fit` is training adapter 'default'"):
                        load_adapter(self, tmp_path / source, name=name)
            load_adapter(self, tmp_path / "same", name="c")  # waits
            assert all(torch.equal(t, before[n]) for n, t in adapter_state_dict(self).items())
            return loss

        def on_train_end(self) -> None:
            self.ended = {n: t.clone() for n, t in adapter_state_dict(self).items()}
            load_adapter(self, tmp_path / "same")  # as `MergeOnFitEnd` does

    def trained(module: LM) -> dict[str, Tensor]:
        torch.manual_seed(0)
        apply_lora(module, LoRAConfig(r=4, lora_alpha=8))
        load_adapter(module, tmp_path / "b", name="b")
        make_trainer(tmp_path, [LoRA(r=4, lora_alpha=8)]).fit(module, loader())
        return {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}

    curious = Curious()
    loaded, plain = trained(curious), trained(LM())
    assert all(torch.equal(curious.ended[name], plain[name]) for name in plain)
    assert not any(torch.equal(loaded[name], plain[name]) for name in plain)
    set_adapter(curious, "b")
    assert torch.equal(logits(curious.eval()), wanted)


def test_a_second_adapter_trains_in_a_second_fit(tmp_path: Path) -> None:
    adapter_folder(tmp_path / "b", tiny_llama, 3, r=2, target_modules=["q_proj"])
    module = LM()
    apply_lora(module, LoRAConfig(r=4))
    load_adapter(module, tmp_path / "b", name="b")
    first = {n: t.clone() for n, t in adapter_state_dict(module).items()}
    set_adapter(module, "b")
    config = {"r": 2, "target_modules": ["q_proj"]}
    trainer = make_trainer(tmp_path, [LoRA(**config)])
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["state_dict"].keys() == adapter_state_dict(module).keys()
    assert len(kept["state_dict"]) == 4
    assert all(torch.equal(t, adapter_state_dict(module)[n]) for n, t in kept["state_dict"].items())
    set_adapter(module, "default")
    assert all(torch.equal(t, first[n]) for n, t in adapter_state_dict(module).items())
    # the checkpoint resumes in a module that knows nothing of the other adapter
    fresh = LM()
    make_trainer(tmp_path, [LoRA(**config)], max_steps=6).fit(fresh, loader(), ckpt_path=tmp_path / "last.ckpt")


def test_swaps_compile_nothing_anew(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return TinyNet()

    configs: dict[str, dict[str, Any]] = {
        "a": {"r": 4},
        "b": {"r": 4, "lora_alpha": 5.0},
        "c": {"r": 4, "use_rslora": True},
        "other": {"r": 4},
    }
    wanted = {n: adapter_folder(tmp_path / n, net, i, **c) for i, (n, c) in enumerate(configs.items())}
    model = net().eval()
    for name in "abc":
        load_adapter(model, tmp_path / name, name=name)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(name: str) -> None:
        assert torch.allclose(logits(compiled), wanted[name], atol=1e-5), name
        assert counters["stats"]["unique_graphs"] == 1, name

    check("a")
    for name in ("b", "c", "a", "b"):
        set_adapter(model, name)
        check(name)
        with use_adapter(model, "c"):
            check("c")
        check(name)
    set_adapter(model, "a")
    load_adapter(model, tmp_path / "other")
    check("other")
    load_adapter(model, tmp_path / "b", name="a")
    check("b")
    set_adapter_scale(model, 0.5)
    assert not torch.allclose(logits(compiled), wanted["b"], atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_llama_in_training_compiles_nothing_anew_for_a_swap_or_a_strength(tmp_path: Path) -> None:
    """Forward and backward, one graph; the gradients are those of eager code under each adapter and strength."""

    def build() -> nn.Module:
        return tiny_llama(num_hidden_layers=1)

    for seed, name in enumerate("ab"):
        adapter_folder(tmp_path / name, build, seed, r=4, lora_alpha=8 + seed)
    model = build().train()
    for name in "ab":
        load_adapter(model, tmp_path / name, name=name)
    factors = [p for p in model.parameters() if p.requires_grad]
    assert factors
    ids = torch.arange(24).view(2, 12)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, strength in (("a", 1.0), ("b", 1.0), ("a", 0.5), ("b", 2.0)):
        set_adapter(model, name)
        set_adapter_scale(model, strength)
        got, want = (torch.autograd.grad(run(input_ids=ids, labels=ids).loss, factors) for run in (compiled, model))
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == 1, (name, strength)


def test_a_vacant_layer_compiles_to_its_base(tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return TinyNet()

    wanted = {
        "a": adapter_folder(tmp_path / "a", net, 0, r=4),
        "b": adapter_folder(tmp_path / "b", net, 1, r=4, target_modules=["first"]),
    }
    model = net().eval()
    load_adapter(model, tmp_path / "a", name="a")
    load_adapter(model, tmp_path / "b", name="b")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        assert torch.allclose(logits(compiled), wanted[name], atol=1e-5), name
    assert sum(isinstance(m, LoRALinear) and m.vacant for m in model.modules()) == 0


def checkpointed(model: nn.Module) -> nn.Module:
    """The model in training, each block recomputed in backward."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


RECOMPUTED = "activation checkpointing ran a forward again for its backward"


def test_a_recomputed_forward_of_another_adapter_is_an_error(
    many: tuple[nn.Module, dict[str, Tensor]], llamas: tuple[Path, dict[str, Tensor]]
) -> None:
    """A and B are read again in the recomputation, so that autograd's own counting of versions sees nothing."""
    model, folder = checkpointed(many[0]), llamas[0]

    def loss() -> Tensor:
        return model(IDS, labels=IDS).loss

    before = loss()
    set_adapter(model, "twin")
    with pytest.raises(UnsupportedError, match=RECOMPUTED):
        before.backward()
    for name in (None, "twin"):
        before = loss()
        load_adapter(model, folder / "plain", name=name)
        with pytest.raises(UnsupportedError, match=RECOMPUTED):
            before.backward()
    before = loss()
    load_adapter_state(model, adapter_state_dict(model))
    with pytest.raises(UnsupportedError, match=RECOMPUTED):
        before.backward()
    before = loss()
    with use_adapter(model, "plain"), pytest.raises(UnsupportedError, match=RECOMPUTED):
        before.backward()
    with use_adapter(model, "plain"):
        before = loss()
    with pytest.raises(UnsupportedError, match=RECOMPUTED):
        before.backward()
    before = loss()
    set_adapter_scale(model, 0.5)
    with pytest.raises(UnsupportedError, match=RECOMPUTED):
        before.backward()


def test_a_recomputed_forward_of_the_same_adapter_has_its_gradients(many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    """Between forward and backward others are borrowed, strengths are changed and set again."""
    model, _ = many

    def grads(between: bool) -> list[Tensor]:
        model.zero_grad()
        loss = model(IDS, labels=IDS).loss
        if between:
            for name in ("twin", "wide"):
                with use_adapter(model, name):
                    logits(model)
            set_adapter_scale(model, 0.0)
            logits(model)
            set_adapter_scale(model, 1.0)
        loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with torch.inference_mode():
        set_adapter(model, "twin")
    wanted = grads(False)
    checkpointed(model)
    assert len(wanted) == 28
    assert all(torch.equal(a, b) for a, b in zip(wanted, grads(True), strict=True))
    with use_adapter(model, "wide"):  # forward and backward inside
        for parameter in adapter_state_dict(model):
            model.get_parameter(parameter).requires_grad_()
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("of", ["optimizer", "reentrant"])
def test_what_a_recomputed_forward_does_not_notice(of: str, many: tuple[nn.Module, dict[str, Tensor]]) -> None:
    """As the documentation says: changes that come from elsewhere, and reentrant checkpointing."""
    model, _ = many
    checkpointed(model)
    if of == "reentrant":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    loss = model(IDS, labels=IDS).loss
    if of == "reentrant":
        set_adapter(model, "twin")
    else:
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.lora_B.add_(1.0)
    loss.backward()


def test_adapters_beside_one_with_a_frozen_A_train_B_alone(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        adapter_folder(tmp_path / name, tiny_llama, seed, r=3 + seed)
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4, freeze_lora_A=True))
    for name in ("a", "b"):
        load_adapter(model, tmp_path / name, name=name)
        set_adapter(model, name)
        with use_adapter(model, "default"):
            pass
        layers = [module for _, module in adapter_modules(model)]
        assert not any(layer.lora_A.requires_grad for layer in layers)
        assert all(layer.lora_B.requires_grad for layer in layers)
        assert adapter_record(model).config.freeze_lora_A
