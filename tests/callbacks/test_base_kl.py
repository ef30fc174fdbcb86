# SPDX-License-Identifier: Apache-2.0
"""`BaseKL` against modules that add the same term by hand, under everything that treats a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_lora import BaseKL, LoRA, adapter_state_dict, disable_adapters
from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.forgetting import divergence
from lightning_lora.forgetting.divergence import kl_sum
from tests.helpers import LM, TinyNet, loader, make_trainer, tiny_llama


def log_probs(logits: Tensor, left_out: Tensor | None) -> Tensor:
    """Plain torch, whole tensors: log-probabilities, without a token at each position."""
    logits = logits.double()
    if left_out is not None:
        logits = logits.masked_fill(F.one_hot(left_out, logits.shape[-1]).bool(), -1e30)
    return logits.log_softmax(-1)


def plain_kl(logits: Tensor, base: Tensor, left_out: Tensor | None = None) -> Tensor:
    q, p = log_probs(logits, left_out), log_probs(base, left_out)
    return (p.exp() * (p - q)).sum(-1)


class Learner(LM):
    """Steps in proportion to the gradient, so that differences of rounding stay what they are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class ByHand(Learner):
    """Adds the term in its own step."""

    weight, without_target, every = 0.7, False, 1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.trainer.global_step % self.every:
            return loss
        was = self.net.training
        with torch.no_grad(), disable_adapters(self):
            self.net.eval()
            base = self(batch)[:, :-1]
            self.net.train(was)
        target = batch[:, 1:] if self.without_target else None
        kl = plain_kl(self(batch)[:, :-1], base, target).mean()
        return loss + self.weight * kl.float()


def trained(tmp_path: Path, module: LM, *callbacks: L.Callback, **kwargs: Any) -> dict[str, Tensor]:
    """The adapters after a short run."""
    L.seed_everything(0)
    make_trainer(tmp_path, [LoRA(r=4), *callbacks], **kwargs).fit(module, loader())
    return {name: tensor.clone() for name, tensor in adapter_state_dict(module).items()}


