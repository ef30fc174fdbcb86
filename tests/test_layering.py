# SPDX-License-Identifier: Apache-2.0
"""The tree tells the design: a file imports from above, never from below, heavy libraries where they belong.

Every import is read by ``ast``, also those inside functions and under ``TYPE_CHECKING``. A new file needs its
place in ``ORDER``: that is the point of the table.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_lora"

#: From the bottom up: what stands in a group, in the order in which its files may import one another.
ORDER: dict[str, tuple[str, ...]] = {
    "version": (),
    "errors": (),
    "config": (
        *("base", "lora", "ia3", "adalora", "vera"),
        *("prompt", "prefix", "bottleneck", "norms", "full", "record"),
    ),
    "rng": (),
    "ranks": (),
    "bars": (),
    "nn": (
        *("sharded", "adapter", "functional", "quantized", "adopted", "layers", "adapted", "parts"),
        *("linear", "dora", "starts", "residual", "ia3", "adalora", "vera", "saved"),
        *("tuned", "virtual", "prompt", "prefix", "bottleneck"),
        *("lowrank", "embedding", "conv", "attention", "experts", "tokens"),
    ),
    "model": (
        *(
            "inner",
            "first_inputs",
            "targets",
            *("decoder", "blocks", "stack", "norms", "whole"),
            "lora_targets",
            "methods",
            "fingerprint",
            "slots",
            "state",
            "apply",
            "unbuilt",
            "sharding",
            "tensor_parallel",
            "gradients",
            "loraplus",
            "optimizers",
            "rank_allocator",
            "orthogonality",
        ),
        *("plain", "residents", "combine", "mixed", "summary", "spectrum", "diagnosis", "depth", "eva", "vocabulary"),
    ),
    "io": (
        "atomic",
        "integrity",
        "tensor_files",
        "mapped_file",
        "checkpoint_file",
        "distributed",
        "zero_files",
        "drawn",
        "peft_rules",
        "peft_types",
        "rank_pattern",
        "names",
        "folder",
        "kinds",
        "conversion",
        "peft_config",
        "loader_rules",
        "loaders",
        "portable",
        "resident",
        "litgpt",
        "checkpoint",
        "checkpoint_adapter",
        "adapter",
        "expert_files",
        "adapter_facts",
        "resumable",
        "mixed_loader",
        "progress",
        "skeleton",
        "tied",
        "merge",
        "companions",
        "merged_folder",
        "merge_base",
        "merge_plan",
        "merge_disk",
    ),
    "forgetting": (
        "divergence",
        *("statistics", "sequential", "power", "transfer", "metrics"),
        *("arguments", "schedule", "budget", "bank", "sources", "catalogue", "presets", "offline", "tasks", "loading"),
        *("encoding", "forward", "trees", "asking", "base_cache", "identity", "language_model", "generation"),
        *("scoring", "two_models", "degeneration", "gauges"),
        *("report", "paired", "scales", "sweep", "snapshots", "remedies", "monitor", "sizes", "response"),
    ),
    "reporting": (
        *("forgetting", "learning", "summary", "diagnostics", "table", "items", "output"),
        *("curves", "record", "reading", "words", "heat", "vector", "page"),
    ),
    "strategies": (
        *("checkpoint_io", "unfinished", "state", "sharded"),
        *("single_device", "ddp", "fsdp", "model_parallel", "zero_options", "deepspeed", "registry"),
    ),
    "callbacks": (
        *("trainer_bar", "adapting", "aside", "first_batches", "lora", "ia3", "vera", "adalora"),
        *("prompt", "prefix", "bottleneck", "norms", "full"),
        *("adapter_checkpoint", "base_kl", "replay_mix"),
        *("merge_on_fit_end", "place", "ending", "forgetting_monitor"),
        *("adapter_summary", "adapter_diagnostics"),
        *("scale_sweep", "run_report"),
    ),
    "causal_lm": (
        *("formats", "encoding", "packing", "checks", "collate", "datamodule", "loss", "throughput", "module"),
    ),
    "planning": ("devices", "decoders", "architecture", "activations", "estimate", "advice", "result", "plan"),
    "cli": (
        *("output", "model_arguments", "models", "asking"),
        *(
            "completion",
            "eval",
            "sweep",
            "export",
            "inspect",
            "merge",
            "plan",
            "report",
            "fit_cli",
            "fit",
            "parser",
            "main",
        ),
    ),
}

ANYWHERE, IN_FUNCTIONS = "anywhere in the file", "inside a function"


@dataclass(frozen=True)
class Rule:
    """Where a library may be imported."""

    files: tuple[str, ...]  # prefixes of module names inside the package; "" is every file
    where: str


LIBRARIES: dict[str, Rule] = {
    "lightning": Rule(("strategies", "callbacks", "causal_lm", "cli"), ANYWHERE),
    "datasets": Rule(("causal_lm.formats",), IN_FUNCTIONS),
    "liger_kernel": Rule(("causal_lm.module",), IN_FUNCTIONS),
    "pytorch_lightning": Rule((), ANYWHERE),
    "lightning_fabric": Rule((), ANYWHERE),
    "bitsandbytes": Rule(("nn.quantized",), IN_FUNCTIONS),
    "deepspeed": Rule(("nn.sharded", "strategies.deepspeed"), IN_FUNCTIONS),
    "lm_eval": Rule(("forgetting",), IN_FUNCTIONS),
    "transformers": Rule(("",), IN_FUNCTIONS),
    "matplotlib": Rule(("reporting",), IN_FUNCTIONS),
    "jinja2": Rule(("reporting",), IN_FUNCTIONS),
    "jsonargparse": Rule(("cli",), ANYWHERE),
    "peft": Rule((), ANYWHERE),
    "accelerate": Rule((), ANYWHERE),
}


@dataclass(frozen=True)
class Import:
    """One imported module, and where in the file it is imported."""

    target: str  # dotted, absolute
    line: int
    in_function: bool
    for_typing: bool  # under `if TYPE_CHECKING:`


def imports_of(source: str, module: str, is_package: bool) -> list[Import]:
    """Every import in ``source``, which is the text of the module ``lightning_lora.<module>``."""
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, for_typing: bool) -> None:
        for target in _targets(node, module, is_package):
            found.append(Import(target, getattr(node, "lineno", 0), in_function, for_typing))
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for child in node.body:
                visit(child, in_function, True)
            for child in node.orelse:
                visit(child, in_function, for_typing)
            return
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, for_typing)

    visit(ast.parse(source), False, False)
    return found


def _targets(node: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """The dotted names that one statement imports; ``from package import name`` gives ``package.name``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = [PACKAGE, *module.split(".")] if module else [PACKAGE]
        if node.level:
            keep = len(parts) - node.level + (1 if is_package else 0)
            base = ".".join(parts[:keep] + ([node.module] if node.module else []))
        else:
            base = node.module or ""
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and _is_dynamic_import(node.func):
        yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _is_dynamic_import(func: ast.expr) -> bool:
    name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
    return name in {"import_module", "__import__"}


