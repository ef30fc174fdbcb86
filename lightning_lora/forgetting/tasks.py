# SPDX-License-Identifier: Apache-2.0
"""Tasks: lm-eval's multiple-choice tasks by name, YAML path or dict, loaded once before training.

They stand as `lm_eval.simple_evaluate` makes them: its few-shot setting, its few-shot seed, and for each document the
examples that a pass over the whole task gives it, whichever documents a look takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import MissingDependencyError, TaskError
from lightning_lora.forgetting import sources
from lightning_lora.forgetting.catalogue import Catalogue, leaf_configs
from lightning_lora.forgetting.presets import TaskSpec, expand
from lightning_lora.ranks import notice
from lightning_lora.rng import preserve_rng

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

#: The seed that `lm_eval.simple_evaluate` gives to few-shot sampling.
FEWSHOT_SEED = 1234

#: Tasks of lm-eval's own with several questions about one passage -> the field that holds it. "_" at the end: and all
#: whose names begin so.
PASSAGES = {
    "boolq": "passage",
    "race": "article",
    "multirc": "paragraph",
    "belebele_": "flores_passage",
    "french_bench_boolqa": "passage",
    "french_bench_reading_comp": "context",
    "kobest_boolq": "paragraph",
}

#: A text of so many characters that comes in several items looks like a passage.
LONG_TEXT = 200

_TEMPLATES = ("doc_to_text", "doc_to_choice", "doc_to_target")
_SPLITS = {"test_docs": "test_split", "validation_docs": "validation_split"}  # lm-eval's method -> the task's key

#: The name under which all tasks together are reported; no task may have it.
POOLED = "pooled"


@dataclass
class LoadedTask:
    """A task whose documents are in memory.

    Args:
        name: its name, as lm-eval reports it.
        task: lm-eval's object.
        n_docs: number of documents.
        shots: the few-shot examples of each document; None for a task without.
        cluster_by: the field of a document that says what it is about (a passage), as the task's
            ``metadata: {cluster_by: ...}`` names it; None where items are independent.
    """

    name: str
    task: Task
    n_docs: int
    shots: ReplayedShots | None = None
    cluster_by: str | None = None

    def choose(self, ids: Sequence[int]) -> None:
        """Make ready for a pass over the documents ``ids`` (ascending)."""
        if self.shots is not None:
            self.shots.choose(ids)

    def group(self, doc: Mapping[str, Any]) -> str | None:
        """What a document has in common with others, as a short text; None where items are independent."""
        if self.cluster_by is None:
            return None
        value = json.dumps(doc.get(self.cluster_by), sort_keys=True, default=str)
        return hashlib.sha256(value.encode()).hexdigest()[:16]

    def groups(self) -> list[str | None] | None:
        """What each document has in common with others; None where items are independent."""
        return None if self.cluster_by is None else [self.group(doc) for doc in self.task.eval_docs]

    def gold(self, doc: Mapping[str, Any], target: Any) -> frozenset[int]:
        """Indices of the right choices of a document; empty when its label names none of them."""
        label = self.task.doc_to_text(doc) if getattr(self.task, "multiple_input", 0) else target
        choices = self.task.doc_to_choice(doc)
        labels = label if isinstance(label, list) else [label]
        indices = (choices.index(x) if isinstance(x, str) and x in choices else x for x in labels)
        return frozenset(i for i in indices if isinstance(i, int) and 0 <= i < len(choices))


class ReplayedShots:
    """Stands for a task's sampler: each document gets the examples that a pass over the whole task gives it.

    A sampler draws on from its random state, so the examples of a document depend on how many documents came before
    it. A look takes some documents only, and base and model must see one prompt.

    Args:
        per_doc: the examples of each document.
    """

    def __init__(self, per_doc: Sequence[Sequence[dict[str, Any]]]) -> None:
        self._per_doc = per_doc
        self._coming: Iterator[int] = iter(range(len(per_doc)))

    def choose(self, ids: Sequence[int]) -> None:
        """The documents whose examples are asked for next, in this order."""
        self._coming = iter(ids)

    def sample(self, n: int, *args: Any, **kwargs: Any) -> Sequence[dict[str, Any]]:
        """The ``n`` examples of the next document."""
        return self._per_doc[next(self._coming)][:n]

    def set_rnd(self, rnd: int | None) -> ReplayedShots:
        """Nothing is drawn any more."""
        return self


def load_tasks(
    specs: TaskSpec | Sequence[TaskSpec],
    num_fewshot: int | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    allow_code: Sequence[str] = (),
) -> dict[str, LoadedTask]:
    """Load tasks and hold every document of theirs; Python's random state is left as it was.

    Args:
        specs: names (tasks, groups, tags, presets), paths of YAML files, or dicts with lm-eval's task keys, mixed
            freely. Relative ``data_files`` of a YAML file are looked for beside it first.
        num_fewshot: few-shot examples in each prompt; None for what the task says. A task that says 0 keeps 0.
        include_path: folders of task YAML files, searched before lm-eval's own.
        allow_code: names of tasks that may execute what a model writes, or code that comes with their data set.

    Returns:
        The tasks by name, groups taken apart.

    Raises:
        TaskError: for an unknown task, one that is not multiple choice, documents that cannot be had or are broken.
        MissingDependencyError: when lm-eval is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "Measuring forgetting needs `lm-eval`, which is not installed: pip install 'lightning-lora[eval]'"
        )
    given = expand([specs] if isinstance(specs, str | Path | Mapping) else list(specs))
    if not given:
        raise TaskError("`tasks` is empty: give at least one task name, YAML path or dict.")
    loaded: dict[str, LoadedTask] = {}
    asked_hub = False
    with preserve_rng(), without_bars():
        catalogue = Catalogue(include_path)
        for spec in given:
            manager, entry, configs = _resolve(spec, catalogue)
            for config in configs:
                sources.refuse_code(config, allow_code)
                _refuse_other_kinds(config)
                sources.check_files(str(config.get("task")), config)
                if not asked_hub and sources.needs_hub(config):
                    sources.require_hub(str(config.get("task")))
                    asked_hub = True
            for name, task in _build(manager, entry).items():
                if name in loaded:
                    raise TaskError(f"`tasks` has {name!r} twice.")
                if name == POOLED:
                    raise TaskError(f"A task named {name!r} cannot be told from all tasks together. Rename it.")
                loaded[name] = _prepare(name, task, num_fewshot)
    return loaded


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Hide progress bars written to stderr inside; other text passes. lm-eval's own switch does not reach all."""
    before = sys.stderr
    with contextlib.redirect_stderr(_NoBars(before)):
        yield


