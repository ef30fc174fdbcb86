# SPDX-License-Identifier: Apache-2.0
"""Sources: where a task's documents come from, checked before a library spends minutes on finding out."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_lora.errors import TaskError

_ONE_A_LINE = "Write one JSON object a line, one item each."

# Builders that `datasets` carries with it: they read files and need no hub.
_FILE_BUILDERS = {"json", "csv", "parquet", "arrow", "text", "pandas", "xml"}

#: How long the one question to the hub may take [s].
PROBE_SECONDS = 8.0

WAY_OUT = (
    "To work without the hub, write a YAML file with `dataset_path: json` and `dataset_kwargs: {data_files: "
    "{test: items.jsonl}}` (and `include:` the original task's YAML to keep its prompts), and give its path in "
    "`tasks`; or set HF_HUB_OFFLINE=1 when the data set is already in this machine's Hugging Face cache. A tokenizer "
    "given by its name on the hub cannot be had either: give its local folder as `tokenizer`."
)


def needs_hub(config: Mapping[str, Any]) -> bool:
    """Whether a task's documents come from the Hugging Face hub.

    Args:
        config: the task's configuration, as its YAML holds it.
    """
    path = config.get("dataset_path")
    if not isinstance(path, str) or config.get("custom_dataset") is not None:
        return False
    if path in _FILE_BUILDERS:
        return any(name.startswith("hf://") for name in data_files(config))
    return not os.path.exists(path)


def data_files(config: Mapping[str, Any]) -> Iterator[str]:
    """The names under ``dataset_kwargs.data_files`` (a string, a list, or either of them for each split)."""
    found = (config.get("dataset_kwargs") or {}).get("data_files")
    for entry in found.values() if isinstance(found, Mapping) else [found]:
        yield from [entry] if isinstance(entry, str) else (entry or [])


def anchor_data_files(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The configuration with relative ``data_files`` made absolute where such a file lies in ``folder``.

    `datasets` reads a relative name from the working folder, which is seldom where the YAML file is.

    Args:
        config: the task's configuration.
        folder: folder of the YAML file that it was read from.
    """

    def anchor(entry: Any) -> Any:
        if isinstance(entry, Mapping):
            return {split: anchor(value) for split, value in entry.items()}
        if isinstance(entry, list | tuple):
            return [anchor(value) for value in entry]
        if isinstance(entry, str) and "://" not in entry and any(folder.glob(entry) if entry[:1] != "/" else ()):
            return str(folder / entry)
        return entry

    kwargs = config.get("dataset_kwargs") or {}
    if not kwargs.get("data_files"):
        return dict(config)
    return {**config, "dataset_kwargs": {**kwargs, "data_files": anchor(kwargs["data_files"])}}


def check_files(task: str, config: Mapping[str, Any]) -> None:
    """Read the JSON files of a local task once, so that a broken one is named with its line.

    Args:
        task: name of the task, for the message.
        config: its configuration.

    Raises:
        TaskError: for a file that is missing, empty, or no JSON.
    """
    if config.get("dataset_path") not in _FILE_BUILDERS:
        return
    kwargs = config.get("dataset_kwargs") or {}
    elsewhere = kwargs.get("data_dir") or config.get("custom_dataset") or config.get("include")
    if not any(data_files(config)) and not elsewhere:
        raise TaskError(
            f"Task {task!r} has `dataset_path: {config['dataset_path']}` and names no file. Add `dataset_kwargs: "
            f"{{data_files: {{test: items.jsonl}}}}`; without it every file of the working folder would be read."
        )
    for name in data_files(config):
        if "://" in name or any(c in name for c in "*?["):
            continue
        path = Path(name).expanduser()
        if not path.is_file():
            raise TaskError(
                f"Task {task!r}: its file {name!r} does not exist (looked beside the task's YAML file and in "
                f"{Path.cwd()}). Correct `data_files`, or give an absolute path."
            )
        if config["dataset_path"] == "json" and path.suffix in (".json", ".jsonl"):
            _check_json(task, path)


def _check_json(task: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise TaskError(f"Task {task!r}: {path} is empty. {_ONE_A_LINE}")
    try:
        value = json.loads(text)  # one document: a list, an object, or a file of a single line
    except json.JSONDecodeError:
        pass
    else:
        if not value:
            raise TaskError(f"Task {task!r}: {path} holds no item ({text.strip()[:20]}). {_ONE_A_LINE}")
        if not isinstance(value, dict | list):
            raise TaskError(f"Task {task!r}: {path} is a JSON {type(value).__name__}. {_ONE_A_LINE}")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(
                f"Task {task!r}: {path}, line {number} is no JSON ({error.msg}, column {error.colno}): "
                f"{line.strip()[:80]!r}. Write one JSON object a line."
            ) from error
        if not isinstance(value, dict):
            raise TaskError(
                f"Task {task!r}: {path}, line {number} is a JSON {type(value).__name__}, not an object: "
                f"{line.strip()[:80]!r}. Write one JSON object a line, with the fields that the task's templates use."
            )


def refuse_code(config: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Refuse a task that executes what a model writes, or a data set's own code, unless it was named.

    Args:
        config: the task's configuration, with what it includes.
        allowed: names of tasks that may.

    Raises:
        TaskError: for one that is not among them.
    """
    name, path = str(config.get("task")), str(config.get("dataset_path") or "")
    kwargs = config.get("dataset_kwargs") or {}
    runs = {
        "what the model writes (`unsafe_code`)": bool(config.get("unsafe_code")),
        "its data set's own code (`trust_remote_code`)": bool(kwargs.get("trust_remote_code")),
        f"its data set's own code ({path})": path.endswith(".py") or os.path.isfile(f"{path}/{Path(path).name}.py"),
    }
    for what, does in runs.items():
        if does and name not in allowed:
            raise TaskError(
                f"Task {name!r} executes {what} on this machine, with your rights. If you have read it and want that, "
                f"name it: `allow_code=[{name!r}]`."
            )


def require_hub(task: str) -> None:
    """Ask the hub once whether it answers; a data library would retry for each task.

    Args:
        task: the first task that needs it, for the message.

    Raises:
        TaskError: when it does not answer.
    """
    problem = hub_problem()
    if problem is not None:
        raise TaskError(f"Task {task!r} needs a data set from the hub: {problem}. {WAY_OUT}")


def hub_problem() -> str | None:
    """What keeps the hub from answering within `PROBE_SECONDS`, or None when it answers.

    Nothing is asked when HF_HUB_OFFLINE is set: then the cache decides.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    outcome: list[Exception | None] = []
    # A name server that does not answer holds a thread far beyond any timeout of the request.
    probe = threading.Thread(target=lambda: outcome.append(_ask(constants.ENDPOINT)), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    problem = outcome[0] if outcome else TimeoutError(f"no answer within {PROBE_SECONDS:.0f} s")
    if problem is None:
        return None
    return f"{constants.ENDPOINT} cannot be reached ({type(problem).__name__}: {problem})"


def _ask(endpoint: str) -> Exception | None:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=PROBE_SECONDS / 2)
    except Exception as error:  # whatever the client library calls "not reachable"
        return error
    return None
