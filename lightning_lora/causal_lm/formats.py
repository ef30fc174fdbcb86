# SPDX-License-Identifier: Apache-2.0
"""`Example`: one thing to learn from, as it stands in a file. Files and records in five formats become examples.

| format | fields of a record |
|---|---|
| ``chat`` | ``messages``: a list of ``{"role", "content"}``; ``tools`` if the template takes them |
| ``instruction`` | ``instruction``, ``input`` (may be missing or empty), ``output`` |
| ``question`` | ``question``, ``answer`` |
| ``completion`` | ``prompt``, ``completion``: joined as they are |
| ``text`` | ``text``: no prompt, every token is learned |

A file is JSON lines (``.jsonl``, ``.ndjson``), one JSON list (``.json``), or a text (``.txt``, one example). A folder
is one that ``datasets`` saved, or one with such files.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_lora.errors import ConfigError, DataError, MissingDependencyError

Format = Literal["auto", "chat", "instruction", "question", "completion", "text"]
Source = str | Path | Sequence[str | Path | Mapping[str, Any]]

#: What a record must have to be of a format, in the order in which "auto" looks: Alpaca's files have ``text`` too.
_NEEDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "question": ("question", "answer"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
_LINES, _JSON, _TEXT = (".jsonl", ".ndjson"), (".json",), (".txt",)
_SHOWN = 80  # characters of a record in an error


@dataclass(frozen=True)
class Example:
    """One thing to learn from.

    Args:
        where: The file and the line that it was read from.
        prompt: What stands before the answer where there is no chat template; empty for chat and text.
        answer: What is to be learned; of a chat its last answer.
        messages: The same as a conversation; empty for completions and texts, which no template touches.
        tools: What the template may tell the model of functions it can call.
    """

    where: str
    prompt: str
    answer: str
    messages: tuple[dict[str, Any], ...] = ()
    tools: Any = None

    @property
    def is_text(self) -> bool:
        """Whether all of it is learned and none of it asked."""
        return not self.prompt and not self.messages

    @property
    def key(self) -> str:
        """Equal for examples that say the same, wherever they stand."""
        return json.dumps([self.prompt, self.answer, self.messages, self.tools], sort_keys=True, default=str)


@dataclass
class Reading:
    """What was read, and what could not be.

    Args:
        examples: In the order of the files.
        problems: One text for each record that was passed over.
    """

    examples: list[Example] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_examples(source: Source, format: Format = "auto", skip_malformed: bool = False) -> Reading:
    """Every example of files, folders and records.

    Args:
        source: A file, a folder, or a list of files, folders and records (dicts).
        format: Which of the table above; "auto" tells it by each record's fields.
        skip_malformed: Whether a record that cannot be used is passed over and noted, rather than an error.

    Raises:
        DataError: A record is malformed (the text has its file and line), or there is no example at all.
        ConfigError: There is no such file, or it is of a kind that is not read.
    """
    if format not in get_args(Format):
        raise ConfigError(f"`format` must be one of {', '.join(get_args(Format))}, got {format!r}")
    reading = Reading()
    given = [source] if isinstance(source, str | Path) else list(source)
    for where, record in _records(given):
        try:
            if isinstance(record, DataError):
                raise record
            reading.examples.append(_example(record, format, where))
        except DataError as error:
            if not skip_malformed:
                raise
            reading.problems.append(str(error))
    if not reading.examples:
        told = [str(item) if isinstance(item, str | Path) else str(item)[:_SHOWN] for item in given]
        names = ", ".join(told) or "an empty list"
        passed = (
            f"; {len(reading.problems)} were passed over, the first: {reading.problems[0]}" if reading.problems else ""
        )
        raise DataError(f"no example in {names}{passed}")
    return reading


# Records: (where it stands, the record or why it is none)

_Records = Iterator[tuple[str, "Mapping[str, Any] | DataError"]]


def _records(given: Sequence[str | Path | Mapping[str, Any]]) -> _Records:
    for number, item in enumerate(given, start=1):
        if isinstance(item, Mapping):
            yield f"record {number}", item
        elif isinstance(item, str | Path):
            yield from _of_path(Path(item).expanduser())
        else:
            yield f"record {number}", DataError(f"record {number}: must be a dict, got {type(item).__name__}")


def _of_path(path: Path) -> _Records:
    if path.is_dir():
        yield from _of_folder(path)
    elif not path.is_file():
        raise ConfigError(f"there is no file or folder {str(path)!r} (looked from {Path.cwd()})")
    elif path.suffix in _LINES:
        yield from _of_lines(path)
    elif path.suffix in _JSON:
        yield from _of_list(path)
    elif path.suffix in _TEXT:
        text = _decoded(path.read_bytes(), str(path))
        yield str(path), text if isinstance(text, DataError) else {"text": text}
    else:
        raise ConfigError(
            f"{path}: files are read by their suffix, one of {', '.join(_LINES + _JSON + _TEXT)}; rename or convert it"
        )


def _of_folder(path: Path) -> _Records:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(json.loads((path / "dataset_dict.json").read_text()).get("splits", []))
        raise ConfigError(f"{path} holds several splits ({splits}): give the folder of one, such as {path / 'train'}")
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        if importlib.util.find_spec("datasets") is None:
            raise MissingDependencyError(
                f"{path} was saved by `datasets`, which is not installed: pip install datasets"
            )
        from datasets import load_from_disk

        for number, record in enumerate(load_from_disk(str(path)), start=1):
            yield f"{path}, row {number}", {key: value for key, value in record.items() if value is not None}
        return
    files = sorted(p for p in path.iterdir() if p.suffix in _LINES + _JSON + _TEXT)
    if not files:
        raise ConfigError(
            f"{path} holds no file of {', '.join(_LINES + _JSON + _TEXT)}, and `datasets` did not save it"
        )
    for file in files:
        yield from _of_path(file)


def _of_lines(path: Path) -> _Records:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            text = _decoded(line, where)
            if isinstance(text, DataError):
                yield where, text
            elif text.strip():
                try:
                    record = json.loads(text)
                except json.JSONDecodeError as error:
                    yield where, DataError(f"{where}, column {error.colno}: no JSON ({error.msg}): {_shown(text)}")
                    continue
                yield where, _as_record(record, where)


def _of_list(path: Path) -> _Records:
    text = _decoded(path.read_bytes(), str(path))
    if isinstance(text, DataError):
        raise text
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; one record a line is read from a file called .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg}){hint}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: must hold a JSON list of records, got {type(records).__name__}")
    for number, record in enumerate(records, start=1):
        where = f"{path}, item {number}"
        yield where, _as_record(record, where)


def _decoded(raw: bytes, where: str) -> str | DataError:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return DataError(f"{where}, byte {error.start + 1}: no UTF-8 text; convert the file to UTF-8")


def _as_record(record: Any, where: str) -> Mapping[str, Any] | DataError:
    if isinstance(record, dict):
        return record
    return DataError(f"{where}: must be an object with fields, got {type(record).__name__}: {_shown(str(record))}")


# One record


def _example(record: Mapping[str, Any], format: Format, where: str) -> Example:
    kind = format if format != "auto" else next((k for k, need in _NEEDS.items() if set(need) <= set(record)), None)
    if kind is None:
        known = "; ".join(", ".join(need) for need in _NEEDS.values())
        raise DataError(f"{where}: has the fields {', '.join(record) or '(none)'}; known are: {known}")
    missing = [name for name in _NEEDS[kind] if name not in record]
    if missing:
        raise DataError(
            f"{where}: a record of format {kind!r} needs {', '.join(_NEEDS[kind])}; {missing[0]!r} is missing"
        )
    if kind == "chat":
        return _chat(record, where)
    first, last = _NEEDS[kind][0], _NEEDS[kind][-1]
    asked, answer = _text(record, first, where), _text(record, last, where)
    if kind == "text":
        return Example(where, "", answer)
    if kind == "completion":
        return Example(where, asked, answer)
    if kind == "question":
        return Example(where, f"Question: {asked}\nAnswer:", f" {answer}", _conversation(asked, answer))
    given = _text(record, "input", where, empty=True) if record.get("input") is not None else ""
    prompt = f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"
    return Example(where, prompt, answer, _conversation(f"{asked}\n\n{given}" if given else asked, answer))


def _conversation(asked: str, answer: str) -> tuple[dict[str, Any], ...]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answer}


def _chat(record: Mapping[str, Any], where: str) -> Example:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: `messages` must be a list of turns, got {_shown(repr(messages))}")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: turn {number} must have `role` and `content`, got {_shown(repr(message))}")
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise DataError(f"{where}: `content` of turn {number} must be a text, got {_shown(repr(message))}")
    answers = [m.get("content") or "" for m in messages if m["role"] == "assistant"]
    if not answers:
        raise DataError(f"{where}: no turn has the role 'assistant', so there is nothing to learn")
    return Example(where, "", answers[-1], tuple(dict(m) for m in messages), record.get("tools"))


def _text(record: Mapping[str, Any], name: str, where: str, empty: bool = False) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` must be a text, got {type(value).__name__} {_shown(repr(value))}")
    if not empty and not value.strip():
        raise DataError(f"{where}: `{name}` is empty")
    return value


def _shown(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
