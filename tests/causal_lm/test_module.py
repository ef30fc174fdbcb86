# SPDX-License-Identifier: Apache-2.0
"""`CausalLMModule` in a real Trainer: with adapters, checkpoints, forgetting, merge and resume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_lora import (
    AdapterCheckpoint,
    CausalLMModule,
    ForgettingMonitor,
    InstructionDataModule,
    LoRA,
    MergeOnFitEnd,
    adapter_state_dict,
    load_from_checkpoint,
)
from lightning_lora.errors import ConfigError, MissingDependencyError, UnsupportedError
from small_base.data import load_tokenizer
from tests.causal_lm.test_datamodule import rows
from tests.causal_lm.test_packing import tiny
from tests.helpers import make_trainer, tiny_llama
from tests.model.nets import notices
from tests.test_readme import write_tasks


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny Llama and the small base's tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = load_tokenizer()
    tiny_llama(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def data(**arguments: Any) -> InstructionDataModule:
    return InstructionDataModule(rows(40), **{"batch_size": 4, "max_length": 64, **arguments})


def fitted(
    module: CausalLMModule, tmp_path: Path, own: InstructionDataModule | None = None, **values: Any
) -> L.Trainer:
    callbacks = [LoRA(r=4), *values.pop("callbacks", [])]
    fit = {"ckpt_path": values.pop("ckpt_path", None)}
    trainer = make_trainer(tmp_path, callbacks, **{"num_sanity_val_steps": 0, **values})
    notices(lambda: trainer.fit(module, own or data(), **fit))
    return trainer


def test_whole_run_over_a_packed_base(base: str, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    monitor = ForgettingMonitor([str(tmp_path / "tasks/word_order.yaml")], at_steps=[2], items_per_eval=4)
    checkpoint = AdapterCheckpoint(tmp_path / "adapters", every_n_train_steps=6)
    merge = MergeOnFitEnd(tmp_path / "merged")
    module = CausalLMModule(base, lr=1e-2, gradient_checkpointing=True, loss="chunked", chunk=16)
    lora = LoRA(r=4, quantize="nf4")
    trainer = make_trainer(
        tmp_path, [lora, checkpoint, monitor, merge], max_steps=6, log_every_n_steps=2, val_check_interval=3
    )
    before = notices(lambda: trainer.fit(module, data(packing=True)))
    assert [text for text in before if "Training data" not in text] == []
    assert lora.report is not None
    assert lora.report.quantize == "nf4"
    metrics = trainer.callback_metrics
    assert {"train_loss", "val_loss", "tokens_per_second"} <= set(metrics)
    assert metrics["tokens_per_second"] > 0
    assert monitor.report.kind == "verdict"
    assert merge.report is not None
    assert (Path(checkpoint.best_adapter_path) / "adapter_model.safetensors").is_file()

    stored = torch.load(checkpoint.best_model_path, weights_only=True)
    assert stored["hyper_parameters"] == {**module.hparams}
    assert all("lora_" in name for name in stored["state_dict"])
    loaded = load_from_checkpoint(CausalLMModule, checkpoint.best_model_path)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert torch.equal(loaded.eval()(ids), module.eval()(ids))
        torch.testing.assert_close(merged, module(ids), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_chunked_loss_trains_as_the_plain_one(base: str, tmp_path: Path, packing: bool) -> None:
    trained = []
    for loss in ("plain", "chunked"):
        L.seed_everything(0, verbose=False)
        module = CausalLMModule(base, loss=loss, chunk=8)  # type: ignore[arg-type]
        trainer = fitted(module, tmp_path, data(packing=packing), max_steps=2)
        trained.append([trainer.callback_metrics["train_loss"], *adapter_state_dict(module).values()])
    for plain, chunked in zip(*trained, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=1e-4, atol=1e-5)


def test_model_that_leaks_is_refused_before_a_step(base: str, tmp_path: Path) -> None:
    folder = tmp_path / "opt"
    tokenizer = load_tokenizer()
    tiny("opt", ffn_dim=48, word_embed_proj_dim=32, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with pytest.raises(UnsupportedError, match=r"OPTForCausalLM.*`packing=False`"):
        fitted(CausalLMModule(str(folder)), tmp_path, data(packing=True), max_steps=1)
    fitted(CausalLMModule(str(folder)), tmp_path, max_steps=1)


def test_gradient_checkpointing_gives_the_same_bits(base: str, tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        L.seed_everything(0, verbose=False)
        module = CausalLMModule(base, gradient_checkpointing=checkpointing)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*gradient_checkpointing_enable.*")
            warnings.filterwarnings("error", message=".*use_reentrant.*")
            fitted(module, tmp_path, max_steps=2)
        assert module.model.is_activation_checkpointing == checkpointing
        states.append(adapter_state_dict(module))
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


class Rates(L.Callback):
    """Notes each step's learning rate."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_schedule_rises_and_falls(base: str, tmp_path: Path) -> None:
    rates: dict[str, list[float]] = {}
    for schedule in ("cosine", "linear", "constant"):
        noted = Rates()
        module = CausalLMModule(base, lr=1e-3, schedule=schedule, warmup=0.2)  # type: ignore[arg-type]
        fitted(module, tmp_path, max_steps=10, callbacks=[noted])
        rates[schedule] = noted.seen
    assert all(seen[:3] == pytest.approx([0, 5e-4, 1e-3]) for seen in rates.values())
    assert rates["constant"][-1] == 1e-3
    assert rates["linear"][-1] == pytest.approx(1e-3 / 8)
    assert rates["cosine"][6] == pytest.approx(5e-4)
    assert 0 < rates["cosine"][-1] < rates["linear"][-1]


