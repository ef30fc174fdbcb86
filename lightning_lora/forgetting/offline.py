# SPDX-License-Identifier: Apache-2.0
"""Offline: an official task over files of one's own, for machines that cannot reach the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lora.errors import MissingDependencyError, TaskError
from lightning_lora.forgetting.catalogue import Catalogue
from lightning_lora.io.atomic import atomic_write

#: What reads a file, by its suffix.
READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}

# What `save_to_disk` writes beside the documents.
_BESIDE = ("dataset_info.json", "state.json")


def write_offline_task(
    task: str,
    files: Mapping[str, str | Path],
    path: str | Path,
    include_path: str | Path | None = None,
) -> Path:
    """Write a YAML file by which lm-eval reads a task's documents from local files; prompts and metrics stay its own.

    Args:
        task: name of one task that lm-eval ships, such as "arc_easy"; of a group, name its tasks one by one.
        files: split -> file (JSON lines, parquet, CSV, arrow) or folder of such files, as `datasets` saves a split:
            ``load_dataset(...)["test"].to_parquet("test.parquet")``, or ``save_to_disk``. All of one kind.
        path: the YAML file to write. Give it in ``tasks``.
        include_path: a folder of task YAML files of one's own, searched first.

    Returns:
        The file's path.

    Raises:
        TaskError: for an unknown task or a group, files that do not exist or are of several kinds, and when the split
            on which the task is evaluated, or from which its few-shot examples come, is missing.
        MissingDependencyError: when lm-eval is not installed.
    """
    try:
        from lm_eval.tasks.manager import load_yaml
    except ImportError as error:
        raise MissingDependencyError(
            "Tasks are lm-eval's, which is not installed: pip install 'lightning-lora[eval]'"
        ) from error
    import yaml

    entry = Catalogue(include_path).find(task).task_index[task]
    if entry.kind.name != "TASK" or entry.yaml_path is None:
        raise TaskError(f"{task!r} is a {entry.kind.name.lower()}: write a file for each of its tasks.")
    official = load_yaml(entry.yaml_path, resolve_func=False)
    found = {split: _files(split, Path(given).expanduser().resolve()) for split, given in files.items()}
    readers = sorted({READERS[file.suffix] for own in found.values() for file in own})
    if len(readers) != 1:
        raise TaskError(f"The files of {task!r} are of {len(readers)} kinds ({', '.join(readers)}): use one kind.")
    _check_splits(task, official, found)
    absent = [key for key in ("training_split", "validation_split", "fewshot_split") if official.get(key) not in found]
    config = {
        "include": str(Path(entry.yaml_path).resolve()),
        "task": task,
        "dataset_path": readers[0],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: [str(file) for file in own] for split, own in found.items()}},
        **{key: None for key in absent if official.get(key) is not None},  # lm-eval reads every split that is named
    }
    target = Path(path).expanduser()
    with atomic_write(target) as part:
        part.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return target


def _files(split: str, given: Path) -> list[Path]:
    own = sorted(p for p in given.iterdir() if p.suffix in READERS) if given.is_dir() else [given]
    own = [p for p in own if p.name not in _BESIDE]
    if not own or not all(p.is_file() for p in own):
        raise TaskError(f"Split {split!r}: there is no file at {given}.")
    if any(p.suffix not in READERS for p in own):
        raise TaskError(f"Split {split!r}: {given} is none of {', '.join(READERS)}.")
    return own


def _check_splits(task: str, config: Mapping[str, Any], found: Mapping[str, list[Path]]) -> None:
    evaluated = config.get("test_split") or config.get("validation_split")
    needed = {evaluated, config.get("fewshot_split") if config.get("num_fewshot") else None} - {None}
    missing = sorted(str(split) for split in needed if split not in found)
    if missing:
        raise TaskError(
            f"{task!r} needs the split(s) {', '.join(missing)}: got files for {', '.join(found) or 'none'}. "
            f"Splits that it knows: {', '.join(str(config[k]) for k in config if k.endswith('_split') and config[k])}."
        )
