# SPDX-License-Identifier: Apache-2.0
"""When fit returns the merged model is there, computes what the live one computes, and the live one goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.errors import ConfigError, MergeError, Notice
from lightning_lora.model.apply import set_adapter_scale
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import adapter_state_dict
from tests.helpers import LM, TinyNet, Tokens, loader, make_trainer, tiny_gpt2, tiny_llama

IDS = Tokens(4).data


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model.eval()(IDS)
    return (out.logits if hasattr(out, "logits") else out).float()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_the_folder_is_there_and_the_live_model_goes_on(make: Any, quantize: str, tmp_path: Path) -> None:
    merge = MergeOnFitEnd(tmp_path / "m")
    checkpoint = AdapterCheckpoint(tmp_path / "a", monitor="train_loss", every_n_train_steps=2)
    model = LM(make())
    state: dict[str, Tensor] = {}

    class Keeps(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            state.update({name: tensor.clone() for name, tensor in adapter_state_dict(pl_module).items()})

    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize=quantize), checkpoint, merge, Keeps()], max_steps=8)
    trainer.fit(model, loader())
    after = adapter_state_dict(model)
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    live = logits(model)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert error(logits(loaded), live) < 1e-4
    assert merge.report is not None
    assert merge.report.checked_on == "a training batch"
    assert merge.report.logit_error < 1e-4
    written = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert (written["weights"], written["base"]) == ("last", "dequantized")
    assert written["checked_on"] == "a training batch"

    before = trainer.validate(model, loader(8), verbose=False)
    plain = trainer.test(model, loader(8), verbose=False)[0]["test_loss"]
    best = trainer.test(model, loader(8), ckpt_path="best", verbose=False)[0]["test_loss"]
    trainer.test(model, loader(8), ckpt_path=checkpoint.last_model_path or None, verbose=False)
    again = trainer.test(model, loader(8), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert best == again
    assert plain == pytest.approx(before[0]["val_loss"], rel=1e-6)


def test_testing_the_best_after_the_merge_gives_the_live_numbers(tmp_path: Path) -> None:
    results = []
    for with_merge in (False, True):
        callbacks = [LoRA(r=4), AdapterCheckpoint(tmp_path / f"a{with_merge}", every_n_train_steps=4)]
        if with_merge:
            callbacks.append(MergeOnFitEnd(tmp_path / "m"))
        model = LM(tiny_llama())
        torch.manual_seed(5)
        trainer = make_trainer(tmp_path, callbacks, max_steps=4)
        trainer.fit(model, loader())
        results.append(trainer.test(model, loader(8), ckpt_path="best", verbose=False)[0]["test_loss"])
    assert results[0] == results[1]


class Rises(LM):
    """Its best checkpoint by "score" is that of step 2."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("score", float(abs(self.global_step + 1 - 2)))
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", ["adapter folders", "Lightning's checkpoints"])
def test_best_is_loaded_for_the_merge_and_put_back(kind: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    made = AdapterCheckpoint if kind == "adapter folders" else ModelCheckpoint
    checkpoint = made(tmp_path / "a", monitor="score", every_n_train_steps=1)
    model = Rises(tiny_llama())
    callbacks = [LoRA(r=4), checkpoint, MergeOnFitEnd(tmp_path / "m", weights="best")]
    last: dict[str, Tensor] = {}

    class Remember(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            last.update({k: v.clone() for k, v in adapter_state_dict(pl_module).items()})

    trainer = make_trainer(tmp_path, [*callbacks, Remember()], max_steps=6)
    trainer.fit(model, loader())
    assert all(torch.equal(v, last[k]) for k, v in adapter_state_dict(model).items())
    assert checkpoint.best_model_path.endswith("step=2.ckpt")
    written = json.loads((tmp_path / "m" / "merge_report.json").read_text())
    assert written["checkpoint"] == checkpoint.best_model_path
    trainer.test(model, loader(8), ckpt_path="best", verbose=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert error(logits(loaded), logits(model)) < 1e-4


@pytest.mark.parametrize("kind", ["adapter folders", "Lightning's checkpoints"])
def test_best_at_a_strength_is_merged_at_it_and_put_back(kind: str, tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Halves(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            set_adapter_scale(pl_module, 0.5)

    made = AdapterCheckpoint if kind == "adapter folders" else ModelCheckpoint
    checkpoint = made(tmp_path / "a", monitor="score", every_n_train_steps=1)
    model = Rises(tiny_llama())
    callbacks = [LoRA(r=4, modules_to_save=["lm_head"]), checkpoint, MergeOnFitEnd(tmp_path / "m", weights="best")]
    trainer = make_trainer(tmp_path, [*callbacks, Halves()], max_steps=4)
    trainer.fit(model, loader())
    assert {m.strength for _, m in adapter_modules(model)} == {0.5}
    trainer.test(model, loader(8), ckpt_path=checkpoint.best_model_path, verbose=False)
    assert {m.strength for _, m in adapter_modules(model)} == {0.5}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert error(logits(loaded), logits(model)) < 1e-4


def test_best_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [LoRA(r=2), MergeOnFitEnd(tmp_path / "m", weights="best")])
    with pytest.raises(ConfigError, match="needs a checkpoint callback"):
        trainer.fit(LM(tiny_llama()), loader())
    never = AdapterCheckpoint(tmp_path / "a", every_n_train_steps=100)
    trainer = make_trainer(tmp_path, [LoRA(r=2), never, MergeOnFitEnd(tmp_path / "m", weights="best")])
    with pytest.raises(MergeError, match="no checkpoint was written in this fit"):
        trainer.fit(LM(tiny_llama()), loader())
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_plain_module_gives_a_state_dict(quantize: str, precision: Any, tmp_path: Path) -> None:
    merge = MergeOnFitEnd(tmp_path / "m")
    model = LM(TinyNet(dropout=0.1))
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize=quantize), merge], precision=precision)
    trainer.fit(model, loader())
    plain = LM(TinyNet()).to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    plain.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"), strict=True)
    assert merge.report is not None
    assert merge.report.checked_on == "a training batch"
    assert error(logits(plain), logits(model)) <= merge.report.logit_limit


def test_children_in_lists_and_linears_of_the_module_itself_are_compared(tmp_path: Path) -> None:
    class Direct(LM):
        def __init__(self) -> None:
            super().__init__(net=nn.Embedding(64, 8))
            self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.out = nn.Linear(8, 64)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.net(ids)
            for block in self.blocks:
                x = torch.relu(block(x))
            return self.out(x)

    merge = MergeOnFitEnd(tmp_path / "m")
    model = Direct()
    make_trainer(tmp_path, [LoRA(r=2), merge]).fit(model, loader())
    assert merge.report is not None
    assert merge.report.logit_error < 1e-4
    plain = Direct()
    plain.load_state_dict(load_file(tmp_path / "m" / "model.safetensors"))
    assert error(logits(plain), logits(model)) < 1e-4


class Plain(L.LightningModule):
    """Squares the outputs of its layers, called in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
        if how == "eval mode":
            self.net.eval()
        elif how == "compiled":
            self.net = torch.compile(self.net, backend="eager")
        elif how == "container":
            self.net.register_module("box", nn.Module())
            self.net.box.inner = nn.Linear(8, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch[:, :8].float() / 64
        if self.how == "weights only":
            return (x @ (self.net[0].lora_B @ self.net[0].lora_A).t()).square().mean()
        return (self.net.box.inner if self.how == "container" else self.net)(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("how", ["eval mode", "container"])
def test_a_plain_module_is_compared_however_it_is_called(how: str, tmp_path: Path) -> None:
    merge = MergeOnFitEnd(tmp_path / "m")
    model = Plain(how)
    make_trainer(tmp_path, [LoRA(r=2), merge]).fit(model, loader())
    assert merge.report is not None
    assert merge.report.checked_on == "a training batch"
    assert merge.report.logit_error < 1e-4
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("how", ["compiled", "weights only"])
def test_a_merge_that_could_not_be_compared_is_said(how: str, tmp_path: Path) -> None:
    merge = MergeOnFitEnd(tmp_path / "m")
    with pytest.warns(Notice, match="could not be compared .no input was seen in training.*only weights were"):
        make_trainer(tmp_path, [LoRA(r=2), merge]).fit(Plain(how), loader())
    assert merge.report is not None
    assert (merge.report.checked_on, merge.report.logit_error) == (None, None)


def test_looks_outside_of_training_steps_are_not_what_is_compared_on(tmp_path: Path) -> None:
    class Looks(L.Callback):
        """Calls the module in training mode where a monitor would."""

        def look(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            with torch.no_grad():
                pl_module.net(torch.zeros(2, 3, dtype=torch.long))

        on_train_start = on_train_batch_start = on_train_batch_end = look

    merge = MergeOnFitEnd(tmp_path / "m")
    seen: list[torch.Size] = []

    class Reads(L.Callback):
        def on_train_end(self, *_: Any) -> None:
            given = [call for batches in merge._inputs().values() for batch in batches for call in batch.values()]
            seen.extend(args[0].shape for args, _ in given)

    make_trainer(tmp_path, [merge, Looks(), LoRA(r=2), Reads()]).fit(LM(TinyNet()), loader())
    assert seen == [torch.Size([4, 16])]


@pytest.mark.parametrize("net", ["llama", "plain"])
def test_compared_on_the_run_s_own_validation_data(net: str, tmp_path: Path) -> None:
    merge = MergeOnFitEnd(tmp_path / "m")
    trainer = make_trainer(tmp_path, [LoRA(r=2), merge], limit_val_batches=5, val_check_interval=2)
    module = LM(tiny_llama() if net == "llama" else TinyNet())
    trainer.fit(module, loader(), loader(40, seed=3))
    assert merge.report is not None
    assert merge.report.checked_on == "3 validation batches"
    assert merge.report.logit_error < 1e-5
    assert not any(m._forward_pre_hooks for m in module.modules())
    trainer.validate(module, loader(40, seed=3), verbose=False)
    assert merge._inputs() == {"0 validation batches": [], "a training batch": []}


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    class Breaks(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            next(iter(adapter_state_dict(pl_module).values())).fill_(float("nan"))

    for how in ("eval mode", "compiled"):
        with pytest.raises(MergeError, match="merged weights are not finite in 1 modules, 'net.0' first"):
            make_trainer(tmp_path, [LoRA(r=2), MergeOnFitEnd(tmp_path / "m"), Breaks()]).fit(Plain(how), loader())
    assert not (tmp_path / "m").exists()


def test_an_encoder_decoder_is_compared_on_its_batch(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    class Seq2Seq(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(input_ids=batch, labels=batch).loss

    config = T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    merge = MergeOnFitEnd(tmp_path / "m")
    make_trainer(tmp_path, [LoRA(r=2), merge]).fit(Seq2Seq(T5ForConditionalGeneration(config)), loader())
    assert merge.report is not None
    assert merge.report.checked_on == "a training batch"
    assert merge.report.logit_error < 1e-4


def test_a_run_is_the_same_with_and_without(tmp_path: Path) -> None:
    states = []
    for with_merge in (False, True):
        torch.manual_seed(7)
        model = LM(tiny_llama())
        callbacks = [LoRA(r=4, lora_dropout=0.2), *([MergeOnFitEnd(tmp_path / "m")] if with_merge else [])]
        make_trainer(tmp_path, callbacks, max_steps=5).fit(model, loader(shuffle=True))
        states.append(adapter_state_dict(model))
        assert not model.net._forward_pre_hooks
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize("exception", [RuntimeError("broken"), KeyboardInterrupt()])
def test_after_a_fit_that_raised_nothing_is_written(
    exception: BaseException, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise exception

    trainer = make_trainer(tmp_path, [LoRA(r=2), MergeOnFitEnd(tmp_path / "m"), Fails()])
    model = LM(tiny_llama())
    with caplog.at_level("INFO"), pytest.raises((RuntimeError, SystemExit)):
        trainer.fit(model, loader())
    assert not (tmp_path / "m").exists()
    assert f"fit ended by {type(exception).__name__}, no merged model is written" in caplog.text
    assert not model.net._forward_pre_hooks


def test_a_folder_of_the_users_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.tex").write_text("years of work")
    model = LM(tiny_llama())
    with pytest.raises(MergeError, match="not empty and holds no earlier merged model"):
        make_trainer(tmp_path, [LoRA(r=2), MergeOnFitEnd(tmp_path / "m")]).fit(model, loader())
    assert (tmp_path / "m" / "thesis.tex").exists()


def test_a_second_fit_replaces_the_first_ones_folder(tmp_path: Path) -> None:
    for steps in (2, 3):
        model = LM(tiny_llama())
        make_trainer(tmp_path, [LoRA(r=2), MergeOnFitEnd(tmp_path / "m")], max_steps=steps).fit(model, loader())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert error(logits(loaded), logits(model)) < 1e-4


def test_without_lora_it_refuses_at_fit_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapters; add the `LoRA` callback"):
        make_trainer(tmp_path, [MergeOnFitEnd(tmp_path / "m")]).fit(LM(tiny_llama()), loader())


def test_fast_dev_run_writes_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        callbacks = [LoRA(r=2), MergeOnFitEnd(tmp_path / "m")]
        make_trainer(tmp_path, callbacks, fast_dev_run=True).fit(LM(tiny_llama()), loader())
    assert not (tmp_path / "m").exists()
    assert "no merged model is written with `fast_dev_run`" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"weights": "worst"}, ConfigError, '`weights` must be "last" or "best", got \'worst\''),
        ({"base": "requantized"}, ConfigError, '`base` must be "dequantized" or "original"'),
        ({"base": "other"}, ConfigError, '`base` must be "dequantized"'),
        ({"dtype": "fp8"}, ConfigError, "`dtype` must be"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        MergeOnFitEnd("m", **arguments)


def test_the_tokenizer_of_the_module_is_saved_too(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = LM(tiny_llama())
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    make_trainer(tmp_path, [LoRA(r=2), MergeOnFitEnd(tmp_path / "m")]).fit(model, loader())
    assert (tmp_path / "m" / "tokenizer.json").is_file()


def test_a_compiled_model_is_compared_on_fixed_ids_and_not_hooked(tmp_path: Path) -> None:
    model = LM(tiny_llama())
    model.net = torch.compile(model.net, backend="eager")
    merge = MergeOnFitEnd(tmp_path / "m")
    make_trainer(tmp_path, [LoRA(r=2), merge], max_steps=2).fit(model, loader())
    assert merge.report is not None
    assert merge.report.checked_on == "fixed token ids"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert error(logits(loaded), logits(model)) < 1e-4


TWO_PROCESSES = """
import sys
import torch
from lightning_lora import LoRA, AdapterCheckpoint, MergeOnFitEnd
from lightning_lora.errors import MergeError
from tests.helpers import LM, Tokens, loader, make_trainer, tiny_llama

folder = sys.argv[1]

def run(target):
    callbacks = [
        LoRA(r=4),
        AdapterCheckpoint(f"{folder}/a", "{step}", "train_loss", every_n_train_steps=1, keep_last_n=2),
        MergeOnFitEnd(target),
    ]
    model = LM(tiny_llama())
    trainer = make_trainer(folder, callbacks, devices=2, strategy="ddp", max_steps=4)
    trainer.fit(model, loader())
    return trainer, model

trainer, model = run(f"{folder}/m")
with torch.no_grad():
    live = model.eval()(Tokens(4).data)
torch.save(live, f"{folder}/live_{trainer.global_rank}.pt")
try:
    run(f"{folder}/taken")
except MergeError as error:
    open(f"{folder}/refused_{trainer.global_rank}.txt", "w").write(str(error))
"""


def test_two_processes_write_one_folder_and_fail_together(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    live = torch.load(tmp_path / "live_0.pt")
    assert torch.equal(live, torch.load(tmp_path / "live_1.pt"))
    assert error(logits(loaded), live) < 1e-4
    kept = {p.stem for p in (tmp_path / "a").glob("*.ckpt")}
    assert {"step=3", "step=4"} <= kept
    assert all((tmp_path / "a" / name / "adapter_config.json").is_file() for name in kept)
    assert "not empty" in (tmp_path / "refused_0.txt").read_text()
    assert "the first process could not" in (tmp_path / "refused_1.txt").read_text()
