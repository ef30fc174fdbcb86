# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README and of the documentation is run.

python: executed for real on the small base, the blocks of a page in one namespace, the numbers of steps and
items cut down. yaml: parsed and instantiated by a real LightningCLI. sh: each command is looked up (make
targets, extras) or run as far as its configuration. Any kind of block but these and ``text`` is refused.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_lora.cli.fit_cli import FitCLI
from lightning_lora.cli.main import build_parser, main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = {"python", "yaml", "sh", "text"}

#: Upper bounds on what a block may ask for, by keyword, so that each takes seconds.
BOUNDS = {
    "max_steps": 6,
    "val_check_interval": 3,
    "every_n_steps": 3,
    "items_per_eval": 4,
    "tinit": 1,
    "tfinal": 2,
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, its kind, the line it begins at, its text."""

    page: str
    kind: str
    line: int
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
    return [
        Block(name, match.group(1), text[: match.start()].count("\n") + 1, match.group(2))
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(b, id=f"{b.page}:{b.line}") for b in BLOCKS if b.kind == kind]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    assert BLOCKS
    unknown = [f"{b.page}:{b.line} ({b.kind or 'no kind'})" for b in BLOCKS if b.kind not in KINDS]
    assert not unknown, f"not one of {sorted(KINDS)}: {unknown}"


# Python


class Bounded(ast.NodeTransformer):
    """Cuts keyword arguments down to `BOUNDS`; leaves everything else as it is written."""

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        bound = BOUNDS.get(node.arg or "")
        if bound is not None and isinstance(node.value, ast.Constant) and isinstance(node.value.value, int):
            if node.value.value > bound:
                node.value = ast.copy_location(ast.Constant(bound), node.value)
            return node
        self.generic_visit(node)
        return node


def execute(text: str, namespace: dict[str, Any], name: str) -> None:
    tree = ast.fix_missing_locations(Bounded().visit(ast.parse(text)))
    exec(compile(tree, name, "exec"), namespace)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A reader's folder: ``base/`` is the small base, ``tasks/`` the first items of its benchmark."""
    from small_base.data import MODEL_DIR

    (tmp_path / "base").symlink_to(MODEL_DIR)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_tasks(tmp_path / "tasks")
    return tmp_path


def write_tasks(folder: Path) -> None:
    """The benchmark's tasks with their first items only: the same YAML files over a shorter file of items."""
    from small_base.data import TASKS

    folder.mkdir()
    for task in TASKS:
        text = task.read_text()
        for items in sorted(task.parent.glob("*.jsonl")):
            if items.name in text:
                (folder / items.name).write_text("".join(items.read_text().splitlines(keepends=True)[:8]))
                text = re.sub(rf"\S*{re.escape(items.name)}", str(folder / items.name), text)
        (folder / task.name).write_text(text)


def readers_names() -> dict[str, Any]:
    """What the pages call the reader's own: a LightningModule and its data."""
    from demo.shakespeare import Shakespeare, ShakespeareData

    return {
        "__name__": "page",
        "MyLightningModule": Shakespeare,
        "datamodule": ShakespeareData(block_size=32, batch_size=4, val_rows=8),
    }


@pytest.mark.parametrize("page", sorted({b.page for b in BLOCKS if b.kind == "python"}))
@pytest.mark.usefixtures("project")
def test_python_blocks_run(page: str) -> None:
    namespace = readers_names()
    for block in (b for b in BLOCKS if b.page == page and b.kind == "python"):
        execute("\n" * block.line + block.text, namespace, page)


def test_bounds_cut_large_numbers_and_nothing_else() -> None:
    namespace: dict[str, Any] = {"f": lambda **kwargs: kwargs}
    execute("x = f(max_steps=2000, r=16, every_n_steps=2, g=f(items_per_eval=250))", namespace, "test")
    assert namespace["x"] == {"max_steps": 6, "r": 16, "every_n_steps": 2, "g": {"items_per_eval": 4}}


def test_broken_python_block_fails() -> None:
    with pytest.raises(ImportError):
        execute("from lightning_lora import LoRaaa", {}, "test")


# YAML


@pytest.mark.parametrize("block", of_kind("yaml"))
def test_yaml_block_makes_its_objects(block: Block, tmp_path: Path) -> None:
    (tmp_path / "block.yaml").write_text(block.text)
    if found := re.search(r"^(lora|method):(?: {class_path: lightning_lora\.(\w+))?", block.text, re.MULTILINE):
        made = FitCLI(["--config", str(tmp_path / "block.yaml"), "--trainer.accelerator=cpu"])
        own = {"LoRA", "ForgettingMonitor", "MergeOnFitEnd"} if found[1] == "lora" else {found[2]}
        assert own <= {type(c).__name__ for c in made.trainer.callbacks}
        return
    trainer = instantiated(tmp_path / "block.yaml").trainer
    for name in re.findall(r"class_path: lightning_lora\.(\w+)", block.text):
        assert name in {type(c).__name__ for c in (*trainer.callbacks, trainer.strategy)}


def instantiated(config: Path) -> LightningCLI:
    from demo.shakespeare import Shakespeare, ShakespeareData

    args = ["--config", str(config), "--trainer.accelerator=cpu"]
    return LightningCLI(Shakespeare, ShakespeareData, run=False, args=args, save_config_callback=None)


def test_broken_yaml_block_fails(tmp_path: Path) -> None:
    callback = "[{class_path: lightning_lora.LoRA, init_args: {rank: 3}}]"
    (tmp_path / "block.yaml").write_text(f"trainer: {{callbacks: {callback}}}")
    with pytest.raises(SystemExit):
        instantiated(tmp_path / "block.yaml")


# Shell


def commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def check_command(words: list[str]) -> None:
    """Run a documented command as far as it goes without doing its work.

    Raises:
        AssertionError: It would not run.
    """
    match words:
        case ["make", *targets]:
            for target in targets:
                shown = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
                assert shown.returncode == 0, shown.stderr
        case ["pip", "install", *requirements]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for requirement in (r for r in requirements if not r.startswith("-")):
                asked = re.fullmatch(r"(?:lightning-lora|\.)(?:\[([\w,]+)\])?", requirement)
                assert asked, f"pip install {requirement}: not this package"
                assert set((asked.group(1) or "all").split(",")) <= set(extras), requirement
        case ["git", "clone", *_] | ["cd", _]:
            pass
        case ["python", script, *args]:
            if not any(".help=" in arg for arg in args):
                args = [*args, "--print_config" if "cli" in script else "--help"]
            assert run_script(script, args) == 0, f"{shlex.join(words)} does not run"
        case ["unshare", "-n", "sh", "-c", text]:  # a network of its own: what runs in it is looked at
            for part in text.split(";"):
                inner = shlex.split(part)
                if inner[0] != "ip":
                    check_command(inner)
        case ["lightning-lora", "fit", *args]:
            os.chdir(ROOT)  # the pages' paths are those of a clone
            try:
                code = main(["fit", *args, "--print_config"])
            except SystemExit as stop:
                code = int(stop.code or 0)
            assert code == 0, f"{shlex.join(words)} does not run"
        case ["lightning-lora", *args]:
            try:
                build_parser().parse_args(args)
            except SystemExit as stop:
                raise AssertionError(f"{shlex.join(words)} does not run") from stop
        case _:
            raise AssertionError(f"no rule checks the command {shlex.join(words)}")


def run_script(script: str, args: list[str]) -> Any:
    """Run a script of the repository as the interpreter does, in this process; its exit code."""
    argv, folder = sys.argv, Path.cwd()
    sys.argv = [script, *args]
    sys.path.insert(0, str((ROOT / script).parent))
    os.chdir(ROOT)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = argv
        sys.path.remove(str((ROOT / script).parent))
        os.chdir(folder)
    return 0


@pytest.mark.parametrize("block", of_kind("sh"))
def test_shell_block_would_run(block: Block) -> None:
    for words in commands(block.text):
        check_command(words)


@pytest.mark.parametrize(
    "line",
    [
        "make demonstration",
        'pip install "lightning-lora[quantum]"',
        "python examples/02_lightning_cli/main.py fit --trainer.callbacks+=lightning_lora.LoRaaa",
        "lightning-lora inspect adapter --rank 3",
        "lightning-lora fit --model.base base --lora.rank 3",
        'unshare -n sh -c "ip link set lo up; frobnicate"',
        "frobnicate",
    ],
)
def test_broken_shell_block_fails(line: str) -> None:
    with pytest.raises(AssertionError):
        check_command(shlex.split(line))


# Printed output


def test_shown_table_is_what_the_demo_prints() -> None:
    """The labels of the README's table are those that the demo writes; a changed table must be shown anew."""
    demo = (ROOT / "examples/demo/summary.py").read_text()
    (shown,) = (b.text for b in BLOCKS if b.page == "README.md" and b.kind == "text")
    lines = [line for line in shown.splitlines() if line and set(line) != {"-"}]
    labels = [re.split(r"\s{2,}|:| in ", line.strip())[0] for line in lines if not line.startswith(" ")]
    from small_base.data import TASK_NAMES

    missing = [label for label in labels if label not in demo and label not in TASK_NAMES]
    assert len(labels) > 10
    assert not missing, missing


# Links


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_pages_are_in_the_site() -> None:
    listed = set(re.findall(r"[:-] ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in PAGES[1:]}


def test_python_version_is_said_once_and_the_same() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    for said in re.findall(r"Python (\d\.\d+)", (ROOT / "README.md").read_text()):
        assert f">={said}" == required