def most(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("without_target", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_equals_a_module_that_adds_the_term_itself(tmp_path: Path, without_target: bool, every: int) -> None:
    hand = ByHand()
    hand.without_target, hand.every = without_target, every
    expected = trained(tmp_path, hand)
    found = trained(tmp_path, Learner(), BaseKL(0.7, non_target_only=without_target, every_n_steps=every))
    plain = trained(tmp_path, Learner())
    assert most(found, expected) < 1e-3 * most(found, plain)


@pytest.mark.parametrize(
    "kwargs",
    [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"},
     {"gradient_clip_val": 0.1}],
    ids=str,
)  # fmt: skip
def test_is_treated_as_the_loss_is(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    expected = trained(tmp_path, ByHand(), **kwargs)
    found = trained(tmp_path, Learner(), BaseKL(0.7), **kwargs)
    plain = trained(tmp_path, Learner(), **kwargs)
    # In 16 bits the gradient of the logits is rounded where autograd by hand rounds its own terms.
    assert most(found, expected) < (0.1 if "precision" in kwargs else 1e-3) * most(found, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    found = {}
    for checkpointing in (False, True):
        module = Learner()
        if checkpointing:
            module.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            module.net.enable_input_require_grads()
        found[checkpointing] = trained(tmp_path, module, BaseKL(0.7))
    assert most(found[True], found[False]) < 1e-6


def test_a_weight_of_zero_trains_the_same_bits(tmp_path: Path) -> None:
    plain, found = trained(tmp_path, LM()), trained(tmp_path, LM(), BaseKL(0.0))
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_a_validation_that_calls_the_training_step_is_left_alone(tmp_path: Path) -> None:
    class Both(Learner):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

    module, rows = Both(), loader(size=8)
    trainer = make_trainer(tmp_path, [LoRA(r=4), BaseKL(0.7)], max_steps=4, val_check_interval=2)
    trainer.fit(module, loader(), rows)
    with torch.no_grad():
        plain = torch.stack([module.loss(batch) for batch in rows]).mean()
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(float(plain), rel=1e-6)


def test_dropout_of_the_model_is_not_in_the_base(tmp_path: Path) -> None:
    """The base is asked in evaluation mode, and every module is in its own mode afterwards."""
    seen = []

    class Net(TinyNet):
        def forward(self, ids: Tensor) -> Tensor:
            seen.append((torch.is_grad_enabled(), self.training, self.dropout.training))
            return super().forward(ids)

    trained(tmp_path, LM(Net(dropout=0.5)), BaseKL(0.7, forward="net"), max_steps=2)
    assert seen == [(True, True, True), (False, False, False)] * 2


def test_is_logged_and_grows_from_zero(tmp_path: Path) -> None:
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            seen.append(float(trainer.callback_metrics["base_kl"]))

    trained(tmp_path, LM(), BaseKL(0.1), Watch(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert seen[0] == 0.0  # B = 0: the model is its base
    assert seen[-1] > 1e-3
    assert len(seen) == 4


def test_a_heavy_weight_holds_the_model_to_its_base(tmp_path: Path) -> None:
    distance = {}
    ids = next(iter(loader()))
    for weight in (0.0, 30.0):
        module = LM()
        trained(tmp_path, module, BaseKL(weight), max_steps=16)
        with torch.no_grad():
            tuned = module(ids)
            with disable_adapters(module):
                distance[weight] = float(plain_kl(tuned, module(ids)).mean())
    assert distance[30.0] < 0.6 * distance[0.0]


def test_batches_of_any_make_and_padding(tmp_path: Path) -> None:
    """The model is given a mask and labels; the padding's logits do not matter, nor does its loss run twice."""

    class Padded(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            mask = torch.ones_like(batch)
            mask[:, 10:] = 0
            out = self.net(input_ids=batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100))
            return {"loss": out.loss}

    class Short(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(input_ids=batch[:, :10], labels=batch[:, :10]).loss

    class FromTheRight(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            ids = torch.cat([torch.zeros_like(batch[:, :6]), batch[:, :10]], dim=1)
            mask = torch.ones_like(ids)
            mask[:, :6] = 0
            logits = self.net(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
            return F.cross_entropy(logits[:, 6:-1].flatten(0, 1), ids[:, 7:].flatten())

    expected = trained(tmp_path, Short(), BaseKL(0.7))
    for padded in (Padded(), FromTheRight()):
        assert most(trained(tmp_path, padded, BaseKL(0.7)), expected) < 1e-5


def test_step_without_batch_idx_and_the_step_comes_back(tmp_path: Path) -> None:
    class Plain(LM):
        def training_step(self, batch: Tensor) -> Tensor:
            return self.loss(batch)

    module = Plain()
    trained(tmp_path, module, BaseKL(0.7))
    assert "training_step" not in vars(module)


def test_the_step_comes_back_after_a_failed_run(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("on purpose")

    module = LM()
    with pytest.raises(RuntimeError, match="on purpose"):
        trained(tmp_path, module, BaseKL(0.7), Fails())
    assert "training_step" not in vars(module)


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    for kwargs, name in [({"weight": -1.0}, "weight"), ({"weight": float("nan")}, "weight"), ({"every_n_steps": 0},
                         "every_n_steps")]:  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            BaseKL(**kwargs)
    with pytest.raises(ConfigError, match="has none. Add the LoRA callback"):
        make_trainer(tmp_path, [BaseKL()]).fit(LM(), loader())
    with pytest.raises(ConfigError, match="0 transformers models"):
        trained(tmp_path, LM(TinyNet()), BaseKL())
    with pytest.raises(ConfigError, match="'nett' is no part"):
        trained(tmp_path, LM(TinyNet()), BaseKL(forward="nett"))
    with pytest.raises(ConfigError, match="saw no call of 'net.embed'"):
        trained(tmp_path, LM(TinyNet()), BaseKL(forward="net.embed"))

    class Manual(LM):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(UnsupportedError, match="optimizes by hand"):
        trained(tmp_path, Manual(), BaseKL())


# The function


@pytest.mark.parametrize("left_out", [False, True])
def test_divergence_and_its_gradient(monkeypatch: pytest.MonkeyPatch, left_out: bool) -> None:
    """Against double precision and autograd, in pieces of three rows."""
    monkeypatch.setattr(divergence, "PIECE", 3 * 17)
    generator = torch.Generator().manual_seed(0)
    logits, base = (3 * torch.randn(10, 17, generator=generator) for _ in range(2))
    keep = torch.rand(10, generator=generator) > 0.3
    masked = torch.randint(17, (10,), generator=generator) if left_out else None
    exact = logits.double().requires_grad_()
    expected = (plain_kl(exact, base.double(), masked) * keep).sum()
    expected.backward()
    own = logits.clone().requires_grad_()
    found = kl_sum(own, base.clone(), keep, masked)
    (2 * found).backward()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(own.grad, 2 * exact.grad.float(), atol=1e-5)
    kept = base.clone()
    with torch.no_grad():
        assert float(kl_sum(logits, kept, keep, masked)) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(kept, base)


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("positions", [1, 4])
def test_gradient_in_float16_is_lost_neither_before_the_scale_of_the_loss_nor_by_it(
    monkeypatch: pytest.MonkeyPatch, scale: float, positions: int
) -> None:
    """A vocabulary of ordinary size: most of q - p is far below what float16 can hold."""
    monkeypatch.setattr(divergence, "PIECE", 2 * 50_000)
    generator = torch.Generator().manual_seed(0)
    base = 2 * torch.randn(positions, 50_000, generator=generator)
    logits = (base + 0.1 * torch.randn(base.shape, generator=generator)).half()
    base = base.half()
    exact = logits.double().requires_grad_()
    (scale / positions * plain_kl(exact, base.double()).sum()).backward()
    own = logits.clone().requires_grad_()
    (scale / positions * kl_sum(own, base.clone())).backward()
    assert own.grad.dtype == torch.float16
    # The one rounding there is: of what autograd hands on, as of any loss in float16.
    assert torch.allclose(own.grad.double(), exact.grad.half().double(), rtol=4e-3, atol=1.3e-7)
    if scale > 1:
        assert (own.grad != 0).float().mean() > 0.99
        assert bool(own.grad.isfinite().all())


def test_divergence_of_the_same_is_nothing() -> None:
    logits = tiny_llama()(torch.arange(8)[None]).logits[0].detach()
    assert float(kl_sum(logits, logits.clone(), None, torch.arange(8))) == 0.0


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [({"weight": True}, "`weight` must be a finite number of 0 or more: got True"),
     ({"weight": float("inf")}, "`weight` must be a finite number of 0 or more: got inf"),
     ({"every_n_steps": 0}, "`every_n_steps` must be 1 or more: got 0"),
     ({"every_n_steps": True}, "`every_n_steps` must be a whole number: got True")],
)  # fmt: skip
def test_a_value_out_of_range_is_refused(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BaseKL(**kwargs)