def test_defaults_are_those_of_the_guides(base: str, tmp_path: Path) -> None:
    noted = Rates()
    module = CausalLMModule(base)
    trainer = fitted(module, tmp_path, data(batch_size=1), max_steps=34, callbacks=[noted])
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert noted.seen[:3] == pytest.approx([0, 1e-4, 2e-4])  # 3 % of 34 steps, rounded up


def test_endless_run_has_no_share(base: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which has no end"):
        fitted(CausalLMModule(base), tmp_path, max_steps=-1, max_epochs=-1)
    module = CausalLMModule(base, schedule="constant", warmup=0)
    fitted(module, tmp_path, max_steps=-1, max_epochs=-1, max_time={"seconds": 0})


def test_cut_and_resumed_run_ends_with_the_same_bits(base: str, tmp_path: Path) -> None:
    """Packed rows, in the second of two epochs."""

    def run(**values: Any) -> CausalLMModule:
        L.seed_everything(0, verbose=False)
        module = CausalLMModule(base, lr=1e-2)
        fitted(module, tmp_path, data(packing=True, batch_size=2), max_epochs=2, **values)
        return module

    length = 10
    saver = AdapterCheckpoint(tmp_path / "a", every_n_train_steps=7, save_top_k=-1, filename="{step}")
    whole = run(max_steps=length, callbacks=[saver])
    assert (tmp_path / "a/step=7.ckpt").is_file()
    resumed = run(max_steps=length, ckpt_path=tmp_path / "a/step=7.ckpt")
    states = adapter_state_dict(whole), adapter_state_dict(resumed)
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())


def test_validation_loss_weighs_tokens_and_not_batches(base: str, tmp_path: Path) -> None:
    losses = []
    for size in (1, 4):
        torch.manual_seed(0)
        module = CausalLMModule(base)
        trainer = make_trainer(tmp_path)
        held_out = InstructionDataModule(rows(20), validation=rows(6), batch_size=size, max_length=64)
        notices(
            lambda held_out=held_out, module=module, trainer=trainer: trainer.validate(module, held_out, verbose=False)
        )
        losses.append(trainer.callback_metrics["val_loss"])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("shown", [False, True])
def test_bars_are_shown_where_the_trainer_shows_one(
    base: str, tmp_path: Path, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(CausalLMModule(base), tmp_path, max_steps=1, enable_progress_bar=shown, limit_val_batches=0)
    assert ("Loading weights" in capsys.readouterr().err) == shown
    from transformers.utils import logging

    assert logging.is_progress_bar_enabled()


@pytest.mark.parametrize(
    ("argument", "value"),
    [("lr", 0.0), ("warmup", 1.5), ("chunk", 0), ("schedule", "sine"), ("dtype", "fp8"), ("loss", "mean"),
     ("attention", "linear")],
)  # fmt: skip
def test_wrong_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{argument}`"):
        CausalLMModule("base", **{argument: value})


def test_liger_says_what_is_missing() -> None:
    with pytest.raises(MissingDependencyError, match="pip install liger-kernel"):
        CausalLMModule("base", loss="liger")
