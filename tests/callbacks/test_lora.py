# SPDX-License-Identifier: Apache-2.0
"""`LoRA` in real Trainers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRA, LoRAConfig, adapter_state_dict, apply_lora, save_adapter
from lightning_lora.errors import (
    AdapterMismatchError,
    AlreadyAdaptedError,
    ConfigError,
    GradientError,
    Notice,
    OptimizerError,
    TargetError,
)
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_gpt2, tiny_llama


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_only_adapters_moved(before: dict[str, Tensor], module: nn.Module) -> None:
    trained = adapter_state_dict(module)
    after = module.state_dict()
    assert trained
    for name in trained:
        assert not torch.equal(before[name], after[name]), f"{name} did not move"
    for name in after.keys() - trained.keys():
        assert torch.equal(before[name], after[name]), f"{name} moved"


def fit(module: L.LightningModule, tmp_path: Path, lora: LoRA | None = None, **kwargs: Any) -> dict[str, Tensor]:
    """Train; returns the state after conversion and before the first step."""
    before: dict[str, Tensor] = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before.update(snapshot(pl_module))

    callbacks = [lora or LoRA(r=4), *kwargs.pop("callbacks", []), Look()]
    make_trainer(tmp_path, callbacks, **kwargs).fit(module, loader())
    return before


def notices(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if issubclass(w.category, Notice)]


class TestModels:
    @pytest.mark.parametrize("quantize", ["none", "nf4", "fp4"])
    @pytest.mark.parametrize(
        "make",
        [lambda: LM(TinyNet()), lambda: LM(tiny_llama()), lambda: LM(tiny_gpt2()), lambda: LM(build_late=True)],
        ids=["plain", "llama", "gpt2", "configure_model"],
    )
    def test_adapters_move_and_the_base_does_not(self, make: Any, quantize: Any, tmp_path: Path) -> None:
        module = make()
        lora = LoRA(r=4, quantize=quantize)
        assert_only_adapters_moved(fit(module, tmp_path, lora), module)
        assert lora.report is not None
        assert lora.report.quantize == quantize

    def test_every_stage_and_a_second_fit(self, tmp_path: Path) -> None:
        module, lora = LM(TinyNet()), LoRA(r=4)
        module.predict_step = lambda batch, batch_idx: module(batch)  # type: ignore[method-assign]
        trainer = make_trainer(tmp_path, [lora])
        trainer.validate(module, loader(8), verbose=False)
        layers = [m for m in module.modules() if isinstance(m, LoRALinear)]
        assert len(layers) == 2
        trainer.fit(module, loader())
        trainer.fit_loop.epoch_loop.max_steps = 8
        after_first = snapshot(module)
        trainer.fit(module, loader())
        trainer.test(module, loader(8), verbose=False)
        predictions = trainer.predict(module, loader(8))
        assert [m for m in module.modules() if isinstance(m, LoRALinear)] == layers
        assert_only_adapters_moved(after_first, module)
        assert torch.equal(predictions[0], module(next(iter(loader(8)))))  # type: ignore[index,arg-type]

    def test_second_fit_in_another_trainer_goes_on_from_the_adapters(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        fit(module, tmp_path)
        trained = {name: t.clone() for name, t in adapter_state_dict(module).items()}
        start = fit(module, tmp_path)
        assert all(torch.equal(start[name], t) for name, t in trained.items())

    def test_one_callback_serves_one_module_after_another(self, tmp_path: Path) -> None:
        lora = LoRA(r=4)
        for module in (LM(TinyNet()), LM(TinyNet())):
            assert_only_adapters_moved(fit(module, tmp_path, lora), module)

    def test_module_that_adapts_itself(self, tmp_path: Path) -> None:
        class Own(LM):
            def configure_model(self) -> None:
                if not any(isinstance(m, LoRALinear) for m in self.modules()):
                    apply_lora(self, LoRAConfig(r=2))

        module = Own(TinyNet())
        assert_only_adapters_moved(fit(module, tmp_path, LoRA(r=2)), module)
        with pytest.raises(
            AlreadyAdaptedError, match="another configuration: r is 2 there and 4 in the callback. Use the same"
        ):
            fit(Own(TinyNet()), tmp_path, LoRA(r=4))

    def test_pickle_and_deepcopy_after_fit(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        fit(module, tmp_path)
        ids = next(iter(loader()))
        for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            assert torch.equal(twin(ids), module(ids))
            assert_only_adapters_moved(fit(twin, tmp_path), twin)

    def test_pickle_after_a_fit_that_failed(self, tmp_path: Path) -> None:
        class Fails(LM):
            def on_train_batch_end(self, *args: Any) -> None:
                raise OSError("disk full")

        lora = LoRA(r=4)
        module = Fails(TinyNet())
        with pytest.raises(OSError, match="disk full"):
            fit(module, tmp_path, lora)
        assert not {"configure_model", "configure_optimizers"} & vars(module).keys()
        assert not any(m._forward_pre_hooks for m in module.modules())
        good = LM(TinyNet())
        assert_only_adapters_moved(fit(good, tmp_path, lora), good)

    def test_modules_to_save(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        before = fit(module, tmp_path, LoRA(r=4, modules_to_save=["head"]))
        assert "net.head.trained.weight" in adapter_state_dict(module)
        assert_only_adapters_moved(before, module)

    def test_compiled_submodule(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        module.net = torch.compile(module.net, backend="aot_eager")
        before = fit(module, tmp_path, max_steps=8)
        trained = adapter_state_dict(module)
        assert sorted(trained)[0] == "net.first.adapter.lora_A"
        assert all(not torch.equal(before[name.replace("net.", "net._orig_mod.")], t) for name, t in trained.items())

    def test_init_from(self, tmp_path: Path) -> None:
        source = tiny_llama()
        apply_lora(source, LoRAConfig(r=4))
        random_adapters(source)
        save_adapter(source, tmp_path / "adapter")
        module = LM(tiny_llama())
        start = fit(module, tmp_path, LoRA(r=4, init_from=str(tmp_path / "adapter")))
        for name, tensor in adapter_state_dict(source).items():
            assert torch.equal(start[f"net.{name}"], tensor)

    def test_checkpoint_goes_before_init_from(self, tmp_path: Path) -> None:
        net = TinyNet()
        module = LM(copy.deepcopy(net))
        fit(module, tmp_path, LoRA(r=4))
        save_adapter(module, tmp_path / "adapter")
        trainer = make_trainer(tmp_path, [LoRA(r=4)])
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "later.ckpt")
        other = LM(copy.deepcopy(net))
        make_trainer(tmp_path, [LoRA(r=4, init_from=str(tmp_path / "adapter"))]).test(
            other, loader(8), ckpt_path=tmp_path / "later.ckpt", verbose=False
        )
        for name, tensor in adapter_state_dict(module).items():
            assert torch.equal(adapter_state_dict(other)[name], tensor)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def _step_lr(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def _with_scheduler(module: LM) -> Any:
    optimizer = _adamw(module.parameters())
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": _step_lr(optimizer), "interval": "step"}}


def _lists(module: LM) -> Any:
    optimizer = _adamw(module.parameters())
    return [optimizer], [_step_lr(optimizer)]


def _lists_of_dicts(module: LM) -> Any:
    optimizer = _adamw(module.parameters())
    return [optimizer], [{"scheduler": _step_lr(optimizer), "interval": "step"}]


def _decay_groups(module: LM) -> Any:
    decay = [p for p in module.parameters() if p.dim() > 1]
    rest = [p for p in module.parameters() if p.dim() <= 1]
    return _adamw([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])


FORMS: dict[str, Callable[[LM], Any]] = {
    "one": lambda m: _adamw(m.parameters()),
    "filtered": lambda m: _adamw(p for p in m.parameters() if p.requires_grad),
    "named": lambda m: _adamw(m.named_parameters()),
    "list": lambda m: [_adamw(m.parameters())],
    "tuple_of_lists": _lists,
    "tuple_of_lists_with_dicts": _lists_of_dicts,
    "dict": lambda m: {"optimizer": _adamw(m.parameters())},
    "dict_with_scheduler": _with_scheduler,
    "list_of_dicts": lambda m: [_with_scheduler(m)],
    "groups": _decay_groups,
    "sgd_momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
}


class TestOptimizers:
    @pytest.mark.parametrize("form", FORMS)
    def test_forms(self, form: str, tmp_path: Path) -> None:
        class Module(LM):
            def configure_optimizers(self) -> Any:
                return FORMS[form](self)

        module = Module(TinyNet())
        trainer = make_trainer(tmp_path, [LoRA(r=4)])
        trainer.fit(module, loader())
        held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}
        assert all(float(t.abs().sum()) > 0 for n, t in adapter_state_dict(module).items() if n.endswith("lora_B"))

    def test_parameters_cached_before_conversion(self, tmp_path: Path) -> None:
        class Module(LM):
            def __init__(self) -> None:
                super().__init__(TinyNet())
                self.made_early = _adamw(self.parameters())

            def configure_optimizers(self) -> Any:
                return self.made_early

        module = Module()
        before: dict[str, Tensor] = {}
        said = notices(lambda: before.update(fit(module, tmp_path)))
        assert any("was built before the adapters were in the model" in text for text in said)
        assert_only_adapters_moved(before, module)

    def test_two_optimizers_by_hand(self, tmp_path: Path) -> None:
        class Module(LM):
            automatic_optimization = False

            def __init__(self) -> None:
                super().__init__(TinyNet())
                self.automatic_optimization = False

            def configure_optimizers(self) -> Any:
                return [_adamw(self.net.first.parameters()), _adamw(self.net.second.parameters())]

            def training_step(self, batch: Tensor, batch_idx: int) -> None:
                for optimizer in self.optimizers():  # type: ignore[union-attr]
                    optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                for optimizer in self.optimizers():  # type: ignore[union-attr]
                    optimizer.step()

        module = Module()
        trainer = make_trainer(tmp_path, [LoRA(r=4)], max_steps=16)
        trainer.fit(module, loader())
        assert [len(o.param_groups[0]["params"]) for o in trainer.optimizers] == [2, 2]
        assert all(float(t.abs().sum()) > 0 for t in adapter_state_dict(module).values())

    def test_gradient_accumulation(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        assert_only_adapters_moved(fit(module, tmp_path, accumulate_grad_batches=3), module)

    def test_an_optimizer_of_other_parameters_takes_the_adapters_in(self, tmp_path: Path) -> None:
        class Module(LM):
            def configure_optimizers(self) -> Any:
                return _adamw([nn.Parameter(torch.zeros(1))])

        module = Module(TinyNet())
        assert any("joined its first group" in text for text in notices(lambda: fit(module, tmp_path)))

    def test_no_optimizer(self, tmp_path: Path) -> None:
        class Module(LM):
            def configure_optimizers(self) -> Any:
                return None

        with pytest.raises(OptimizerError, match="4 adapter parameters are in no optimizer"):
            fit(Module(TinyNet()), tmp_path)


class Checkpointed(TinyNet):
    """Its linears run under reentrant activation checkpointing, behind a frozen embedding."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(
            checkpoint(lambda x: x + self.second(self.first(x).relu()), self.embed(ids), use_reentrant=True)
        )


