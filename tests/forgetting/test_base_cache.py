# SPDX-License-Identifier: Apache-2.0
"""The base's answers on disk: the same numbers without a forward, never for another base, never from a damaged file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import Notice
from lightning_lora.forgetting.base_cache import PLACE
from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.tasks import LoadedTask
from lightning_lora.model.apply import apply_lora
from tests.forgetting import tiny


class Counted:
    """A scorer that counts the rows of its forwards."""

    def __init__(self, model: nn.Module, place: Path | None, **kwargs: Any) -> None:
        self.scorer = Scorer(model, tiny.tokenizer(), base_cache=place, batch_tokens=200, **kwargs)
        self.rows = 0
        model.get_input_embeddings().register_forward_pre_hook(lambda m, args: self._count(len(args[0])))

    def _count(self, rows: int) -> None:
        self.rows += rows

    def base(self, tasks: Mapping[str, LoadedTask], picked: Mapping[str, Sequence[int]]) -> dict[str, list[ItemScore]]:
        with self.scorer.quietly():
            self.scorer.score(tasks, {"alpha": [0]})  # as the model is asked before the base
            self.rows = 0
            with self.scorer.base():
                return self.scorer.score(tasks, picked)


PICKED = {"alpha": list(range(30)), "beta": list(range(20))}


@pytest.fixture
def filled(tmp_path: Path, loaded: dict[str, LoadedTask]) -> tuple[Path, dict[str, list[ItemScore]]]:
    """A folder with answers, and the scores made of them."""
    scores = Counted(tiny.adapted(0.3), tmp_path).base(loaded, PICKED)
    (path,) = tmp_path.iterdir()
    return path, scores


def test_a_later_run_asks_a_few_and_has_the_same_scores(
    filled: tuple[Path, dict[str, list[ItemScore]]], loaded: dict[str, LoadedTask]
) -> None:
    path, scores = filled
    later = Counted(tiny.adapted(0.7), path.parent)  # other adapters over the same base
    assert later.base(loaded, PICKED) == scores
    asked = later.rows
    assert 0 < asked <= 8
    assert later.base(loaded, PICKED) == scores
    assert later.rows == 0  # it was believed
    later.base(loaded, {"alpha": list(range(40))})
    assert 0 < later.rows <= 50  # the ten new items, four choices each
    again = Counted(tiny.adapted(0.7), path.parent)
    again.base(loaded, {"alpha": list(range(40))})
    assert again.rows <= 8
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_while_nothing_is_trained_the_base_itself_is_asked(
    filled: tuple[Path, dict[str, list[ItemScore]]], loaded: dict[str, LoadedTask]
) -> None:
    path, scores = filled
    answers = json.loads(path.read_text().splitlines()[1])
    one = Counted(tiny.adapted(0.0), path.parent)
    assert one.base(loaded, PICKED) == scores
    assert one.rows > 20
    assert json.loads(path.read_text().splitlines()[1]) == answers
    assert len(list(path.parent.iterdir())) == 1


def test_the_adapters_own_answers_are_not_kept(tmp_path: Path, loaded: dict[str, LoadedTask]) -> None:
    scorer = Scorer(tiny.adapted(0.3), tiny.tokenizer(), base_cache=tmp_path)
    with scorer.quietly():
        scorer.score(loaded, PICKED)
    assert not list(tmp_path.iterdir())


def test_another_base_precision_or_function_has_a_file_of_its_own(
    filled: tuple[Path, dict[str, list[ItemScore]]], loaded: dict[str, LoadedTask]
) -> None:
    path, scores = filled
    other = tiny.adapted(0.3)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
    packed = tiny.llama()
    apply_lora(packed, LoRAConfig(r=4, quantize="nf4"))
    turned = tiny.adapted(0.3)
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 5e5}
    for number, model in enumerate([other, packed, turned, tiny.adapted(0.3).bfloat16()], start=2):
        assert Counted(model, path.parent).base(loaded, PICKED) != scores or number == 4
        assert len(list(path.parent.iterdir())) == number


@pytest.mark.parametrize("damage", ["cut", "byte", "empty", "json", "foreign"])
def test_a_damaged_file_is_named_and_not_used(
    damage: str, filled: tuple[Path, dict[str, list[ItemScore]]], loaded: dict[str, LoadedTask]
) -> None:
    path, scores = filled
    text = path.read_text()
    where = text.index("[-") + 2
    path.write_text(
        {
            "cut": text[: len(text) // 2],
            "byte": text[:where] + str((int(text[where]) + 1) % 10) + text[where + 1 :],
            "empty": "",
            "json": "[]\n[]\n",
            "foreign": text.replace('"fingerprint"', '"fingerprunt"'),
        }[damage]
    )
    later = Counted(tiny.adapted(0.3), path.parent)
    with pytest.warns(Notice, match="is damaged and not used"):
        assert later.base(loaded, PICKED) == scores
    assert later.rows > 20
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        assert Counted(tiny.adapted(0.3), path.parent).base(loaded, PICKED) == scores


def test_a_file_that_does_not_fit_the_base_is_found_out(
    filled: tuple[Path, dict[str, list[ItemScore]]], loaded: dict[str, LoadedTask]
) -> None:
    """What no identity can tell: here, answers of something else under a valid digest."""
    import hashlib

    path, scores = filled
    head, answers = path.read_text().splitlines()
    wrong = json.dumps({key: [value - 0.5, greedy] for key, (value, greedy) in json.loads(answers).items()})
    said = {**json.loads(head), "sha256": hashlib.sha256(wrong.encode()).hexdigest()}
    path.write_text(f"{json.dumps(said)}\n{wrong}\n")
    with pytest.warns(Notice, match="answers asked again differ by 0.5 nats"):
        assert Counted(tiny.adapted(0.3), path.parent).base(loaded, PICKED) == scores
    assert Counted(tiny.adapted(0.3), path.parent).base(loaded, PICKED) == scores


def test_in_16_bits_a_whole_batch_is_known_or_none(tmp_path: Path, loaded: dict[str, LoadedTask]) -> None:
    first = Counted(tiny.adapted(0.3).bfloat16(), tmp_path)
    scores = first.base(loaded, PICKED)
    assert not first.scorer.exact
    later = Counted(tiny.adapted(0.3).bfloat16(), tmp_path)
    assert later.base(loaded, PICKED) == scores
    assert later.rows < first.rows + 40
    assert later.base(loaded, PICKED) == scores
    assert later.rows == 0
    later.base(loaded, {"alpha": list(range(3))})
    assert later.rows > 0  # known items, but in another batch


def test_place_from_the_environment_and_one_that_cannot_be_written(
    tmp_path: Path, loaded: dict[str, LoadedTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "there"))
    Counted(tiny.adapted(0.3), None).base(loaded, {"alpha": [1, 2]})
    assert len(list((tmp_path / "there").iterdir())) == 1
    (tmp_path / "file").write_text("")
    with pytest.warns(Notice, match="were not kept for later runs"):
        Counted(tiny.adapted(0.3), tmp_path / "file" / "below").base(loaded, {"alpha": [1, 2]})
