# SPDX-License-Identifier: Apache-2.0
"""Plain text tables: a heading, labels on the left, values on the right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Row = Sequence[str]


def section(title: str, rows: Sequence[Row], header: Row | None = None) -> str:
    """A titled block of aligned rows; the first column is left-aligned, the others right.

    Args:
        title: Stands above the rows, with a line under it.
        rows: Texts, all rows equally long.
        header: Names of the columns.
    """
    every = ([header] if header else []) + list(rows)
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in every
    ]
    return "\n".join([title, "-" * max(len(title), *map(len, lines)), *lines])


def size(n_bytes: float) -> str:
    """A number of bytes for people: ``4.3 MB``, ``612 kB``."""
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e6 else f"{n_bytes / 1e3:.0f} kB"


def bytes_of(path: Path) -> int:
    """Bytes of a file, or of every file in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