class Detached(TinyNet):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.second(self.first(x).relu()).detach())


class TestGradients:
    @pytest.mark.parametrize("net", [Checkpointed, Detached])
    def test_no_gradient_at_all(self, net: type[TinyNet], tmp_path: Path) -> None:
        match = "the loss does not depend on anything that is trained. Causes seen: reentrant .* detached"
        with pytest.raises(GradientError, match=match):
            fit(LM(net()), tmp_path)

    @pytest.mark.parametrize("net", [Checkpointed, Detached])
    def test_no_gradient_behind_a_trained_head(self, net: type[TinyNet], tmp_path: Path) -> None:
        match = "2 adapted layers were called but got no gradient at the first optimizer step, 'net.first' first"
        with pytest.raises(GradientError, match=match):
            fit(LM(net()), tmp_path, LoRA(r=4, modules_to_save=["head"]), accumulate_grad_batches=2)

    def test_reentrant_checkpointing_of_a_transformers_model(self, tmp_path: Path) -> None:
        net = tiny_llama()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        net.disable_input_require_grads()
        net.train()
        with pytest.raises(GradientError, match="reentrant activation checkpointing"):
            fit(LM(net), tmp_path)
        net = tiny_llama()
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = LM(net.train())
        assert_only_adapters_moved(fit(module, tmp_path), module)

    def test_zero_head(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        nn.init.zeros_(module.net.head.weight)
        assert any("all-zero gradient at the first step" in n for n in notices(lambda: fit(module, tmp_path)))
        with pytest.raises(GradientError, match="all-zero gradient for 5 steps, 'net.first' first"):
            fit(module, tmp_path, max_steps=8)

    def test_zero_head_that_is_trained(self, tmp_path: Path) -> None:
        module = LM(TinyNet())
        nn.init.zeros_(module.net.head.weight)
        lora = LoRA(r=4, modules_to_save=["head"])
        assert any("all-zero" in n for n in notices(lambda: fit(module, tmp_path, lora, max_steps=8)))

    def test_kernel_that_reads_the_weight(self, tmp_path: Path) -> None:
        class Attending(TinyNet):
            def __init__(self) -> None:
                super().__init__()
                self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

            def forward(self, ids: Tensor) -> Tensor:
                x = self.embed(ids)
                x = x + self.attention(x, x, x, need_weights=False)[0]
                return self.head(x + self.second(self.first(x).relu()))

        said = notices(lambda: fit(LM(Attending()), tmp_path, LoRA(r=4, target_modules=["out_proj", "first"])))
        assert any("'net.attention.out_proj' first" in n and "reads `.weight` directly" in n for n in said)

    def test_a_first_batch_that_is_left_out(self, tmp_path: Path) -> None:
        class Skips(LM):
            def training_step(self, batch: Tensor, batch_idx: int) -> Any:
                loss = super().training_step(batch, batch_idx)
                return None if batch_idx == 0 else loss

        module = Skips(TinyNet())
        fit(module, tmp_path)
        assert all(float(t.abs().sum()) > 0 for t in adapter_state_dict(module).values())

    def test_a_model_left_in_evaluation_mode(self, tmp_path: Path) -> None:
        module = LM(TinyNet().eval())
        before: dict[str, Tensor] = {}
        said = notices(lambda: before.update(fit(module, tmp_path, LoRA(r=4, lora_dropout=0.1))))
        assert_only_adapters_moved(before, module)
        assert len(said) == 1
        assert "`lora_dropout=0.1` does nothing in 2 adapted layers, 'net.first' first" in said[0]
        assert notices(lambda: fit(LM(TinyNet().eval()), tmp_path)) == []


class TestArguments:
    @pytest.mark.parametrize(
        ("values", "error", "text"),
        [
            ({"r": 0}, ConfigError, "`r` must be an integer of at least 1, got 0"),
            ({"r": -3}, ConfigError, "`r` must be an integer of at least 1, got -3"),
            ({"quantize": "nf5"}, ConfigError, "`quantize` must be one of"),
        ],
    )
    def test_refused_at_once(self, values: dict[str, Any], error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            LoRA(**values)

    def test_nothing_matches(self, tmp_path: Path) -> None:
        with pytest.raises(TargetError, match="first"):
            fit(LM(TinyNet()), tmp_path, LoRA(target_modules=["fist"]))

    def test_folder_of_another_rank(self, tmp_path: Path) -> None:
        net = TinyNet()
        module = LM(copy.deepcopy(net))
        apply_lora(module, LoRAConfig(r=2))
        save_adapter(module, tmp_path / "adapter")
        with pytest.raises(AdapterMismatchError):
            fit(LM(net), tmp_path, LoRA(r=4, init_from=str(tmp_path / "adapter")))
