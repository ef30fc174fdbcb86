# SPDX-License-Identifier: Apache-2.0
"""The page holds every part of the record, asks for nothing outside itself, and shows text as text."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from lightning_lora.forgetting.report import Report
from lightning_lora.reporting.curves import plot_curves, thin
from lightning_lora.reporting.heat import colour_of, heat_map
from lightning_lora.reporting.page import render
from lightning_lora.reporting.record import RunRecord, Watch, plain_settings
from lightning_lora.reporting.words import verdict_in_words
from tests.reporting.record import SCRIPT, TASK, diagnosis, full, history
from tests.reporting.test_forgetting import report

SECTIONS = ["forgetting", "training", "sweep", "adapters", "sizes", "configuration", "environment"]


class Page(HTMLParser):
    """Tags, attributes that name other files, ids of sections, and the text by section."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.asks: list[str] = []
        self.text: dict[str, str] = {}
        self._at, self._open = "head", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open = tag
        values = dict(attrs)
        if tag == "section":
            self._at = values["id"] or ""
        self.asks += [v or "" for k, v in attrs if k in ("href", "src", "srcset", "data", "action", "xlink:href")]
        assert not [k for k in values if k.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self._open != "style":
            self.text[self._at] = self.text.get(self._at, "") + data


@pytest.fixture(scope="module")
def html() -> str:
    return render(full())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_part_is_there(page: Page) -> None:
    assert list(page.text)[1:] == SECTIONS
    assert page.tags.count("svg") == 5
    text = page.text
    assert "-4.0 points" in text["forgetting"]
    assert "-6.0 to -2.0" in text["forgetting"]
    assert "law (target)" in text["forgetting"]
    assert "confidence" in text["forgetting"]
    assert "3.4 at step 10" in text["training"]
    assert "50 % was kept" in text["sweep"]
    assert "Effective rank" in text["adapters"]
    assert "layer (model.layers)" in text["adapters"]
    assert "effective rank, mean [directions]" in text["adapters"]
    assert "998,000" in text["sizes"]
    assert "3.99 MB" in text["sizes"]
    assert "12.3 kB" in text["sizes"]
    assert "target_modules" in text["configuration"]
    assert "2.13" in text["environment"]


def test_text_of_the_run_is_text(html: str, page: Page) -> None:
    assert "script" not in page.tags
    assert SCRIPT not in html
    assert SCRIPT in page.text["configuration"]
    assert TASK in page.text["forgetting"]  # in the table, and in the legend of the picture
    assert page.text["forgetting"].count(TASK) >= 2


def test_the_page_asks_for_nothing(html: str, page: Page) -> None:
    assert {ask for ask in page.asks if not ask.startswith("#")} == {"data:,"}  # no icon is looked for
    assert re.findall(r"https?://[^\s<\"]*", html) == ["https://example.org/data"]  # the run's own setting, as text
    assert not re.search(r"url\((?!#|'#|\"#)|@import", html)
    assert "default-src 'none'" in html


def test_pictures_take_the_pages_colours(html: str) -> None:
    pictures = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"#000000\b|#ffffff", pictures)
    assert "var(--c0)" in pictures
    assert set(re.findall(r"var\((--c\d)\)", pictures)) <= set(re.findall(r"(--c\d):", html))
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))


def test_what_is_missing_is_said() -> None:
    page = Page(render(RunRecord("empty")))
    said = {
        "forgetting": "add ForgettingMonitor", "training": "add RunReport", "sweep": "add ScaleSweep",
        "adapters": "add AdapterDiagnostics", "sizes": "add RunReport", "configuration": "add RunReport",
        "environment": "add RunReport",
    }  # fmt: skip
    assert list(said) == SECTIONS
    for section, words in said.items():
        assert words in page.text[section]


def test_without_matplotlib_the_tables_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    page = Page(render(full()))
    assert "svg" not in page.tags
    assert "matplotlib is not installed" in page.text["head"]
    assert "-6.0 to -2.0" in page.text["forgetting"]


def looked(report: Report, **watch: Any) -> Watch:
    return Watch([report.to_dict()], **watch)


