# SPDX-License-Identifier: Apache-2.0
"""The laws: what holds for every method, whatever it trains."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_lora import (
    AdapterSummary,
    ForgettingMonitor,
    IA3Config,
    LoRAConfig,
    adapter_state_dict,
    apply_adapters,
    disable_adapters,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
    save_adapter,
    set_adapter_scale,
)
from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import AdapterConfig, config_from_dict
from lightning_lora.errors import AdapterMismatchError, UnsupportedError
from lightning_lora.io.adapter_facts import adapter_facts
from lightning_lora.io.checkpoint_file import KEY, read_checkpoint
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.spectrum import adapter_spectra
from lightning_lora.nn.adapted import AdaptedLayer
from tests.forgetting import tiny
from tests.helpers import LM, loader, make_trainer, tiny_gpt2, tiny_llama
from tests.methods.table import ROWS, Row

IDS = torch.arange(24).view(2, 12) % 61

every_method = pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] if row.kin else [], id=row.name) for row in ROWS]
)


class Net(LM):
    """A tiny Llama, trained at a rate that is given; its class alone makes it again."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(tiny_llama(), lr=lr)
        self.save_hyperparameters()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    training = model.training
    out = model.eval()(IDS).logits
    model.train(training)
    return out


def near(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def run(row: Row, folder: Path, steps: int = 4, ckpt: str | None = None, **kwargs: Any) -> tuple[Net, list[str]]:
    """A run with a checkpoint at every second step; the module and the checkpoints' paths."""
    module = Net(row.learns_at)
    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    trainer = make_trainer(folder, [row.make(), saver], max_steps=steps, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader(size=32), ckpt_path=ckpt)
    return module, sorted(str(path) for path in folder.glob("step=*.ckpt"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One run a method, made when it is first asked for."""
    made: dict[str, tuple[Net, list[str]]] = {}

    def get(row: Row) -> tuple[Net, list[str]]:
        if row.name not in made:
            made[row.name] = run(row, tmp_path_factory.mktemp("run"))
        return made[row.name]

    return get


@every_method
def test_it_begins_as_the_base(row: Row) -> None:
    model = tiny_llama()
    before = logits(model)
    report = apply_adapters(model, row.config())
    assert report.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    if not row.begins:
        assert near(logits(model), before) > 1e-3
    elif row.exact:
        assert torch.equal(logits(model), before)
    else:
        assert near(logits(model), before) < row.tolerance


@every_method
def test_a_run_moves_it_and_off_it_is_the_base(row: Row, runs: Any) -> None:
    module, _ = runs(row)
    base, live = logits(tiny_llama()), logits(module.net)
    assert near(live, base) > 1e-4
    with disable_adapters(module):
        off = logits(module.net)
    set_adapter_scale(module, 0.0)
    scaled = logits(module.net)
    set_adapter_scale(module, 1.0)
    if row.exact:
        assert torch.equal(off, base)
        assert torch.equal(scaled, base)
    else:
        assert near(off, base) < row.tolerance
        assert near(scaled, base) < row.tolerance
        assert near(scaled, off) < 1e-6
    assert torch.equal(logits(module.net), live)


@every_method
def test_checkpoints_hold_what_is_trained_alone(row: Row, runs: Any) -> None:
    module, files = runs(row)
    checkpoint = read_checkpoint(files[-1])
    assert set(checkpoint["state_dict"]) == set(adapter_state_dict(module))
    frozen = [p.data_ptr() for _, adapted in adapter_modules(module) for p in adapted.replaced.parameters()]
    assert not any(t.data_ptr() in frozen for t in adapter_state_dict(module).values())
    assert config_from_dict(checkpoint[KEY]["config"]) == row.config()
    torch.load(files[-1], weights_only=True)


@every_method
def test_a_run_that_was_cut_ends_with_the_same_bits(row: Row, runs: Any, tmp_path: Path) -> None:
    whole, files = runs(row)
    resumed, _ = run(row, tmp_path, ckpt=files[0])
    one, other = adapter_state_dict(whole), adapter_state_dict(resumed)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert torch.equal(logits(whole.net), logits(resumed.net))


@every_method
def test_a_module_from_its_checkpoint(row: Row, runs: Any) -> None:
    module, files = runs(row)
    again = load_from_checkpoint(Net, files[-1])
    assert torch.equal(logits(again.net), logits(module.net))


@pytest.mark.slow
@every_method
def test_what_looks_at_a_run_leaves_its_bits(row: Row, runs: Any, tmp_path: Path) -> None:
    tasks = tiny.write_task(tmp_path, "kept", tiny.items(8))
    watched: dict[bool, nn.Module] = {}
    for looks in (False, True):
        torch.manual_seed(7)
        student = tiny.Student()
        callbacks: list[Any] = [row.make()]
        if looks:
            monitor = ForgettingMonitor(str(tasks), tiny.tokenizer(), every_n_steps=2, items_per_eval=4)
            callbacks += [AdapterSummary(), monitor]
        trainer = make_trainer(tmp_path, callbacks, max_steps=3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(student, tiny.loader())
        watched[looks] = student
    assert monitor.report is not None
    one, other = (adapter_state_dict(student) for student in watched.values())
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@every_method
def test_diagnostics_look_at_updates_of_low_rank_and_name_the_others(row: Row, runs: Any) -> None:
    module, _ = runs(row)
    if row.low_rank:
        for name, spectrum in adapter_spectra(module).items():
            layer = module.get_submodule(name)
            if isinstance(layer, AdaptedLayer) and row.name != "dora":  # whose spectra are of the direction's move
                size = float(layer.delta_weight().norm())
                assert spectrum.norm == pytest.approx(size, rel=1e-3, abs=1e-6)
    else:
        with pytest.raises(AdapterMismatchError, match=f"{row.config().title} changes it in another way"):
            adapter_spectra(module)


@every_method
def test_from_yaml_it_is_the_same(row: Row, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    callback = {"class_path": f"lightning_lora.{row.callback}", "init_args": row.settings}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [callback], "logger": False, "accelerator": "cpu"}}))
    cli = LightningCLI(Net, args=["--config", str(config)], run=False, save_config_callback=None)
    (made,) = [c for c in cli.trainer.callbacks if isinstance(c, AdapterCallback)]  # type: ignore[attr-defined]
    assert made.config == row.config()


@every_method
def test_its_configuration_is_primitives_and_comes_back(row: Row) -> None:
    config = row.config()
    again = config_from_dict(json.loads(json.dumps(config.to_dict())))
    assert type(again) is type(config)
    assert again == config
    assert isinstance(config, AdapterConfig)


@every_method
def test_its_folder_comes_back_and_peft_takes_it(row: Row, runs: Any, tmp_path: Path) -> None:
    module, _ = runs(row)
    if not (row.peft or row.own_folder):
        with pytest.raises(UnsupportedError, match=row.config().title):
            save_adapter(module, tmp_path / "adapter")
        return
    save_adapter(module, tmp_path / "adapter")
    live = logits(module.net)
    again = tiny_llama()
    load_adapter(again, tmp_path / "adapter")
    assert near(logits(again), live) < (1e-7 if row.exact else row.tolerance)
    if row.peft:
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")
        assert near(logits(theirs)[:, -live.shape[1] :], live) < row.tolerance  # PEFT's virtual tokens have logits too
        theirs.save_pretrained(tmp_path / "theirs")
        back = tiny_llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_adapter(back, tmp_path / "theirs")
        assert near(logits(back), live) < row.tolerance


@every_method
def test_a_folder_of_another_method_or_another_use_is_refused_by_name(row: Row, tmp_path: Path) -> None:
    other: AdapterConfig = IA3Config() if row.callback == "LoRA" else LoRAConfig(r=4)
    source = tiny_llama()
    apply_adapters(source, other)
    save_adapter(source, tmp_path / "other")
    model = tiny_llama()
    apply_adapters(model, row.config())
    text = f"holds an adapter of {other.title}, the model was converted for {row.config().title}"
    with pytest.raises((AdapterMismatchError, UnsupportedError), match=text if row.exact else "shares a model"):
        load_adapter(model, tmp_path / "other")
    for name in row.config().use_fields:
        changed = {"mode": "parallel", "non_linearity": "gelu"}.get(name, 3.0)
        source = tiny_llama()
        apply_adapters(source, row.config(**{name: changed}))
        save_adapter(source, tmp_path / name)
        with pytest.raises(AdapterMismatchError, match=f"`{name}` is {changed!r} there and"):
            load_adapter(model, tmp_path / name)


@every_method
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_merged_it_computes_the_same_or_says_why_not(row: Row, make: Any) -> None:
    model = make()
    apply_adapters(model, row.config())
    torch.manual_seed(3)
    for tensor in adapter_state_dict(model).values():
        if tensor.is_floating_point():
            tensor.add_(0.02 * torch.randn_like(tensor))
    live = logits(model)
    if not row.merges:
        with pytest.raises(UnsupportedError, match=row.config().title):
            merge_adapters(model, IDS)
        return
    merge_adapters(model, IDS)
    assert near(logits(model), live) < 1e-5
    assert not list(adapter_modules(model))


@every_method
def test_over_a_packed_base(row: Row, tmp_path: Path) -> None:
    if not row.packed:
        with pytest.raises(UnsupportedError, match="quantize"):
            apply_adapters(tiny_llama(), row.config(quantize="nf4"))
        return
    module = Net(row.learns_at)
    base = tiny_llama()
    apply_adapters(base, row.config(quantize="nf4"))
    trainer = make_trainer(tmp_path, [row.make(quantize="nf4"), AdapterSummary()], max_steps=3)
    trainer.fit(module, loader(size=32))
    assert near(logits(module.net), logits(base)) > 1e-4
    with disable_adapters(module), disable_adapters(base):
        off, packed = logits(module.net), logits(base)
    assert torch.equal(off, packed) if row.exact else near(off, packed) < 1e-5


@every_method
def test_what_a_file_says_of_it(row: Row, runs: Any, tmp_path: Path) -> None:
    module, files = runs(row)
    places: list[Path | str] = [files[-1]]
    if row.peft or row.own_folder:
        save_adapter(module, tmp_path / "adapter")
        places.append(tmp_path / "adapter")
    every = [adapter_facts(place) for place in places]
    for facts in every:
        assert facts.parameters > 0
        assert facts.saved == []  # nothing of `modules_to_save`
    if len(every) == 2 and isinstance(row.config(), LoRAConfig):
        ours = {name.removeprefix("net."): spectrum.norm for name, spectrum in every[0].modules.items()}
        assert {name: spectrum.norm for name, spectrum in every[1].modules.items()} == pytest.approx(ours, rel=1e-5)
