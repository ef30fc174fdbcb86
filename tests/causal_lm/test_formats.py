# SPDX-License-Identifier: Apache-2.0
"""Reading: every format, and every way in which a file can be broken, with the line that is to be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.causal_lm.formats import read_examples
from lightning_lora.errors import ConfigError, DataError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
FORMATS: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "instruction": {"instruction": "Add.", "input": "1 1", "output": "2"},
    "question": {"question": "1 + 1?", "answer": "2"},
    "completion": {"prompt": "1 + 1 =", "completion": " 2"},
    "text": {"text": "One and one are two."},
}


def lines(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_is_told_by_its_fields(name: str, tmp_path: Path) -> None:
    (told,) = read_examples(lines(tmp_path / "a.jsonl", FORMATS[name])).examples
    (said,) = read_examples([FORMATS[name]], name).examples  # type: ignore[arg-type]
    assert told.key == said.key
    assert told.where == f"{tmp_path}/a.jsonl, line 1"
    assert told.answer.strip() in {"2", "ho", "One and one are two."}
    assert told.is_text == (name == "text")


def test_instruction_with_and_without_input() -> None:
    with_input, without = read_examples([FORMATS["instruction"], {"instruction": "Add.", "output": "2"}]).examples
    assert "1 1" in with_input.prompt
    assert "Input" not in without.prompt
    assert with_input.messages[0]["content"] == "Add.\n\n1 1"
    alpaca = {**FORMATS["instruction"], "text": "all of it"}  # its files have this field too
    assert read_examples([alpaca]).examples[0].key == with_input.key


def test_files_folders_and_records(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    lines(tmp_path / "b.jsonl", FORMATS["question"], "", FORMATS["text"])
    (tmp_path / "c.json").write_text(json.dumps([FORMATS["completion"]]))
    (tmp_path / "d.txt").write_text("a text\nof two lines")
    (tmp_path / "e.png").write_bytes(b"\x89")
    assert [e.answer for e in read_examples(tmp_path).examples] == [
        " 2", "One and one are two.", " 2", "a text\nof two lines",
    ]  # fmt: skip
    assert len(read_examples([str(tmp_path / "b.jsonl"), tmp_path / "c.json", CHAT]).examples) == 4
    saved = Dataset.from_list([FORMATS["instruction"], {"instruction": "Say.", "input": None, "output": "so"}])
    saved.save_to_disk(tmp_path / "saved")
    first, second = read_examples(tmp_path / "saved").examples
    assert (first.answer, second.answer) == ("2", "so")
    assert second.where.endswith("saved, row 2")
    DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ConfigError, match=r"several splits \(train\).*splits/train"):
        read_examples(tmp_path / "splits")
    assert len(read_examples(tmp_path / "splits" / "train").examples) == 2


BROKEN: dict[str, tuple[Any, str]] = {
    "half a line": ('{"text": "a', r"a\.jsonl, line 3, column \d+: no JSON \(Invalid control"),
    "no object": ("[1, 2]", "line 3: must be an object with fields, got list"),
    "other fields": ({"q": "a", "a": "b"}, r"line 3: has the fields q, a; known are: messages; instruction, output"),
    "a number": ({"question": "1 + 1?", "answer": 2}, "line 3: `answer` must be a text, got int 2"),
    "nothing said": ({"instruction": "Add.", "output": " "}, "line 3: `output` is empty"),
    "no turns": ({"messages": []}, "line 3: `messages` must be a list of turns"),
    "a turn without role": ({"messages": [{"content": "a"}]}, "line 3: turn 1 must have `role` and `content`"),
    "a turn without text": ({"messages": [{"role": "user", "content": 1}]}, "line 3: `content` of turn 1 must be"),
    "nobody answers": ({"messages": [{"role": "user", "content": "a"}]}, "line 3: no turn has the role 'assistant'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_line_is_named_and_can_be_passed_over(case: str, tmp_path: Path) -> None:
    record, said = BROKEN[case]
    path = lines(tmp_path / "a.jsonl", FORMATS["text"], "", record, FORMATS["text"])
    with pytest.raises(DataError, match=said):
        read_examples(path)
    reading = read_examples(path, skip_malformed=True)
    assert [e.where[-6:] for e in reading.examples] == ["line 1", "line 4"]
    assert len(reading.problems) == 1


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2, byte 11: no UTF-8"):
        read_examples(path)
    assert len(read_examples(path, skip_malformed=True).examples) == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("text", ["", "\n\n"])
def test_empty_file_is_an_error(name: str, text: str, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)  # a path is told whole
    folder.mkdir()
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=rf"no example in .*{name}"):
        read_examples(folder / name)


def test_broken_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    lines(path, FORMATS["text"], FORMATS["text"])
    with pytest.raises(DataError, match=r"line 2.*no JSON \(Extra data\); one record a line"):
        read_examples(path)
    path.write_text('{"text": "a"}')
    with pytest.raises(DataError, match="must hold a JSON list of records, got dict"):
        read_examples(path)
    path.write_text('[{"text": "a"}, 3]')
    with pytest.raises(DataError, match="item 2: must be an object"):
        read_examples(path)


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file or folder 'nowhere'"):
        read_examples("nowhere")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ConfigError, match=r"by their suffix, one of \.jsonl"):
        read_examples(tmp_path / "a.csv")
    with pytest.raises(ConfigError, match="holds no file"):
        read_examples(tmp_path)
    with pytest.raises(ConfigError, match="`format` must be one of"):
        read_examples([CHAT], "xml")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="'completion' is missing"):
        read_examples([{"prompt": "a"}], "completion")
    with pytest.raises(DataError, match="record 1: must be a dict, got int"):
        read_examples([3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="1 were passed over, the first: record 1"):
        read_examples([{}], skip_malformed=True)
