# SPDX-License-Identifier: Apache-2.0
"""What the documentation states is what the code has: the API's names, the memory table, versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import lightning_lora
from docs.tools.dead_links import problems
from docs.tools.memory_table import GUIDES, HEAD, SHAPES, rows

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_public_name_stands_in_the_api_reference_once() -> None:
    text = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = re.findall(r"^::: lightning_lora\.(\w+)$", text, re.MULTILINE)
    assert sorted(set(shown) - {"errors"}) == sorted(lightning_lora.__all__)
    assert len(shown) == len(set(shown))


@pytest.mark.parametrize("size", [s if s == "7B" else pytest.param(s, marks=pytest.mark.slow) for s in SHAPES])
def test_memory_table_is_what_plan_says(size: str) -> None:
    page = (DOCS / "concepts/memory.md").read_text()
    assert HEAD in page
    assert rows(size) in page


def test_memory_table_has_the_sizes_of_the_guides() -> None:
    assert set(GUIDES) == set(SHAPES)


def test_versions_are_those_of_the_packaging() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [*project["dependencies"], *(n for extra in project["optional-dependencies"].values() for n in extra)]
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    rows = re.findall(
        r"^\| (\w[\w-]*)(?: \(.*?\))? \| ([\d.]+).*? \| ([\d.]+) \|$", (DOCS / "versions.md").read_text(), re.M
    )
    assert len(rows) == 7
    for name, floor, seen in rows:
        if name == "Python":
            assert project["requires-python"] == f">={floor}"
            continue
        name = {"lm-eval": "lm_eval"}.get(name, name.lower())
        assert any(n.replace("-", "_").startswith(f"{name}>={floor}") for n in needs), name
        assert tested[name].startswith(seen), name


# The look at a built site


def site(folder: Path, **pages: str) -> Path:
    for name, text in pages.items():
        (folder / name).mkdir()
        (folder / name / "index.html").write_text(text)
    return folder


def test_a_good_site_has_no_problem(tmp_path: Path) -> None:
    (tmp_path / "a.css").touch()
    one = '<link href="../a.css"><a href="../two/#here">x</a><a href="https://example.org/">y</a><a href="#">top</a>'
    assert problems(site(tmp_path, one=one, two='<h2 id="here">x</h2><a href="../one/">x</a>')) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('<a href="../three/">x</a>', "leads nowhere"),
        ('<img src="x.png">', "leads nowhere"),
        ('<a href="../two/#there">x</a>', "no such place"),
        ('<a href="#there">x</a>', "no such place"),
        ('<script src="https://example.org/x.js"></script>', "another site"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "another site"),
    ],
)
def test_a_bad_link_is_named(tmp_path: Path, text: str, problem: str) -> None:
    (found,) = problems(site(tmp_path, one=text, two='<h2 id="here">x</h2>'))
    assert problem in found
    assert found.startswith("one/index.html")


def test_an_empty_folder_is_no_site(tmp_path: Path) -> None:
    assert problems(tmp_path)


def test_support_matrix_says_of_every_cell_whether_it_is_tested() -> None:
    text = (DOCS / "support.md").read_text()
    table = text[text.index("| | one process |") : text.index("## In detail")].split("\n\n")[0]
    head, _, *lines = [line.strip("|").split("|") for line in table.splitlines()]
    states = re.compile(r"yes\b|no$|refused$|notice$|groups alone$|adapters alone$|its own form$|not used$|$")
    assert len(lines) > 20
    for name, *cells in lines:
        assert len(cells) == len(head) - 1, name
        assert all(states.match(cell.strip()) for cell in cells), name