class _NoBars(io.TextIOBase):
    def __init__(self, stream: Any) -> None:
        self.behind = getattr(stream, "behind", stream)  # where our own bars go
        self._after_bar = False

    def write(self, text: str) -> int:
        bar = "\r" in text or "\x1b[A" in text or (self._after_bar and not text.strip())
        self._after_bar = bar
        if not bar:
            self.behind.write(text)
        return len(text)

    def flush(self) -> None:
        self.behind.flush()


def _resolve(
    spec: TaskSpec, catalogue: Catalogue
) -> tuple[TaskManager, str | dict[str, Any] | Path, list[Mapping[str, Any]]]:
    """The manager that can build ``spec``, what to give it, and the configurations of the tasks inside.

    No Python of a task runs here: a file of its own is named and its functions are not imported yet.
    """
    from lm_eval.tasks import TaskManager

    if isinstance(spec, Mapping):
        if "task" not in spec:
            raise TaskError(f"A task given as a dict needs the key `task`, its name: got keys {sorted(spec)}.")
        return TaskManager(include_defaults=False), dict(spec), [spec]
    path = Path(spec).expanduser()
    if path.suffix in (".yaml", ".yml") or isinstance(spec, Path):
        return _from_yaml(path, TaskManager(include_defaults=False))
    manager = catalogue.find(str(spec))
    entry = manager.task_index[str(spec)]
    if entry.kind.name == "TASK" and any(sources.data_files(entry.cfg or {})):
        return _from_yaml(entry.yaml_path, manager)
    return manager, str(spec), list(leaf_configs(str(spec), manager.task_index))


