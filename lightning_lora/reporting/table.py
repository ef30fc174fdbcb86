# SPDX-License-Identifier: Apache-2.0
"""The table of what was forgotten: on the terminal, and as text for loggers and files."""

from __future__ import annotations

import importlib.util

from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.tasks import POOLED

HEADER = ("task", "items", "base", "now", "difference", "lost", "gained", "p")


def rows_of(report: Report) -> list[tuple[str, ...]]:
    """A row for each task, for all items together, and for each target task.

    Args:
        report: a look or verdict. Accuracies in percent, differences in points with their standard error.
    """
    found = {**report.tasks, **({POOLED: report.pooled} if len(report.tasks) > 1 else {})}
    found |= {f"{name} (target)": task for name, task in report.learning.items()}
    return [
        (
            name,
            f"{task.n_items:,}",
            f"{100 * task.acc_base:.1f}",
            f"{100 * task.acc:.1f}",
            f"{100 * task.delta:+.1f} +- {100 * task.delta_se:.1f}",
            str(task.flips_lost),
            str(task.flips_gained),
            f"{task.p_value:.2g}",
        )
        for name, task in found.items()
    ]


def title_of(report: Report) -> str:
    """What a table of this report shows, in one line."""
    return (
        f"Forgetting, {report.kind} at step {report.step}: accuracy [%] and its paired difference to the base [points]"
    )


def plain_table(report: Report) -> str:
    """The table as aligned text.

    Args:
        report: a look or verdict.
    """
    every = [HEADER, *rows_of(report)]
    widths = [max(len(row[i]) for row in every) for i in range(len(HEADER))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in every
    ]
    return "\n".join([title_of(report), *lines])


def markdown_table(report: Report) -> str:
    """The table as Markdown.

    Args:
        report: a look or verdict.
    """
    lines = [HEADER, ("---",) + ("---:",) * (len(HEADER) - 1), *rows_of(report)]
    return "\n".join([f"{title_of(report)}\n", *(f"| {' | '.join(row)} |" for row in lines)])


def print_forgetting(report: Report) -> None:
    """Print the table to standard output, by rich where it is installed, else plain.

    Args:
        report: a look or verdict.
    """
    if importlib.util.find_spec("rich") is None:
        print(plain_table(report))  # noqa: T201
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title_of(report), title_justify="left", header_style="bold")
    for index, name in enumerate(HEADER):
        table.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows_of(report):
        table.add_row(*row)
    Console().print(table)
