# SPDX-License-Identifier: Apache-2.0
"""Bars: what takes time says how far it is, on a terminal, and nowhere where it is told to be quiet."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from rich.progress import Progress

from lightning_lora import LoRA, LoRAConfig, apply_lora, bars, merge_to_disk
from lightning_lora.bars import no_bar, terminal_bar
from lightning_lora.callbacks import trainer_bar as own
from lightning_lora.callbacks.trainer_bar import trainer_bar
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import load_tasks
from tests.cli.small import BASE, tasks, write_adapter
from tests.helpers import LM, loader, make_trainer, tiny_llama


class Recorded:
    """A bar that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def __call__(self, what: str, total: int) -> Iterator[Callable[[int], object]]:
        self.seen.setdefault(what, [0, 0])[1] += total

        def advance(count: int) -> None:
            self.seen[what][0] += count

        yield advance

    def complete(self) -> bool:
        return all(done == total > 0 for done, total in self.seen.values())


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Inside, standard error is a terminal; gives what was drawn there."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    with os.fdopen(slave, "w") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        patch.setattr(bars, "DELAY", 0.0)

        def drawn() -> str:
            screen.flush()
            found = b""
            while select.select([master], [], [], 0.3)[0]:  # what is written arrives a little later
                found += os.read(master, 2**20)
            return found.decode()

        yield drawn
    os.close(master)


def test_packing_scoring_and_merging_tell_how_far_they_are(tmp_path: Path) -> None:
    bar = Recorded()
    model = tiny_llama()
    report = apply_lora(model, LoRAConfig(r=4, quantize="nf4"), bar=bar)
    assert bar.seen == {"packing": [len(report.adapted)] * 2}
    adapter = write_adapter(tmp_path / "a")
    merge_to_disk(BASE, adapter, tmp_path / "merged", check_base=False, progress=bar)
    from lightning_lora.cli.models import read_models

    models = read_models(BASE, adapter, "auto", None, "cpu", bar)
    scorer = models.scorer(bar=bar)
    found = load_tasks(tasks(tmp_path / "tasks"))
    with scorer.quietly():
        scorer.score(found, {name: [0, 1] for name in found})
        with scorer.base():
            scorer.score(found, {name: [0, 1] for name in found})
    assert set(bar.seen) == {"packing", "merging", "adapting", "model", "base"}
    assert bar.complete()


def test_a_bar_is_drawn_on_a_terminal_and_gone_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as drawn:
        with terminal_bar("packing", 4) as advance:
            advance(2)
            time.sleep(0.15)  # tqdm draws ten times a second at most
            advance(1)
            assert "packing:  75%" in drawn()
        assert drawn().endswith("\r")  # the line is cleared, nothing is left


def test_scores_show_a_bar_where_those_of_lm_eval_are_kept_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE)
    found = load_tasks(tasks(tmp_path / "tasks"))
    scorer = Scorer(model, AutoTokenizer.from_pretrained(BASE), bar=terminal_bar)
    with terminal(monkeypatch) as drawn, scorer.quietly():
        scorer.score(found, {"word_order": [0, 1, 2]})
        assert set(re.findall(r"([\w ]+):\s+\d+%", drawn())) == {"model"}


def test_no_bar_without_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "DELAY", 0.0)
    with terminal_bar("packing", 2) as advance:
        advance(2)
    assert capfd.readouterr() == ("", "")


def test_a_trainer_without_bars_has_none_here() -> None:
    assert trainer_bar(make_trainer(None, enable_progress_bar=False)) is no_bar
    assert trainer_bar(make_trainer(None, enable_progress_bar=True)) is not no_bar


@pytest.mark.parametrize("wanted", [True, False])
def test_packing_under_a_trainer_is_drawn_if_its_bars_are(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks: list[Any] = [LoRA(r=2, quantize="nf4"), *([TQDMProgressBar()] if wanted else [])]
    trainer = make_trainer(tmp_path, callbacks, max_steps=1, enable_progress_bar=wanted)
    with terminal(monkeypatch) as drawn:
        trainer.fit(LM(), loader(8))
        assert ("packing:" in drawn()) == wanted


def test_a_line_in_the_rich_display_leaves_those_of_lightning_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning finds its own lines by their place: one that was removed would shift them."""
    monkeypatch.setattr(own, "DELAY", 0.0)
    shown: list[bool] = []

    class Working(LM):
        def on_train_batch_end(self, *args: Any) -> None:
            with trainer_bar(self.trainer)("looking", 2) as advance:
                advance(1)
                display: Progress = self.trainer.progress_bar_callback.progress
                shown.append(any(t.description == "looking" and t.visible and t.completed == 1 for t in display.tasks))
                advance(1)

    trainer = make_trainer(tmp_path, [LoRA(r=2), RichProgressBar()], max_steps=3, enable_progress_bar=True)
    trainer.fit(Working(), loader(8), loader(8))
    assert shown == [True] * 3
    assert trainer.progress_bar_callback.train_progress_bar.description.startswith("Epoch")
