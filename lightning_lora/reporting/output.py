# SPDX-License-Identifier: Apache-2.0
"""Output: what a run's looks at forgetting leave behind, in a folder and with loggers, in the form each takes."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.scoring import ItemScore
from lightning_lora.io.atomic import atomic_write
from lightning_lora.ranks import notice, rank_and_world
from lightning_lora.reporting.forgetting import pixels, plot_forgetting
from lightning_lora.reporting.items import clear_items, item_rows, write_items
from lightning_lora.reporting.learning import places_of, plot_run
from lightning_lora.reporting.table import HEADER, markdown_table, print_forgetting, rows_of

FILE = "forgetting.json"


class ForgettingOutput:
    """Writes on rank 0 what the looks of a run found; other ranks write nothing.

    ::

        folder/forgetting.json   every report
        folder/forgetting.png    each task over steps, where matplotlib is installed
        folder/learning.png      what was learned against what was forgotten, where that was measured too
        folder/items/...         a file for each look, a row for each item

    Args:
        metric: of the run's validation, for the learning axis where there are no target tasks.
    """

    def __init__(self, metric: str = "val_loss") -> None:
        self.metric = metric
        #: Values of the metric by optimizer steps, to be filled by whoever sees them.
        self.learned: dict[int, float] = {}
        self.folder: Path | None = None
        self._written = 0

    def begin(self, folder: Path | None, looks: int, asked: bool = True) -> None:
        """A run begins, or goes on.

        Args:
            folder: where to; None for loggers and terminal only.
            looks: how many this run has behind it. Files of items from there on are those of an earlier run in this
                folder, and are removed.
            asked: whether the user named the folder. Another one that cannot be written to is done without.
        """
        self.folder, self._written = folder, looks
        if folder is None or rank_and_world()[0] != 0:
            return
        if not asked and not _can_be_written(folder):
            notice(f"Forgetting: {folder} cannot be written to, so what the looks find goes to no file; see `dirpath`.")
            self.folder = None
            return
        clear_items(folder / "items", looks)

    def record(
        self, report: Report, model: Mapping[str, Sequence[ItemScore]], base: Mapping[str, Sequence[ItemScore]]
    ) -> None:
        """Write the items of a look; a recorder of `Monitor`.

        Args:
            report: the look or verdict.
            model: the model's scores by task.
            base: the base's, of the same items.
        """
        if self.folder is not None and rank_and_world()[0] == 0:
            write_items(self.folder / "items", self._written, report, list(item_rows(report, model, base)))
        self._written += 1

    def finish(self, history: Sequence[Report], loggers: Iterable[Any] = ()) -> None:
        """Print the newest report, write the files, and hand table and figures to the loggers.

        Args:
            history: every report of the run, at least one.
            loggers: Lightning's.
        """
        if rank_and_world()[0] != 0 or not history:
            return
        print_forgetting(history[-1])
        loggers = list(loggers)
        figures = self._figures(history) if loggers or self.folder is not None else {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / FILE) as beside:
                beside.write_text(json.dumps([report.to_dict() for report in history], indent=1) + "\n")
            for name, figure in figures.items():
                save_figure(figure, self.folder / f"{name}.png")
        for logger in loggers:
            here = _kind_of(logger) == "CSVLogger" and Path(logger.log_dir) == self.folder
            hand_out(logger, history[-1], {} if here else figures)

    def _figures(self, history: Sequence[Report]) -> dict[str, Any]:
        """The plots by name, none without matplotlib."""
        if importlib.util.find_spec("matplotlib") is None:
            return {}
        figures = {"forgetting": plot_forgetting(history)[0]}
        learned = None if any(report.learning for report in history) else self.learned
        if places_of(history, learned):
            figures["learning"] = plot_run(history, learned, self.metric)[0]
        return figures


def hand_out(logger: Any, report: Report, figures: Mapping[str, Any]) -> None:
    """Give a logger the table and the figures, in the form that its kind takes; others keep to numbers.

    TensorBoard gets Markdown and images, W&B a table and images, Lightning's CSVLogger files beside its
    ``metrics.csv``.

    Args:
        logger: one of Lightning's.
        report: the report to show.
        figures: the plots by name; none where matplotlib is not installed.
    """
    kind = _kind_of(logger)
    if kind == "TensorBoardLogger":
        logger.experiment.add_text("forgetting/table", markdown_table(report), report.step)
    elif kind == "WandbLogger":
        logger.log_table("forgetting/table", columns=list(HEADER), data=[list(row) for row in rows_of(report)])
    elif kind == "CSVLogger":
        with atomic_write(Path(logger.log_dir) / "forgetting.csv") as beside, beside.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows_of(report)])
    for name, figure in figures.items():
        hand_out_figure(logger, name, figure, report.step)


def hand_out_figure(logger: Any, name: str, figure: Any, step: int) -> None:
    """Give a logger a figure, in the form that its kind takes; others get none.

    Args:
        logger: one of Lightning's.
        name: ``forgetting`` for ``forgetting/plot``.
        figure: any of matplotlib's.
        step: optimizer steps taken.
    """
    kind = _kind_of(logger)
    if kind == "TensorBoardLogger":
        logger.experiment.add_image(f"{name}/plot", pixels(figure), step, dataformats="HWC")
    elif kind == "WandbLogger":
        logger.log_image(f"{name}/plot", [pixels(figure)])
    elif kind == "CSVLogger":
        save_figure(figure, Path(logger.log_dir) / f"{name}.png")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: any of matplotlib's.
        path: the file.
    """
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def _kind_of(logger: Any) -> str:
    """Which of the loggers that take tables and figures it is; "" for another. None of them is imported for it."""
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    return next(iter(kinds & {"TensorBoardLogger", "WandbLogger", "CSVLogger"}), "")


def _can_be_written(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
