# SPDX-License-Identifier: Apache-2.0
"""The table of a model's counts on the terminal: by rich where it is installed, else plain."""

from __future__ import annotations

import importlib.util

from lightning_lora.model.summary import HEADER, Summary, row_cells


def print_summary(summary: Summary) -> None:
    """Print a summary to standard output.

    Args:
        summary: What `summarize` found.
    """
    if importlib.util.find_spec("rich") is None:
        print(summary)  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if summary.rows:
        table = Table(header_style="bold")
        for index, title in enumerate(HEADER):
            table.add_column(title, justify="left" if index < 2 else "right", overflow="fold")
        for row in summary.rows:
            table.add_row(*row_cells(row))
        console.print(table)
    console.print("\n".join(summary.lines()), highlight=False)
