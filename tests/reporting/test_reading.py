# SPDX-License-Identifier: Apache-2.0
"""A record is read back as it was written, and put together from the files of a run that wrote none."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError
from lightning_lora.io.adapter import save_adapter
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.reporting.page import render
from lightning_lora.reporting.reading import parts_of, read_run
from lightning_lora.reporting.words import verdict_in_words
from tests.helpers import tiny_llama
from tests.reporting.record import diagnosis, full, history, sweep

METRICS = """epoch,forgetting/kl,step,train_loss,val_loss
,0.5,0,,
0,,4,5.0,
0,,9,nan,
0,,9,,4.5
"""


def write(folder: Path) -> Path:
    """What callbacks and a CSV logger leave in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "forgetting.json").write_text(json.dumps([look.to_dict() for look in history()]))
    (folder / "scale_sweep.json").write_text(json.dumps(sweep().to_dict()))
    (folder / "adapter_diagnostics.json").write_text(json.dumps({**diagnosis(), "history": []}))
    (folder / "metrics.csv").write_text(METRICS)
    (folder / "hparams.yaml").write_text("lr: 0.002\nhf_token: abc\n")
    return folder


def test_the_record_of_the_callback_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = full()
    (tmp_path / "run.json").write_text(record.to_json())
    again = read_run(tmp_path)
    assert again.to_json() == record.to_json()
    assert math.isnan(again.curves["training loss"][1][1])
    assert "NaN" not in record.to_json()


def test_a_page_from_the_files_of_a_run(tmp_path: Path) -> None:
    record = read_run(write(tmp_path / "version_3"))
    assert record.title == "Run in version_3"
    assert record.watches[0].history == [look.to_dict() for look in history()]
    assert record.sweep == sweep().to_dict()
    assert record.diagnosis == diagnosis()
    assert record.curves["val_loss"] == [(10, 4.5)]
    assert record.curves["train_loss"][0] == (5, 5.0)
    assert list(record.curves) == ["train_loss", "val_loss"]
    assert record.configuration == {"module and data": {"lr": 0.002, "hf_token": "(hidden)"}}
    assert parts_of(record) == {
        "forgetting": True, "curves": True, "sweep": True, "adapters": True, "sizes": False, "configuration": True,
        "environment": False,
    }  # fmt: skip
    assert verdict_in_words(record.watches[0]).headline == "No alarm by the verdict"


def test_files_fill_what_the_record_lacks(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "run.json").write_text(full(sweep=None, curves={"a": [(0, 1.0)]}).to_json())
    record = read_run(tmp_path)
    assert record.sweep == sweep().to_dict()
    assert record.curves == {"a": [(0, 1.0)]}


def test_the_folder_above_is_taken_where_it_holds_one_run(tmp_path: Path) -> None:
    write(tmp_path / "lightning_logs" / "version_0")
    assert read_run(tmp_path).watches
    write(tmp_path / "lightning_logs" / "version_1")
    with pytest.raises(ConfigError, match=r"holds several runs, each with its own .*version_0.*version_1"):
        read_run(tmp_path)


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_folder_alone_tells_sizes_and_settings(own: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4))
    save_adapter(model, tmp_path / "adapter")
    if not own:
        (tmp_path / "adapter" / "lightning_lora.json").unlink()  # as PEFT would have written it
    record = read_run(tmp_path)
    count = sum(tensor.numel() for tensor in adapter_state_dict(model).values() if tensor.is_floating_point())
    assert record.sizes["adapter_params"] == count
    assert record.configuration["adapters"]["r"] == 4
    assert record.files == {"adapter": sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())}
    assert f"{count:,}" in render(record)


def test_a_configuration_of_lightning_cli(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "hparams.yaml").write_text("module: !!python/object:builtins.object {}\n")
    (tmp_path / "config.yaml").write_text("seed_everything: 0\nlora: {r: 8}\ntrainer: {logger: {init_args: {a: 1}}}\n")
    assert read_run(tmp_path).configuration == {
        "run": {"seed_everything": 0}, "lora": {"r": 8}, "trainer": {"logger.init_args.a": 1}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("forgetting.json", "[{}]"), ("forgetting.json", "{"), ("scale_sweep.json", "[]"), ("run.json", "{}"),
        ("adapter_diagnostics.json", "{}"), ("config.yaml", "- a\n"), ("run.json", '{"format": 99}'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    (write(tmp_path) / name).write_text(text)
    with pytest.raises(ConfigError, match=name):
        read_run(tmp_path)


def test_a_folder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds nothing of a run"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        read_run(tmp_path / "none")


def test_the_titles_order(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(replace(full(), title="mine").to_json())
    assert read_run(tmp_path).title == "mine"
    assert read_run(tmp_path, "yours").title == "yours"
