# SPDX-License-Identifier: Apache-2.0
"""Write an HTML page of a finished run from what it left in its folder."""

from __future__ import annotations

from json import dumps
from typing import Any

#: What the page of help begins with.
USAGE = "FOLDER [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("folder", help="of the run: its logger's, or what its callbacks were given as dirpath")
    parser.add_argument("--out", default=None, help="file to write; report.html in the folder without")
    parser.add_argument("--title", default=None, help="of the page; the run's own without")
    parser.add_argument("--json", action="store_true", help="print JSON: the page, and which parts were found")


def run(folder: str, out: str | None, title: str | None, json: bool) -> bool:
    """Write the page; there is nothing to find.

    Raises:
        ConfigError: The folder holds nothing of a run, or several.
    """
    from pathlib import Path

    from lightning_lora.io.atomic import atomic_write
    from lightning_lora.reporting.page import render
    from lightning_lora.reporting.reading import parts_of, read_run

    path = Path(folder) / "report.html" if out is None else Path(out)
    record = read_run(Path(folder), title)
    with atomic_write(path) as part:
        part.write_text(render(record), encoding="utf-8")
    parts = parts_of(record)
    missing = ", ".join(name for name, there in parts.items() if not there)
    text = f"{path}: {record.title}" + (f"; not known of this run: {missing}" if missing else "")
    print(dumps({"page": str(path), "parts": parts}, indent=2) if json else text)  # noqa: T201
    return False
