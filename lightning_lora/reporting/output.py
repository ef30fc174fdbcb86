# SPDX-License-Identifier: Apache-2.0
"""Output: what a run's looks at forgetting leave behind, in a folder and with loggers, in the form each takes."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.scoring import ItemScore
from lightning_lora.io.atomic import atomic_write
from lightning_lora.ranks import rank_and_world
from lightning_lora.reporting.forgetting import pixels, plot_forgetting
from lightning_lora.reporting.items import item_rows, write_items
from lightning_lora.reporting.table import HEADER, markdown_table, print_forgetting, rows_of


class ForgettingOutput:
    """Writes on rank 0 what the looks of a run found; other ranks write nothing.

    ::

        folder/forgetting.json   every report
        folder/forgetting.png    each task over steps, where matplotlib is installed
        folder/items/...         a file for each look, a row for each item

    Args:
        folder: where to; None for loggers and terminal only.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._written = 0

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

    def goes_on(self, looks: int) -> None:
        """Number the items' files from here on: a run that was resumed has so many looks behind it."""
        self._written = looks

    def finish(self, history: Sequence[Report], loggers: Iterable[Any] = ()) -> None:
        """Print the newest report, write the files, and hand table and figure to the loggers.

        Args:
            history: every report of the run, at least one.
            loggers: Lightning's.
        """
        if rank_and_world()[0] != 0 or not history:
            return
        print_forgetting(history[-1])
        figure = None
        if importlib.util.find_spec("matplotlib") is not None:
            figure, _ = plot_forgetting(history)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.folder / "forgetting.json") as beside:
                beside.write_text(json.dumps([report.to_dict() for report in history], indent=1) + "\n")
            _save(figure, self.folder / "forgetting.png")
        for logger in loggers:
            hand_out(logger, history[-1], figure)


def hand_out(logger: Any, report: Report, figure: Any) -> None:
    """Give a logger the table and the figure, in the form that its kind takes; others keep to numbers.

    TensorBoard gets Markdown and an image, W&B a table and an image, Lightning's CSVLogger files beside its
    ``metrics.csv``.

    Args:
        logger: one of Lightning's.
        report: the report to show.
        figure: the plot; None where matplotlib is not installed.
    """
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        logger.experiment.add_text("forgetting/table", markdown_table(report), report.step)
        if figure is not None:
            logger.experiment.add_image("forgetting/plot", pixels(figure), report.step, dataformats="HWC")
    elif "WandbLogger" in kinds:
        logger.log_table("forgetting/table", columns=list(HEADER), data=[list(row) for row in rows_of(report)])
        if figure is not None:
            logger.log_image("forgetting/plot", [pixels(figure)])
    elif "CSVLogger" in kinds:
        folder = Path(logger.log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "forgetting.csv") as beside, beside.open("w", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows_of(report)])
        _save(figure, folder / "forgetting.png")


def _save(figure: Any, path: Path) -> None:
    if figure is not None:
        with atomic_write(path) as beside:
            figure.savefig(beside, format="png", dpi=120)
