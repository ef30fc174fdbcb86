# SPDX-License-Identifier: Apache-2.0
"""The page of a run: one HTML file that asks for nothing else, from what a `RunRecord` holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.sweep import Sweep
from lightning_lora.model.summary import size_text
from lightning_lora.reporting.curves import plot_curves
from lightning_lora.reporting.forgetting import plot_forgetting
from lightning_lora.reporting.heat import HeatMap, heat_map
from lightning_lora.reporting.learning import places_of, plot_run
from lightning_lora.reporting.record import RunRecord, Watch
from lightning_lora.reporting.vector import can_draw, page_style, svg_of
from lightning_lora.reporting.words import Verdict, interval, verdict_in_words
from lightning_lora.reporting.words import points as in_points

TEMPLATE = "report.html"

#: Figures are of one width on the page, which a phone shows without scrolling.
_SIZE = (4.6, 3.4)
#: What `Diagnosis.metrics` are, for people.
_ADAPTERS = {
    "adapter/stable_rank": "stable rank, mean [directions]",
    "adapter/effective_rank": "effective rank, mean [directions]",
    "adapter/condition": "condition number, median",
    "adapter/relative_update": "size of the update, |dW| / |W|, mean",
    "adapter/dead_share": "directions below 1 % of the largest [share]",
    "adapter/grad_norm_A": "norm of the gradient of A",
    "adapter/grad_norm_B": "norm of the gradient of B",
}
#: Most metrics of validation that get a picture of their own.
_CHARTS = 4


class Picture(NamedTuple):
    """A figure of the page: its SVG, and what stands below it."""

    svg: Any
    caption: str


class Table(NamedTuple):
    """A table of the page; numbers stand to the right from column ``numbers`` on."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 1


class Watched(NamedTuple):
    """What the page says of one monitor."""

    verdict: Verdict
    tasks: Table
    gauges: Table | None
    pictures: list[Picture]


def render(record: RunRecord) -> str:
    """The page, whole.

    Args:
        record: of the run. Whatever text it holds is shown as text.

    Raises:
        MissingDependencyError: never; without matplotlib the page says that its pictures are missing.
    """
    from jinja2 import Environment, StrictUndefined

    source = resources.files(__package__ or "lightning_lora.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawing = can_draw()
    return environment.from_string(source).render(
        record=record,
        drawing=drawing,
        watched=[_watched(watch, record, drawing) for watch in record.watches if watch.history],
        curves=_curves(record.curves) if drawing else [],
        values=_values(record.curves),
        sweep=None if record.sweep is None else _sweep(record, drawing),
        heat=_heat(record.diagnosis),
        advice=list((record.diagnosis or {}).get("advice", {}).values()),
        adapters=_adapters(record.diagnosis),
        sizes=_sizes(record.sizes),
        files=Table(("file", "size"), [(name, size_text(n)) for name, n in record.files.items()]),
        settings={
            group: Table((group, ""), [(name, _shown(value)) for name, value in values.items()], 9)
            for group, values in record.configuration.items()
            if values
        },
        environment=Table(("", ""), list(record.environment.items()), 9),
    )


def _picture(figure: Any, caption: str) -> Picture:
    from markupsafe import Markup

    return Picture(Markup(svg_of(figure, caption)), caption)  # noqa: S704 - matplotlib escapes the text in it


def _axes() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=_SIZE, layout="constrained").add_subplot()


def _watched(watch: Watch, record: RunRecord, drawing: bool) -> Watched:
    history = [Report.from_dict(values) for values in watch.history]
    report = next((r for r in reversed(history) if r.kind == "verdict"), history[-1])
    pictures = []
    if drawing:
        with page_style("forgetting"):
            figure, _ = plot_forgetting(history, ax=_axes())
            caption = "Each general task over optimizer steps, with 95 % intervals; the large mark is the verdict."
            pictures.append(_picture(figure, caption))
        learned = None if any(r.learning for r in history) else dict(record.curves.get(watch.metric, []))
        if places_of(history, learned):
            with page_style("learning"):
                figure, _ = plot_run(history, learned, watch.metric, ax=_axes())
                pictures.append(_picture(figure, "What was learned against what was forgotten, look by look."))
    return Watched(verdict_in_words(watch), _task_table(report), _gauge_table(report), pictures)


def _task_table(report: Report) -> Table:
    found = {**report.tasks, **({"all together": report.pooled} if len(report.tasks) > 1 else {})}
    found |= {f"{name} (target)": task for name, task in report.learning.items()}
    rows = [
        (
            name,
            f"{task.n_items:,}",
            f"{100 * task.acc_base:.1f}",
            f"{100 * task.acc:.1f}",
            f"{100 * task.delta:+.1f}",
            interval(task.delta, task.delta_se),
            f"{task.flips_lost:,}",
            f"{task.flips_gained:,}",
            f"{report.p_holm.get(name, task.p_value):.2g}",
        )
        for name, task in found.items()
    ]
    head = (
        *("task", "items", "base [%]", "now [%]", "difference [points]", "95 % interval [points]"),
        *("lost [items]", "gained [items]", "p"),
    )
    return Table(head, rows)


