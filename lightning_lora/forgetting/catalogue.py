# SPDX-License-Identifier: Apache-2.0
"""The catalogue: from a task's name to the lm-eval manager that knows it, without reading 14,000 YAML files.

lm-eval indexes every task that it ships before it gives one, which takes 10 to 25 s. Here the folder that holds the
name is found first and indexed alone; the full index is the way only for names that cannot be found so::

    name -> a file or folder called so -> a file that says `task: name` -> the full index -> an error
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import TaskError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_NAMES = re.compile(r"""^(?:task|group|tag):[ \t]*["']?([^\s"'\[#]+)""", re.MULTILINE)


class Catalogue:
    """Finds tasks by name, in the user's folders first and in lm-eval's own after that.

    Args:
        include_path: the user's folders of task YAML files; they win over lm-eval's own of the same name.
        shipped: the folder of the tasks that lm-eval ships; found by itself when None.
    """

    def __init__(self, include_path: str | Path | Sequence[str | Path] | None = None, shipped: Path | None = None):
        if shipped is None:
            import lm_eval.tasks

            shipped = Path(lm_eval.tasks.__file__).parent
        self._shipped = shipped
        self._own = _paths(include_path)
        self._managers: dict[tuple[Path, ...], TaskManager] = {}
        self._yamls: list[Path] | None = None
        self._texts: dict[Path, str] | None = None

    def find(self, name: str) -> TaskManager:
        """The manager that knows ``name`` and everything that it consists of.

        Args:
            name: a task, group or tag.

        Raises:
            TaskError: when nobody knows it, with the nearest names.
        """
        if self._own:
            manager = self._manager(self._own)
            if is_closed(name, manager.task_index, lambda tag: False):
                return manager
        for folder in self._folders(name):
            manager = self._manager([folder])
            if is_closed(name, manager.task_index, functools.partial(self._only_in, folder)):
                return manager
        if self._own or any(name in text for text in self._read().values()):
            manager = self._everything()
            if name in manager.task_index:
                return manager
        near = difflib.get_close_matches(name, self.names(), n=4, cutoff=0.6)
        raise TaskError(
            f"Task {name!r} is unknown to lm-eval"
            + (f" and to include_path {[str(p) for p in self._own]}" if self._own else "")
            + (f". Near names: {', '.join(near)}." if near else ".")
            + " Give a name that `lm_eval ls tasks` lists, the path of a YAML file, or a dict."
        )

    def names(self) -> list[str]:
        """The names that can be read off without the full index: nearly all."""
        found = {name for text in self._read().values() for name in _NAMES.findall(text)}
        for folder in self._own:
            found.update(self._manager([folder]).task_index)
        return sorted(found)

    def _folders(self, name: str) -> Iterator[Path]:
        stems = {name, f"_{name}"}
        near = (p.parent for p in self._files() if p.stem in stems or p.parent.name == name)
        yield from dict.fromkeys(near)
        said = re.compile(rf"""^(?:task:|group:|tag:|\s*-)[ \t]*["']?{re.escape(name)}["']?[ \t]*$""", re.MULTILINE)
        for path, text in self._read().items():
            if name in text and said.search(text):
                yield path.parent

    def _only_in(self, folder: Path, tag: str) -> bool:
        word = re.compile(rf"(?<![\w-]){re.escape(tag)}(?![\w-])")
        naming = (path for path, text in self._read().items() if tag in text and word.search(text))
        return all(folder in path.parents for path in naming)

    def _files(self) -> list[Path]:
        if self._yamls is None:
            self._yamls = sorted(self._shipped.rglob("*.yaml"))
        return self._yamls

    def _read(self) -> dict[Path, str]:
        if self._texts is None:
            self._texts = {p: p.read_text(encoding="utf-8", errors="replace") for p in self._files()}
        return self._texts

    def _manager(self, folders: Sequence[Path]) -> TaskManager:
        from lm_eval.tasks import TaskManager

        key = tuple(folders)
        if key not in self._managers:
            self._managers[key] = TaskManager(include_path=list(folders), include_defaults=False)
        return self._managers[key]

    def _everything(self) -> TaskManager:
        from lm_eval.tasks import TaskManager

        if () not in self._managers:
            self._managers[()] = TaskManager(include_path=self._own or None)
        return self._managers[()]


def is_closed(name: str, index: Mapping[str, Any], whole_tag: Callable[[str], bool]) -> bool:
    """Whether ``name`` is in ``index`` with everything that it consists of.

    Args:
        name: a task, group or tag.
        index: an lm-eval manager's ``task_index``.
        whole_tag: says of a tag whether every task that carries it is in the index.
    """
    entry = index.get(name)
    if entry is None:
        return False
    if entry.kind.name == "TAG":
        return whole_tag(name)
    return all(_closed_member(member, index, whole_tag) for member in _members(entry))


def leaf_configs(name: str, index: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The configurations of all tasks that ``name`` stands for, as their YAML files hold them.

    Args:
        name: a task, group or tag.
        index: an lm-eval manager's ``task_index``.
    """
    entry = index.get(name)
    if entry is None:
        return
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from leaf_configs(member, index)
    elif entry.kind.name == "GROUP":
        for member in _members(entry):
            child = member if isinstance(member, str) else member.get("task") or member.get("group")
            if isinstance(child, str) and child in index:
                yield from leaf_configs(child, index)
            elif isinstance(member, Mapping):
                yield member
    else:
        yield {"task": name, **(entry.cfg or {})}


def _members(entry: Any) -> list[Any]:
    members = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    return members if isinstance(members, list) else []


def _closed_member(member: Any, index: Mapping[str, Any], whole_tag: Callable[[str], bool]) -> bool:
    if isinstance(member, str):
        return is_closed(member, index, whole_tag)
    name = member.get("task") or member.get("group")
    return (isinstance(name, str) and is_closed(name, index, whole_tag)) or "dataset_path" in member


def _paths(include_path: str | Path | Sequence[str | Path] | None) -> list[Path]:
    given = [include_path] if isinstance(include_path, str | Path) else list(include_path or ())
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        if not path.is_dir():
            raise TaskError(f"include_path: {str(path)!r} is no folder. Give folders that hold task YAML files.")
    return paths
