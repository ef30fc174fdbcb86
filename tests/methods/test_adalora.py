# SPDX-License-Identifier: Apache-2.0
"""`AdaLoRA` in `fit`: what PEFT's own loop gives, its schedule, what it logs, accumulation, clipping and scalers."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_lora import AdaLoRA, load_adapter, save_adapter
from lightning_lora.errors import CheckpointError, ConfigError, UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adalora import AdaLoRALinear
from tests.helpers import LM, loader, make_trainer, tiny_llama

TARGETS = ["q_proj", "v_proj", "up_proj"]
WORDS: dict[str, Any] = {
    "init_r": 6, "target_r": 2, "lora_alpha": 8, "tinit": 2, "tfinal": 3, "deltaT": 2, "orth_reg_weight": 0.3,
    "target_modules": TARGETS,
}  # fmt: skip
STEPS = 12


def layers(model: nn.Module) -> dict[str, AdaLoRALinear]:
    return {name: m for name, m in adapter_modules(model) if isinstance(m, AdaLoRALinear)}


def run(path: Path, words: dict[str, Any] | None = None, data: Any = None, **trainer: Any) -> tuple[LM, AdaLoRA]:
    torch.manual_seed(0)
    module, callback = LM(tiny_llama()), AdaLoRA(**{**WORDS, **(words or {})})
    make_trainer(path, [callback], **{"max_steps": STEPS, **trainer}).fit(module, data or loader())
    return module, callback


def pefts(clip: float | None) -> tuple[nn.Module, list[float]]:
    """The same run by PEFT and a loop of one's own, and its losses without the orthogonality term."""
    torch.manual_seed(0)
    base = tiny_llama()
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=STEPS, **WORDS)
    model = peft.get_peft_model(base, config).train()
    torch.manual_seed(0)
    start = LM(tiny_llama())
    make_trainer(Path(), [AdaLoRA(**WORDS)], max_steps=1).validate(start, loader(), verbose=False)
    for name, module in layers(start).items():
        twin = model.base_model.model.get_submodule(name.removeprefix("net."))
        for own, tensor in zip(("lora_A", "lora_E", "lora_B"), module.triplets, strict=True):
            getattr(twin, own)["default"].data.copy_(tensor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step, ids in zip(range(1, STEPS + 1), loader(), strict=False):
        optimizer.zero_grad()
        out = model(input_ids=ids, labels=ids)
        losses.append(nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item())
        out.loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        model.base_model.update_and_allocate(step)
    return model, losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_run_is_that_of_pefts_loop(clip: float | None, tmp_path: Path) -> None:
    theirs, losses = pefts(clip)
    seen = Losses()
    torch.manual_seed(0)
    module, callback = LM(tiny_llama()), AdaLoRA(**WORDS)
    make_trainer(tmp_path, [callback, seen], max_steps=STEPS, gradient_clip_val=clip).fit(module, loader())
    assert seen.logged == pytest.approx(losses, rel=1e-4)
    for name, layer in layers(module).items():
        twin = theirs.base_model.model.get_submodule(name.removeprefix("net."))
        for own, tensor in zip(("lora_A", "lora_E", "lora_B"), layer.triplets, strict=True):
            want = getattr(twin, own)["default"]
            assert torch.equal(tensor == 0, want == 0)
            assert torch.allclose(tensor, want, rtol=1e-3, atol=1e-4)
    ranks = callback.allocator.ranks()
    assert (sum(ranks.values()), len(set(ranks.values())) > 1) == (2 * len(ranks), True)
    save_adapter(module, tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["rank_pattern"]
    pattern = theirs.peft_config["default"].rank_pattern
    assert written == {name.removesuffix(".default"): mask for name, mask in pattern.items()}


class Losses(L.Callback):
    """What the module logs as its loss."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append(trainer.callback_metrics["train_loss"].item())


def test_accumulated_batches_count_the_term_once(tmp_path: Path) -> None:
    whole, first = run(tmp_path, data=loader(batch_size=4))
    parts, second = run(tmp_path, data=loader(batch_size=2), accumulate_grad_batches=2)
    assert first.allocator.ranks() == second.allocator.ranks()
    for a, b in zip(layers(whole).values(), layers(parts).values(), strict=True):
        assert all(torch.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in zip(a.triplets, b.triplets, strict=True))


def test_the_term_makes_vectors_more_orthonormal(tmp_path: Path) -> None:
    found = [run(tmp_path, {"orth_reg_weight": weight})[1].metrics(STEPS)["adalora/orthogonality"] for weight in (0, 5)]
    assert found[1] < 0.8 * found[0]


def test_what_is_logged(tmp_path: Path) -> None:
    run(tmp_path, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=3)
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["adalora/budget"]]
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    values = [{key: float(v) for key, v in row.items() if key.startswith("adalora/")} for row in rows]
    assert [v["adalora/budget"] for v in values] == [27, 13, 12, 12]
    assert [v["adalora/rank_mean"] for v in values] == [6, 13 / 6, 2, 2]
    assert all(v["adalora/rank_min"] <= v["adalora/rank_median"] <= v["adalora/rank_max"] for v in values)
    assert set(values[0]) == {
        *(f"adalora/rank_{name}" for name in ("mean", "min", "q25", "median", "q75", "max")),
        *("adalora/budget", "adalora/layers_at_zero", "adalora/orthogonality"),
    }


def test_a_step_that_a_scaler_leaves_out_is_not_scored(tmp_path: Path) -> None:
    class Overflows(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1)

    torch.manual_seed(0)
    module, callback = Overflows(tiny_llama()), AdaLoRA(**WORDS)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    make_trainer(tmp_path, [callback], max_steps=STEPS, plugins=[plugin]).fit(module, loader())
    assert plugin.scaler.get_scale() == 2.0
    assert all(t.isfinite().all() for layer in layers(module).values() for t in layer.triplets)
    assert sum(callback.allocator.ranks().values()) == 2 * len(layers(module))


def test_steps_that_a_scaler_leaves_out_at_the_start(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = LM(tiny_llama()), AdaLoRA(**{**WORDS, "tinit": 0, "deltaT": 1})
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38, backoff_factor=1e-6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    make_trainer(tmp_path, [callback], max_steps=STEPS, plugins=[plugin]).fit(module, loader())
    assert scaler.get_scale() < 1e37
    assert sum(callback.allocator.ranks().values()) == 2 * len(layers(module))


def test_steps_without_a_loss(tmp_path: Path) -> None:
    class Pauses(LM):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return super().training_step(batch, batch_idx) if batch_idx % 3 else None

    torch.manual_seed(0)
    module, callback = Pauses(tiny_llama()), AdaLoRA(**WORDS)
    make_trainer(tmp_path, [callback], max_steps=STEPS).fit(module, loader())
    assert sum(callback.allocator.ranks().values()) == 2 * len(layers(module))


def test_gradients_that_are_cleared_too_early_are_named(tmp_path: Path) -> None:
    class Clears(LM):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            self.zero_grad()

    with pytest.raises(UnsupportedError, match="they are gone when the step is over"):
        make_trainer(tmp_path, [AdaLoRA(**WORDS)], max_steps=STEPS).fit(Clears(tiny_llama()), loader())


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions(precision: Any, tmp_path: Path) -> None:
    module, callback = run(tmp_path, precision=precision)
    assert sum(callback.allocator.ranks().values()) == 2 * len(layers(module))
    assert {t.dtype for layer in layers(module).values() for t in layer.triplets} == {torch.float32}


@pytest.mark.parametrize(
    ("words", "trainer", "text"),
    [
        ({}, {"max_steps": -1, "max_epochs": -1}, "whose length is unknown: give the Trainer `max_steps`"),
        ({}, {"max_steps": 5}, "`tinit=2` are before the budget falls and `tfinal=3` after it"),
        ({"total_step": 4}, {}, "the run has 4 optimizer steps, of which `tinit=2`"),
        ({"tinit": 0, "tfinal": 0}, {"max_steps": 1}, "the run has 1 optimizer steps"),
    ],
)
def test_runs_too_short_or_of_unknown_length(words: Any, trainer: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        run(tmp_path, words, **trainer)


def test_a_fast_dev_run_runs(tmp_path: Path) -> None:
    module, callback = run(tmp_path, fast_dev_run=True)
    assert callback.allocator.schedule.total == 7
    assert all(m.triplets.E.any() for m in layers(module).values())


def test_a_module_that_optimizes_by_hand_is_refused(tmp_path: Path) -> None:
    class ByHand(LM):
        automatic_optimization = False

    module = ByHand(tiny_llama())
    module.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="optimizes by hand"):
        make_trainer(tmp_path, [AdaLoRA(**WORDS)]).fit(module, loader())


def test_a_longer_run_goes_on_with_its_schedule_and_another_one_begins_anew(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback = LM(tiny_llama()), AdaLoRA(**WORDS)
    trainer = make_trainer(tmp_path, [callback], max_steps=STEPS)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["AdaLoRA"]
    assert state["total_step"] == STEPS
    assert state["allocator"]["sensitivity"] == {}  # the choice is final
    kept = callback.allocator.kept
    again = AdaLoRA(**WORDS)
    make_trainer(tmp_path, [again], max_steps=STEPS + 4).fit(
        longer := LM(tiny_llama()), loader(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert all(torch.equal(again.allocator.kept[name], mask) for name, mask in kept.items())
    assert all(torch.equal(m.triplets.E.view(-1) != 0, kept[name]) for name, m in layers(longer).items())
    make_trainer(tmp_path, [callback], max_steps=STEPS + 8).fit(module, loader())
    assert callback.allocator.schedule.total == STEPS + 8
    with pytest.raises(CheckpointError, match="the importance scores in the checkpoint are of other layers"):
        callback.allocator.load_state_dict({**state["allocator"], "kept": {"x": torch.ones(6, dtype=torch.bool)}})


def test_a_run_from_a_pruned_folder_may_take_ranks_up_again(tmp_path: Path) -> None:
    module, callback = run(tmp_path)
    save_adapter(module, tmp_path / "a")
    kept = callback.allocator.kept
    plain = tiny_llama()
    load_adapter(plain, tmp_path / "a")
    ids = torch.arange(32).view(2, 16)
    assert torch.allclose(plain.eval()(ids).logits, module.eval()(ids), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(m.triplets.E.view(-1) != 0, kept[f"net.{name}"]) for name, m in layers(plain).items())
    assert all(m.triplets.A.any(1).all() for m in layers(plain).values())
    _, again = run(tmp_path, {"init_from": str(tmp_path / "a"), "deltaT": 1})
    assert again.metrics(1)["adalora/budget"] == 36
    assert sum(again.allocator.ranks().values()) == 12
    assert any(bool((again.allocator.kept[name] & ~mask).any()) for name, mask in kept.items())


@pytest.mark.slow
def test_two_ranks_take_the_same_ranks_away(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("two_ranks.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for method in ("AdaLoRA", "VeRA"):
        assert first[method].keys() == second[method].keys()
        assert all(torch.equal(first[method][name], second[method][name]) for name in first[method])
    assert all(torch.equal(first["kept"][name], second["kept"][name]) for name in first["kept"])
    assert sum(int(mask.sum()) for mask in first["kept"].values()) == 2 * len(first["kept"])
    for title in ("AdaLoRA", "VeRA"):
        assert f'{title} is not built for FSDP 1: use the strategy "lora_ddp"' in first["fsdp1"][title]
        assert f"{title} is not built for FSDP 2" in first["fsdp2"][title]
        assert f"{title} is not built for tensor parallelism" in first["tensor_parallel"][title]
