# SPDX-License-Identifier: Apache-2.0
"""The catalogue: from a task's name to the lm-eval manager that knows it, without reading 14,000 YAML files.

lm-eval indexes every task that it ships before it gives one, which takes 10 to 25 s. Here the folder that holds the
name is found first and indexed alone; the full index is the way only for names that cannot be found so::

    name -> a file or folder called so -> a file that says `task: name` -> all files that say `tag: name`
         -> the full index -> an error

What lm-eval ships is listed, read and indexed once in a process.
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

# A tag in more folders than this is left to the full index.
_MANY = 24

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
        tagged = self._tagged(name)
        if 1 <= len(tagged) <= _MANY:
            manager = self._manager(tagged)
            _complete_tag(name, manager, [self._manager([folder]) for folder in tagged])
            if is_closed(name, manager.task_index, lambda tag: tag == name):
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
        called = _folders_by_name(self._shipped)
        yield from dict.fromkeys([*called.get(name, ()), *called.get(f"_{name}", ())])
        said = re.compile(rf"""^(?:task:|group:|tag:|\s*-)[ \t]*["']?{re.escape(name)}["']?[ \t]*$""", re.MULTILINE)
        for path, text in self._read().items():
            if name in text and said.search(text):
                yield path.parent

    def _only_in(self, folder: Path, tag: str) -> bool:
        word = re.compile(rf"(?<![\w-]){re.escape(tag)}(?![\w-])")
        naming = (path for path, text in self._read().items() if tag in text and word.search(text))
        return all(folder in path.parents for path in naming)

    def _tagged(self, name: str) -> list[Path]:
        """The folders of all files that carry a tag, or say it of their tasks."""
        word = rf"""["']?{re.escape(name)}["']?"""
        said = re.compile(
            rf"""^tag:[ \t]*{word}[ \t]*$|^tag:[ \t]*\[[^\]]*(?<![\w-]){word}(?![\w-])[^\]]*\]|"""
            rf"""^tag:[ \t]*(?:\n[ \t]*-.*)*?\n[ \t]*-[ \t]*{word}[ \t]*$""",
            re.MULTILINE,
        )
        folders = {path.parent for path, text in self._read().items() if name in text and said.search(text)}
        return sorted(f for f in folders if not any(other in f.parents for other in folders))

    def _files(self) -> tuple[Path, ...]:
        return _yaml_files(self._shipped)

    def _read(self) -> dict[Path, str]:
        return _yaml_texts(self._shipped)

    def _manager(self, folders: Sequence[Path]) -> TaskManager:
        if all(self._shipped in folder.parents for folder in folders):
            return _shipped_manager(tuple(folders))
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


@functools.lru_cache(maxsize=4)
def _yaml_files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.rglob("*.yaml")))


@functools.lru_cache(maxsize=4)
def _folders_by_name(folder: Path) -> dict[str, list[Path]]:
    """Folders by their own name and by the names of the files in them."""
    found: dict[str, list[Path]] = {}
    for path in _yaml_files(folder):
        for name in {path.stem, path.parent.name}:
            found.setdefault(name, []).append(path.parent)
    return found


@functools.lru_cache(maxsize=4)
def _yaml_texts(folder: Path) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8", errors="replace") for path in _yaml_files(folder)}


@functools.lru_cache(maxsize=64)
def _shipped_manager(folders: tuple[Path, ...]) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=False)


def _complete_tag(name: str, manager: TaskManager, parts: Sequence[TaskManager]) -> None:
    """Put together what carries a tag in several folders: a manager keeps that of the last one."""
    entry = manager.task_index.get(name)
    if entry is not None and entry.kind.name == "TAG":
        for part in parts:
            own = part.task_index.get(name)
            entry.tags.update(own.tags if own is not None and own.kind.name == "TAG" else ())


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
        from lm_eval.tasks.manager import load_yaml

        config = entry.cfg or {}
        if "include" in config and entry.yaml_path is not None:
            config = load_yaml(entry.yaml_path, resolve_func=False)
        yield {"task": name, **config}


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