def _from_yaml(path: Path, manager: TaskManager) -> tuple[TaskManager, Path, list[Mapping[str, Any]]]:
    if not path.is_file():
        raise TaskError(f"Task file {str(path)!r} does not exist (looked from {Path.cwd()}).")
    config = _read_yaml(path, functions=False)
    if isinstance(config.get("task"), list) or "group" in config:
        raise TaskError(
            f"Task file {path} is a group. Give its tasks' files one by one, or its folder as `include_path` and "
            f"the group's name in `tasks`."
        )
    if "task" not in config:
        raise TaskError(f"Task file {path} has no key `task`, the task's name: got keys {sorted(config)}.")
    return manager, path, [config]


def _read_yaml(path: Path, functions: bool) -> dict[str, Any]:
    """A task file with what it includes; its ``!function``s imported, which runs their modules, or left as names."""
    from lm_eval.tasks.manager import load_yaml

    try:
        config = load_yaml(path, resolve_func=functions)
    except Exception as error:
        raise TaskError(f"Task file {path} cannot be read: {type(error).__name__}: {error}") from error
    return sources.anchor_data_files(config, path.resolve().parent)


def _build(manager: TaskManager, entry: str | dict[str, Any] | Path) -> dict[str, Task]:
    if isinstance(entry, Path):
        entry = _read_yaml(entry, functions=True)
    name = entry if isinstance(entry, str) else entry["task"]
    log.info("Loading task %s", name)
    try:
        return manager.load([entry])["tasks"]
    except Exception as error:
        way_out = f" {sources.WAY_OUT}" if isinstance(error, ConnectionError) else ""
        cause = f" (from {type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
        raise TaskError(
            f"Task {name!r} cannot be loaded: {type(error).__name__}: {error}{cause}.{_hint(error)}{way_out}"
        ) from error


def _hint(error: Exception) -> str:
    """Which template or split of the task an error comes from, and what there is instead; "" for other errors."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        inside, key = frame.f_locals, frame.f_code.co_name
        if key in _TEMPLATES and isinstance(inside.get("doc"), Mapping):
            given = getattr(getattr(inside.get("self"), "config", None), key, None)
            fields = ", ".join(map(str, inside["doc"]))
            return f" Correct its `{key}` ({given!r}): the items have the fields {fields}."
        if key in _SPLITS and isinstance(getattr(inside.get("self"), "dataset", None), Mapping):
            splits = ", ".join(map(str, inside["self"].dataset))
            return f" Correct its `{_SPLITS[key]}`: the data set has the splits {splits}."
    return ""


def _refuse_other_kinds(config: Mapping[str, Any]) -> None:
    kind = config.get("output_type", "generate_until" if "class" not in config else "multiple_choice")
    if kind != "multiple_choice":
        raise TaskError(
            f"Task {config.get('task')!r} has output_type {kind!r}; forgetting is measured on multiple_choice tasks "
            f"only, where base and model can be compared item by item on the log-likelihoods of the choices."
            + ("" if "output_type" in config else " It says none: add `output_type: multiple_choice` if it is one.")
        )


def _prepare(name: str, task: Task, num_fewshot: int | None) -> LoadedTask:
    if getattr(task, "OUTPUT_TYPE", None) != "multiple_choice":
        _refuse_other_kinds({"task": name, "output_type": getattr(task, "OUTPUT_TYPE", None)})
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    docs = list(task.eval_docs)
    if not docs:
        raise TaskError(f"Task {name!r} has no documents in the split that it is evaluated on.")
    loaded = LoadedTask(name, task, len(docs), cluster_by=_cluster_field(name, task, docs))
    shots = task.get_config("num_fewshot")
    if shots:
        loaded.shots = task.sampler = _replay_shots(name, task, docs, shots)
    origin = {key: task.get_config(key) for key in ("dataset_path", "dataset_kwargs", "custom_dataset")}
    if not sources.needs_hub(origin):
        _check_documents(loaded, docs)
    _hold(task, docs)
    return loaded


def _cluster_field(name: str, task: Task, docs: list[dict[str, Any]]) -> str | None:
    """The field by which a task's items belong together."""
    field = (task.get_config("metadata") or {}).get("cluster_by")
    if field is None:
        known = next((f for task_name, f in PASSAGES.items() if _is_called(name, task_name) and f in docs[0]), None)
        if known is None and (shared := _shared_text(docs)) is not None:
            notice(
                f"Task {name!r} has items with one and the same long {shared!r}. If they belong together, give it "
                f"`metadata: {{cluster_by: {shared}}}`: without that each counts as evidence of its own, and errors, "
                f"p-values and the alarm are too sure."
            )
        return known
    if field not in docs[0]:
        raise TaskError(
            f"Task {name!r} has `metadata: {{cluster_by: {field}}}`, but its items have the fields "
            f"{', '.join(map(str, docs[0]))}."
        )
    return field