def _is_type_checking(test: ast.expr) -> bool:
    return (test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")) == "TYPE_CHECKING"


def place(module: str) -> tuple[int, int]:
    """Where a module of the package stands: (group, file in it). A group's ``__init__`` is its last file.

    Raises:
        LookupError: If the table has no place for it.
    """
    head, _, rest = module.partition(".")
    if head not in ORDER:
        raise LookupError(f"{PACKAGE}.{module} has no place in ORDER (tests/test_layering.py): give it one")
    files = ORDER[head]
    if not rest:
        return list(ORDER).index(head), len(files)
    file = rest.split(".")[0]
    if file not in files:
        raise LookupError(f"{PACKAGE}.{module} has no place in ORDER[{head!r}] (tests/test_layering.py): give it one")
    return list(ORDER).index(head), files.index(file)


def violations(module: str, source: str, is_package: bool, known: set[str]) -> list[str]:
    """What a file imports against the rules, as sentences. ``known`` are the package's modules."""
    said = []
    for imported in imports_of(source, module, is_package):
        root = imported.target.split(".")[0]
        if root == PACKAGE:
            problem = _against_the_layers(module, imported, known)
        elif root in LIBRARIES:
            problem = _misplaced_library(module, imported, LIBRARIES[root])
        else:
            problem = None
        if problem:
            said.append(f"{PACKAGE}.{module}, line {imported.line}: {problem}")
    return said


def _against_the_layers(module: str, imported: Import, known: set[str]) -> str | None:
    target = imported.target.removeprefix(PACKAGE).removeprefix(".")
    while target and target not in known:  # `from package.file import name` names something inside the file
        target = target.rpartition(".")[0]
    if not target:
        return f"imports {imported.target}: import from the file that defines it, not from the top"
    if target == module:
        return None
    if place(target) >= place(module):
        return f"imports {PACKAGE}.{target}, which stands below it or beside it later"
    return None


def _misplaced_library(module: str, imported: Import, rule: Rule) -> str | None:
    if not any(module == f or module.startswith(f + ".") or f == "" for f in rule.files):
        return f"imports {imported.target}, allowed only in {', '.join(rule.files) or 'no file'}"
    if rule.where == IN_FUNCTIONS and not (imported.in_function or imported.for_typing):
        return f"imports {imported.target} at module level, allowed only {rule.where}"
    return None


def package_files() -> dict[str, Path]:
    """Module name inside the package -> its file; not the package's own ``__init__``, which names all."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        name = ".".join(p for p in parts if p != "__init__")
        if name and name != "__main__":
            files[name] = path
    return files


FILES = package_files()


@pytest.mark.parametrize("module", FILES)
def test_file_imports_only_from_above(module: str) -> None:
    path = FILES[module]
    place(module)
    said = violations(module, path.read_text(), path.name == "__init__.py", set(FILES))
    assert not said, "\n".join(said)


def test_imports_make_no_circle() -> None:
    """Follows from the order, and is checked apart from it: a wrong table must not hide a circle."""
    edges = {m: {_module_in(i.target) for i in _package_imports(m)} - {None, m} for m in FILES}
    for _ in range(len(edges)):
        leaves = {m for m, out in edges.items() if not out & set(edges)}
        edges = {m: out for m, out in edges.items() if m not in leaves}
    assert not edges, f"a circle among {sorted(edges)}"


def _package_imports(module: str) -> list[Import]:
    path = FILES[module]
    found = imports_of(path.read_text(), module, path.name == "__init__.py")
    return [i for i in found if i.target.split(".")[0] == PACKAGE]


def _module_in(target: str) -> str | None:
    name = target.removeprefix(PACKAGE).removeprefix(".")
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name or None


# The check itself must be able to fail: each text below breaks one rule, the last group breaks none.

KNOWN = {"errors", "config", "nn", "nn.functional", "nn.linear", "nn.quantized", "io", "io.adapter"}
KNOWN |= {"callbacks", "callbacks.lora", "forgetting.scoring", "reporting.forgetting"}

BROKEN = {
    "upwards": ("nn.linear", "from lightning_lora.io.adapter import save"),
    "upwards, relative": ("nn.linear", "from ..io import adapter"),
    "upwards, inside a function": ("config", "def f():\n    from lightning_lora.nn.linear import LoRALinear"),
    "upwards, for typing": (
        "config",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from lightning_lora.nn import linear",
    ),
    "upwards, dynamic": ("config", "import importlib\nimportlib.import_module('lightning_lora.nn.linear')"),
    "later file of its group": ("nn.functional", "from lightning_lora.nn.linear import LoRALinear"),
    "its own group's __init__": ("nn.linear", "from lightning_lora.nn import LoRALinear"),
    "from the top": ("callbacks.lora", "from lightning_lora import LoRA"),
    "lightning in io": ("io.adapter", "from lightning.pytorch import Trainer"),
    "the old lightning": ("callbacks.lora", "import pytorch_lightning as pl"),
    "bitsandbytes at module level": ("nn.quantized", "import bitsandbytes.functional as F"),
    "bitsandbytes elsewhere": ("nn.linear", "def f():\n    import bitsandbytes"),
    "lm_eval elsewhere": ("callbacks.lora", "def f():\n    from lm_eval import evaluate"),
    "lm_eval in a class body": (
        "forgetting.scoring",
        "class A:\n    from lm_eval.api.model import TemplateLM",
    ),
    "transformers at module level": (
        "io.adapter",
        "try:\n    import transformers\nexcept ImportError:\n    pass",
    ),
    "matplotlib at module level": ("reporting.forgetting", "from matplotlib import pyplot"),
    "peft": ("io.adapter", "def f():\n    import peft"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_check_finds_a_broken_rule(case: str) -> None:
    module, source = BROKEN[case]
    assert violations(module, source, False, KNOWN), case


ALLOWED = {
    "downwards": (
        "callbacks.lora",
        "from lightning_lora.nn.linear import LoRALinear\nimport lightning.pytorch as pl",
    ),
    "earlier file of its group": ("nn.linear", "from lightning_lora.nn.functional import lora_linear"),
    "earlier file, relative": ("nn.linear", "from .functional import lora_linear"),
    "bitsandbytes in a function": ("nn.quantized", "def f():\n    import bitsandbytes"),
    "transformers for typing": (
        "io.adapter",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformers",
    ),
    "plain libraries": ("errors", "import torch, math, safetensors.torch"),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_check_allows_what_is_right(case: str) -> None:
    module, source = ALLOWED[case]
    assert violations(module, source, False, KNOWN) == []


def test_check_refuses_a_file_without_a_place() -> None:
    for module in ("nn.novelty", "novelty"):
        with pytest.raises(LookupError, match="has no place"):
            place(module)


def test_table_names_each_file_once() -> None:
    for group, files in ORDER.items():
        assert len(set(files)) == len(files), group
    places = [place(f"{g}.{f}") for g, fs in ORDER.items() for f in fs]
    assert all(a < b for a, b in itertools.pairwise(places))
