# SPDX-License-Identifier: Apache-2.0
"""``import lightning_lora`` is cheap: it brings no optional library that Lightning itself has not brought."""

from __future__ import annotations

import ast
import importlib
import importlib.resources
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What the package never imports by itself, whatever is installed.
NEVER = ("bitsandbytes", "lm_eval", "peft", "jsonargparse", "datasets", "torchdata")
#: What `import lightning.pytorch` may bring (through torchmetrics): ours only if it was not there before.
NOT_BY_US = ("transformers", "matplotlib", "rich")

PROBE = """
import sys
import lightning.pytorch
before = set(sys.modules)
{statement}
new = {{m.partition(".")[0] for m in set(sys.modules) - before}}
every = {{m.partition(".")[0] for m in sys.modules}}
print(",".join(sorted(every & set({never!r}) | new & set({not_by_us!r}))))
"""


def brought_by(statement: str) -> set[str]:
    """The forbidden libraries that a fresh interpreter has loaded after ``statement``."""
    code = PROBE.format(statement=statement, never=NEVER, not_by_us=NOT_BY_US)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert result.returncode == 0, result.stderr
    return set(filter(None, result.stdout.strip().splitlines()[-1].split(","))) if result.stdout.strip() else set()


def test_import_brings_no_optional_library() -> None:
    assert brought_by("import lightning_lora") == set()


def test_every_public_name_brings_no_optional_library() -> None:
    assert brought_by("import lightning_lora\nfor n in lightning_lora.__all__: getattr(lightning_lora, n)") == set()


def test_probe_can_fail() -> None:
    assert brought_by("import lightning_lora, jsonargparse") == {"jsonargparse"}


def test_public_names_are_importable_and_listed() -> None:
    package = importlib.import_module("lightning_lora")
    assert {"LoRA", "AdapterCheckpoint", "ForgettingMonitor", "MergeOnFitEnd"} <= set(package.__all__)
    assert sorted(set(package.__all__)) == sorted(package.__all__), "a name stands twice in __all__"
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))


def test_type_checkers_and_the_reference_see_every_public_name() -> None:
    package = importlib.import_module("lightning_lora")
    source = Path(str(package.__file__)).read_text()
    blocks = [n for n in ast.parse(source).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    lines = [line for block in blocks for line in block.body if isinstance(line, ast.ImportFrom)]
    seen = {alias.name for line in lines for alias in line.names}
    assert seen == set(package.__all__) - {"__version__"}


def test_unknown_public_name_is_an_attribute_error() -> None:
    package = importlib.import_module("lightning_lora")
    with pytest.raises(AttributeError, match="LoRaa"):
        _ = package.LoRaa


def test_py_typed_is_shipped() -> None:
    assert (importlib.resources.files("lightning_lora") / "py.typed").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["lightning_lora"]


def test_the_version_is_the_same_wherever_it_stands() -> None:
    import lightning_lora

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert lightning_lora.__version__ == project["project"]["version"]


def test_extra_all_has_every_users_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == set(extras) - {"all", "dev", "docs"}


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x and not x.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert len(pinned) == len(lines)
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {_name(requirement) for requirement in wanted} - {"lightning_lora"}
    assert names <= {_name(p) for p in pinned}, names - {_name(p) for p in pinned}


def _name(requirement: str) -> str:
    """The normalised name at the start of a requirement."""
    head = "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]
    return head.lower().replace("-", "_").replace(".", "_")
