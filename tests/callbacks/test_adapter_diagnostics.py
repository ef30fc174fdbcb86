# SPDX-License-Identifier: Apache-2.0
"""`AdapterSummary` and `AdapterDiagnostics` in real runs: what they print, log and write; training is the same."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_lora import AdapterDiagnostics, AdapterSummary, LoRA
from lightning_lora.errors import AdapterMismatchError, ConfigError, Notice
from lightning_lora.model.diagnosis import Diagnosis
from lightning_lora.model.spectrum import Spectrum
from lightning_lora.reporting.diagnostics import plot_diagnostics
from tests.helpers import LM, loader, make_trainer, named_tensors, tiny_gpt2, tiny_llama


def fitted(tmp_path: Path, callbacks: list[Any], **trainer: Any) -> LM:
    torch.manual_seed(0)
    module = LM(tiny_llama())
    make_trainer(tmp_path, callbacks, **{"max_steps": 6, **trainer}).fit(module, loader(shuffle=True))
    return module


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_is_the_same_with_and_without(precision: str, tmp_path: Path) -> None:
    runs = [
        fitted(tmp_path / str(i), [LoRA(r=4, lora_dropout=0.1), *extra], precision=precision)
        for i, extra in enumerate([[], [AdapterSummary(), AdapterDiagnostics(every_n_steps=2)]])
    ]
    first, second = (dict(named_tensors(run)) for run in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_logged_and_written(tmp_path: Path) -> None:
    diagnostics = AdapterDiagnostics(every_n_steps=2)
    logger = CSVLogger(tmp_path, name="csv")
    module = fitted(tmp_path, [LoRA(r=4), diagnostics], logger=logger, accumulate_grad_batches=2)
    assert [look.step for look in diagnostics.history] == [2, 4, 6]
    assert diagnostics.report is diagnostics.history[-1]
    folder = Path(logger.log_dir)
    written = json.loads((folder / "adapter_diagnostics.json").read_text())
    assert written["step"] == 6
    assert [look["step"] for look in written["history"]] == [2, 4, 6]
    assert len(written["modules"]) == 14
    one = written["modules"]["net.model.layers.0.self_attn.q_proj"]
    live = module.net.model.layers[0].self_attn.q_proj
    assert math.isclose(one["norm"], float(live.delta_weight().norm()), rel_tol=1e-4)
    assert one["grad_norm_A"] > 0
    assert one["grad_norm_B"] > 0
    assert (folder / "adapter_diagnostics.png").stat().st_size > 1000
    header = (folder / "metrics.csv").read_text().splitlines()[0]
    for name in ("stable_rank", "effective_rank", "condition", "relative_update", "dead_share", "grad_norm_B"):
        assert f"adapter/{name}" in header


def test_without_a_schedule_it_looks_at_the_end(tmp_path: Path) -> None:
    diagnostics = AdapterDiagnostics(dirpath=str(tmp_path / "here"))
    fitted(tmp_path, [LoRA(r=4, quantize="nf4"), diagnostics])
    assert [look.step for look in diagnostics.history] == [6]
    assert {"adapter/grad_norm_A", "adapter/relative_update"} <= diagnostics.history[0].metrics().keys()
    assert sorted(p.name for p in (tmp_path / "here").iterdir()) == [
        "adapter_diagnostics.json", "adapter_diagnostics.png"
    ]  # fmt: skip


def test_collapse_is_said_once(tmp_path: Path) -> None:
    """A rank of which all but one direction is kept at zero by its gradient."""

    class OneDirection(LM):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for name, parameter in self.named_parameters():
                if name.endswith("lora_B"):
                    parameter.grad[:, 1:] = 0  # type: ignore[index]

    torch.manual_seed(0)
    module = OneDirection(tiny_llama())
    with pytest.warns(Notice) as told:
        make_trainer(tmp_path, [LoRA(r=8), AdapterDiagnostics(every_n_steps=1)], max_steps=3).fit(module, loader())
    texts = [str(w.message) for w in told if "AdapterDiagnostics" in str(w.message)]
    assert [t.partition(": ")[2].partition(":")[0] for t in texts] == ["rank collapse", "wasted rank"]
    assert "`r=1` would hold 99 %" in texts[1]


def test_the_table_is_printed_as_fit_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = AdapterSummary(max_depth=3)
    fitted(tmp_path, [LoRA(r=4, quantize="nf4"), summary])
    text = capsys.readouterr().out
    assert "net.model.layers" in text
    assert "8,704 trainable (9.62 %)" in text
    assert summary.summary is not None
    assert summary.summary.total.trainable_params == 8704


def test_wrong_arguments_and_a_plain_module_are_refused(tmp_path: Path) -> None:
    for value in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=r"`every_n_steps` must be a whole number of 1 or more, or null"):
            AdapterDiagnostics(every_n_steps=value)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"`max_depth` must be a whole number"):
        AdapterSummary(max_depth=-2)
    with pytest.raises(AdapterMismatchError, match=r"add the `LoRA` callback"):
        fitted(tmp_path, [AdapterDiagnostics()])


def test_a_plot_has_a_panel_each_and_a_row_a_layer() -> None:
    modules = {
        f"model.layers.{i}.{name}": Spectrum(8, tuple(0.9 ** (i * k) for k in range(8)), base_norm=10.0)
        for i in range(40) for name in ("self_attn.q_proj", "mlp.up_proj") if (i, name) != (3, "mlp.up_proj")
    }  # fmt: skip
    figure = plot_diagnostics(Diagnosis(7, modules))
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == [
        "effective rank", "stable rank", "size of the update, |dW| / |W| [%]"
    ]  # fmt: skip
    assert panels[0].images[0].get_array().shape == (40, 2)
    with pytest.raises(ConfigError, match="no module to draw"):
        plot_diagnostics(Diagnosis(7, {}))


def test_conv1d_models_run_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diagnostics = AdapterDiagnostics()
    make_trainer(tmp_path, [LoRA(r=4), diagnostics], max_steps=2).fit(LM(tiny_gpt2()), loader())
    assert len(diagnostics.report.modules) == 8  # type: ignore[union-attr]


def test_two_ranks_find_the_same_and_one_of_them_says_it(tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).with_name("diagnostics_ranks.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [step for step, _ in first] == [2, 4]
    assert first == second
    assert len(list((tmp_path / "found").glob("*.json"))) == 1
    assert done.stdout.count(" in adapters, ") == 1  # the table, of the first rank alone
