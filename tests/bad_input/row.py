# SPDX-License-Identifier: Apache-2.0
"""A row of the table in docs/bad_input.md, and what its tests share."""

from __future__ import annotations

import ctypes
import json
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "bad_input.md"


@dataclass(frozen=True)
class Row:
    """What a row of the page promises; `make` is the test's own way to bring the input about."""

    name: str
    error: str  # name of the class; "-" where nothing is raised
    says: str  # pieces of the message, with " ... " between them
    make: Callable[..., Any] = lambda *_: None

    def check(self, kind: str, text: str, file: object) -> None:
        """See that an error is the promised one and names the file."""
        assert kind == self.error, text
        assert str(file) in text
        place = 0
        for piece in self.says.split(" ... "):
            assert piece in text[place:], f"{piece!r} is not in {text!r}"
            place = text.index(piece, place)


def page_rows() -> dict[str, tuple[str, str]]:
    """Error and message of each row of the page, by its name."""
    rows = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) == 5:
            rows[cells[0].strip("`")] = (cells[2].strip("`"), cells[3])
    return rows


def raised(work: Callable[[], object], error: str) -> tuple[str, str]:
    """Name and text of what `work` raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the row says which)
        work()
    return type(caught.value).__name__, str(caught.value)


def forked(work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> tuple[int, str, str]:
    """Do `work` in a child: its exit status, and name and text of what it raised. Its output goes nowhere."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        kind, text = "-", ""
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            torch.set_num_threads(1)  # the parent's threads are not here
            prepare()
            work()
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        finally:
            os.write(write, json.dumps([kind, text]).encode()[:60000])
            os._exit(0)
    os.close(write)
    told = b"".join(iter(lambda: os.read(read, 65536), b""))
    os.close(read)
    _, status = os.waitpid(pid, 0)
    kind, text = json.loads(told) if told else ("killed", "")
    return status, kind, text


def without_rights() -> None:
    """Be an ordinary user for the files of this process's own: root without its capabilities."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if os.geteuid() == 0 and ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError("capset failed")


def full_disk(room: int) -> Callable[[], None]:
    """No file of this process may grow beyond `room` bytes: the write that does so fails, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