ONE = report(10, "verdict", a=-0.001)


@pytest.mark.parametrize(
    ("watch", "mark", "said"),
    [
        (looked(replace(ONE, alarms=["pooled", "a"]), tolerance=0.005), "forgets", "in: all tasks together, a"),
        (looked(replace(ONE, alarms=["a"])), "forgets", "below its base, and not by chance, in: a"),
        (looked(replace(ONE, pooled=replace(ONE.pooled, delta_se=0.001, n_items=10_000)), tolerance=0.005),
         "holds", "A drop of more than 0.5 points, the tolerance, is excluded at 95 %"),
        (looked(ONE, tolerance=0.005), "open", "Neither a drop of more than 0.5 points"),
        (looked(ONE, tolerance=0.005), "open", "takes about 2,474 items like these"),
        (looked(replace(ONE, kind="look", e_value=30.0, alarms=["pooled"]), tolerance=0.005, alpha=0.05),
         "forgets", "raised the alarm at step 10 (e-value 30; from 20 on it is an alarm)"),
        (looked(replace(ONE, kind="look", e_value=2.0)), "open", "None of the 1 looks during training"),
        (looked(replace(ONE, pooled=replace(ONE.pooled, delta=0.0, delta_se=0.0, flips_lost=0, flips_gained=0)),
                tolerance=0.005), "open", "not one answer has changed"),
        (looked(replace(ONE, left_out=1234), tolerance=0.005), "open", "1,234 items were left out"),
        (looked(ONE, outcome={"by": "scale", "step": 10, "scale": 0.5, "holds": True, "items": 100}), "open",
         "The adapters were multiplied by 0.5"),
        (Watch([x.to_dict() for x in (ONE, replace(ONE, pooled=replace(ONE.pooled, delta=0.01)))]), "open",
         "as they were trained the difference was -0.1 points"),
        (looked(history()[-1], tolerance=0.005), "open", "On the target tasks the model differs from its base by -5.0"),
    ],
)  # fmt: skip
def test_the_verdict_in_words(watch: Watch, mark: str, said: str) -> None:
    found = verdict_in_words(watch)
    assert found.mark == mark
    assert said in " ".join(found.sentences)


def test_a_heat_map_has_a_place_for_each_module() -> None:
    found = heat_map("rank", diagnosis()["modules"], "effective_rank")
    assert found.columns == ["q_proj", "up_proj"]
    assert found.corner == "layer (model.layers)"
    assert [name for name, _ in found.rows] == ["0", "1"]
    grounds = {cell.ground for _, cells in found.rows for cell in cells}
    assert grounds == {"#440154", "#fde725"}
    assert colour_of(0.5) == (33, 145, 140)
    unknown = heat_map("size", diagnosis()["modules"], "relative_update")
    assert [cell.text for _, cells in unknown.rows for cell in cells] == ["0.374", "0.374", "", ""]


def test_long_curves_are_averaged() -> None:
    assert thin([(0, 1.0), (1, float("nan")), (2, 3.0)]) == [(0.0, 1.0), (2.0, 3.0)]
    many = thin([(i, float(i)) for i in range(1000)], most=100)
    assert len(many) == 100
    assert many[0] == (4.5, 4.5)
    _, ax = plot_curves({"a": [(0, 1.0), (9, 2.0)], "b": [(0, 0.5)]}, "loss")
    assert [line.get_label() for line in ax.lines] == ["a", "b"]


def test_settings_are_plain_and_secrets_hidden() -> None:
    values = {
        "tokenizer": "base", "hf_token": "abc", "api_key": "k", "deep": {"password": "p", "n": 3, "empty": {}},
        "sizes": (1, 2), "object": object(), "kind": int, "none": None, "token": None,
    }  # fmt: skip
    assert plain_settings(values) == {
        "tokenizer": "base", "hf_token": "(hidden)", "api_key": "(hidden)", "deep.password": "(hidden)", "deep.n": 3,
        "deep.empty": "", "sizes": "1, 2", "object": "builtins.object", "kind": "int", "none": None, "token": None,
    }  # fmt: skip
