# SPDX-License-Identifier: Apache-2.0
"""Files of items: every answer of every look, of model and base, to look into with any tool."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.scoring import ItemScore
from lightning_lora.io.atomic import atomic_write


def item_rows(
    report: Report, model: Mapping[str, Sequence[ItemScore]], base: Mapping[str, Sequence[ItemScore]]
) -> Iterator[dict[str, Any]]:
    """A row for each item: where it stands, and what model and base said.

    Args:
        report: the look or verdict.
        model: the model's scores by task.
        base: the base's, of the same items.
    """
    for name, scores in model.items():
        for now, before in zip(scores, base[name], strict=True):
            yield {
                "step": report.step,
                "kind": report.kind,
                "task": name,
                "doc_id": now.doc_id,
                "doc_hash": now.key[0],
                "prompt_hash": now.key[1],
                "correct": now.correct,
                "correct_base": before.correct,
                "margin": now.margin,
                "margin_base": before.margin,
                "loglikelihoods": list(now.loglikelihoods),
                "loglikelihoods_base": list(before.loglikelihoods),
            }


def write_items(folder: Path, number: int, report: Report, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write the items of one look: Parquet where pyarrow is installed, else JSON lines.

    Args:
        folder: where to; made if it is not there.
        number: of the report in its run: two may be of one step.
        report: the look or verdict.
        rows: what `item_rows` gave.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:04d}-{report.kind}-step={report.step}"
    if importlib.util.find_spec("pyarrow") is None:
        path = path.with_name(f"{path.name}.jsonl")
        with atomic_write(path) as beside:
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = path.with_name(f"{path.name}.parquet")
    with atomic_write(path) as beside:
        parquet.write_table(pa.Table.from_pylist(list(rows)), beside)
    return path


def clear_items(folder: Path, number: int) -> None:
    """Remove the files of looks from a number on: they are of an earlier run, and would pass for this one's.

    Args:
        folder: where `write_items` writes.
        number: the next that it is given.
    """
    for path in folder.glob("*-step=*"):
        named = re.fullmatch(r"(\d{4,})-(look|verdict)-step=\d+\.(parquet|jsonl)", path.name)
        if named and int(named[1]) >= number:
            path.unlink()