def _gauge_table(report: Report) -> Table | None:
    names = [name for name in report.gauges if not name.endswith("_base")]
    rows = [
        (
            name.removeprefix("forgetting/"),
            f"{report.gauges[f'{name}_base']:.4g}" if f"{name}_base" in report.gauges else "-",
            f"{report.gauges[name]:.4g}",
        )
        for name in names
    ]
    return Table(("gauge", "base", "now"), rows) if rows else None


def _curves(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[Picture]:
    """The losses on one picture, further metrics on one each."""
    drawn = {name: points for name, points in curves.items() if any(math.isfinite(y) for _, y in points)}
    losses = {name: points for name, points in drawn.items() if "loss" in name.lower()}
    charts = [("loss", losses)] if losses else []
    charts += [(name, {name: points}) for name, points in drawn.items() if name not in losses and len(points) > 1]
    pictures = []
    for number, (label, points) in enumerate(charts[: 1 + _CHARTS]):
        with page_style(f"curve{number}"):
            figure, _ = plot_curves(points, label, ax=_axes())
            pictures.append(_picture(figure, f"{', '.join(points)} over optimizer steps."))
    return pictures


def _values(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Table | None:
    rows = []
    for name, points in curves.items():
        finite = [(step, y) for step, y in points if math.isfinite(y)]
        if finite:
            least, most = (pick(finite, key=lambda point: point[1]) for pick in (min, max))
            last = finite[-1]
            rows.append(
                (name, *(f"{y:.4g} at step {step:,}" for step, y in (finite[0], last, least, most)), f"{len(points):,}")
            )
    return Table(("metric", "first", "last", "least", "most", "values"), rows) if rows else None


class _Swept(NamedTuple):
    words: str
    table: Table
    pictures: list[Picture]


def _sweep(record: RunRecord, drawing: bool) -> _Swept:
    found = Sweep.from_dict(record.sweep or {})
    rows = [
        (
            f"{point.scale:g}{' (kept)' if point.scale == found.scale else ''}",
            f"{point.target:.4g}",
            f"{100 * point.pooled.delta:+.2f}",
            interval(point.pooled.delta, point.pooled.delta_se),
            f"{100 * point.pooled.soft_delta:+.2f}",
            "yes" if point.holds else "no",
        )
        for point in found.points
    ]
    head = (
        *("share of the adapter", found.monitor, "difference [points]", "95 % interval [points]"),
        *("of soft accuracy [points]", "holds"),
    )
    way = "of all layers alike" if found.shape == "uniform" else "of the first layer, rising to all of the last one"
    words = (
        f"Of the adapter {100 * found.scale:g} % was kept ({way}): the best {found.monitor} among the shares that lie "
        f"below the base by no more than {in_points(found.tolerance)}."
        if found.holds
        else f"At no share above 0 does the model hold (a drop of at most {in_points(found.tolerance)}); the "
        f"smallest one tried, {100 * found.scale:g} % ({way}), was kept."
    )
    pictures = []
    if drawing:
        looks = [Report.from_dict(values) for watch in record.watches[:1] for values in watch.history]
        learned = dict(record.curves.get(found.monitor, []))
        with page_style("sweep"):
            figure, _ = plot_run(looks, learned, found.monitor, found, found.mode, ax=_axes())
            pictures.append(
                _picture(figure, f"{found.monitor} against forgetting: shares of the adapter, and the run.")
            )
    return _Swept(words, Table(head, rows), pictures)


def _heat(diagnosis: Mapping[str, Any] | None) -> list[HeatMap]:
    modules = (diagnosis or {}).get("modules", {})
    if not modules:
        return []
    return [
        heat_map("Effective rank [directions]", modules, "effective_rank"),
        heat_map("Size of the update, |dW| / |W| [%]", modules, "relative_update", 100.0),
    ]


def _adapters(diagnosis: Mapping[str, Any] | None) -> Table | None:
    metrics = (diagnosis or {}).get("metrics", {})
    rows = [(label, f"{metrics[name]:.4g}") for name, label in _ADAPTERS.items() if name in metrics]
    return Table(("of all adapters", "value"), rows) if rows else None


def _sizes(sizes: Mapping[str, Any]) -> Table | None:
    """What is there and what is trained; unknown parts are left out."""
    rows = []
    for name, label in (("base", "base, frozen"), ("adapter", "adapters and modules trained in full")):
        if f"{name}_params" in sizes:
            rows.append((label, f"{sizes[f'{name}_params']:,}", size_text(sizes[f"{name}_bytes"])))
    if "trainable_params" in sizes:
        share = f" ({100 * sizes['trainable_params'] / max(sizes['base_params'], 1):.2f} % of the base)"
        rows.append(("trained", f"{sizes['trainable_params']:,}{share}", "-"))
    rows += [(f"- {name} ({kind})", f"{n:,}", size_text(nbytes)) for name, kind, n, _, nbytes in sizes.get("rows", [])]
    return Table(("part", "parameters", "size"), rows) if rows else None


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None or value == "" else str(value)