def _is_called(name: str, known: str) -> bool:
    return name.startswith(known) if known.endswith("_") else name == known


def _shared_text(docs: list[dict[str, Any]]) -> str | None:
    """A field that holds one long text in several items, and not the same in all; None without."""
    for field in docs[0]:
        texts = [text for doc in docs if isinstance(text := doc.get(field), str) and len(text) >= LONG_TEXT]
        if 1 < len(set(texts)) < len(texts):
            return str(field)
    return None


def _replay_shots(name: str, task: Task, docs: list[dict[str, Any]], shots: int) -> ReplayedShots:
    """Draw the examples of every document in order, as one pass over the task does."""
    same_split = task.fewshot_cfg.split == task.config.test_split
    try:
        drawn = [list(task.sampler.sample(n=shots, eval_doc=doc if same_split else None)) for doc in docs]
    except (AssertionError, ValueError) as error:
        raise TaskError(f"Task {name!r} cannot draw {shots} few-shot examples: {error} Lower `num_fewshot`.") from error
    return ReplayedShots(drawn)


def _check_documents(loaded: LoadedTask, docs: list[dict[str, Any]]) -> None:
    """Every document of a local task must have a prompt, choices and a right one among them."""
    for number, doc in enumerate(docs, start=1):
        try:
            loaded.task.doc_to_text(doc)
            choices = loaded.task.doc_to_choice(doc)
            target = loaded.task.doc_to_target(doc)
            gold = loaded.gold(doc, target)
            if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
                problem = f"its choices are no list of texts: {choices!r}"
            elif len(choices) < 2:
                problem = f"it has {len(choices)} choice(s); two are the least"
            else:
                problem = "" if gold else f"its label names none of its choices: `doc_to_target` gives {target!r}"
        except Exception as error:  # templates and the task's own functions fail in their own ways
            problem = f"{type(error).__name__}: {error}.{_hint(error)}"
        if problem:
            raise TaskError(
                f"Task {loaded.name!r}, item {number} of {len(docs)}: {problem}. The item: {str(doc)[:200]}"
            )


def _hold(task: Task, docs: list[dict[str, Any]]) -> None:
    """Keep the processed documents, so that a look neither reads them from disk nor processes them again."""
    split = task.get_config("test_split") or task.get_config("validation_split")
    if split is not None and isinstance(getattr(task, "dataset", None), Mapping):
        task.dataset = {split: docs}
        task.set_config(key="process_docs", value=None)
