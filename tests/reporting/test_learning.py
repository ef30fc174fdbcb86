# SPDX-License-Identifier: Apache-2.0
"""The plots of learning against forgetting draw what the run measured, of the adapters that it measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.sweep import ScalePoint, Sweep
from lightning_lora.reporting import plot_learning, plot_run
from lightning_lora.reporting.learning import places_of, pooled_learning
from tests.reporting.test_forgetting import report


def with_target(report: Report, **deltas: float) -> Report:
    found = {name: replace(report.pooled, delta=delta) for name, delta in deltas.items()}
    return replace(report, learning=found)


def series(ax: Any) -> dict[str, tuple[list[float], list[float]]]:
    return {c.get_label(): (list(c[0].get_xdata()), list(c[0].get_ydata())) for c in ax.containers}


LOOKS = [report(0, a=0.0), report(10, a=-0.02), report(20, a=-0.04), report(20, "verdict", a=-0.03)]


def test_target_tasks_give_the_learning_axis(tmp_path: Path) -> None:
    history = [with_target(look, law=x, tax=3 * x) for look, x in zip(LOOKS, (0.0, 0.05, 0.1, 0.1), strict=True)]
    fig, ax = plot_run([look.to_dict() for look in history])
    x, y = series(ax)["this run, by its looks"]
    assert x == pytest.approx([0.0, 10.0, 20.0])  # the verdict stands for the look at its step
    assert y == pytest.approx([0.0, -2.0, -3.0])
    assert "target accuracy" in ax.get_xlabel()
    assert not ax.xaxis_inverted()
    bars = [container.has_xerr and container.has_yerr for container in ax.containers]
    assert bars == [True, True]
    fig.savefig(tmp_path / "plot.png")


def test_pooled_learning_weighs_items() -> None:
    look = with_target(LOOKS[1], law=0.2, tax=0.0)
    look = replace(look, learning={**look.learning, "tax": replace(look.learning["tax"], n_items=300, delta_se=0.03)})
    delta, error = pooled_learning(look)
    assert delta == pytest.approx(0.25 * 0.2)
    assert error == pytest.approx(((0.25 * 0.01) ** 2 + (0.75 * 0.03) ** 2) ** 0.5)


def test_looks_between_validations_lie_on_a_line_and_others_are_left_out() -> None:
    _, ax = plot_run([*LOOKS, report(30, a=-0.05)], {5: 4.0, 15: 3.0, 20: 2.8, 25: float("nan")}, "loss [nats/token]")
    assert series(ax)["this run, by its looks"][0] == pytest.approx([3.5, 2.8])
    assert ax.xaxis_inverted()
    assert ax.get_xlabel() == "loss [nats/token], falling to the right"
    _, ax = plot_run(LOOKS, {0: 0.1, 20: 0.3}, "accuracy", mode="max")
    assert not ax.xaxis_inverted()
    with pytest.raises(ConfigError, match="no look to draw"):
        plot_run(LOOKS, {50: 1.0})
    with pytest.raises(ConfigError, match="no target tasks"):
        plot_run(LOOKS)


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        pytest.param([*LOOKS, report(20, "verdict", a=0.0)], [0.0, -2.0, -3.0], id="verdict of what a sweep kept"),
        pytest.param(
            [LOOKS[0], replace(LOOKS[1], outcome={"by": "rollback", "step": 10, "holds": True}),
             report(10, "verdict", a=0.0)], [0.0, -2.0], id="verdict after a rollback"),
        pytest.param(
            [LOOKS[0], replace(LOOKS[1], outcome={"by": "scale", "step": 10}), LOOKS[2],
             report(30, "verdict", a=0.0)], [0.0, -2.0, -4.0], id="a scale that was owed until the end"),
        pytest.param(
            [LOOKS[0], replace(LOOKS[1], outcome={"by": "stop", "step": 10}),
             report(10, "verdict", a=-0.03)], [0.0, -3.0], id="a stop changes no adapter"),
    ],
)  # fmt: skip
def test_a_metric_of_training_goes_with_the_adapters_of_training(history: list[Report], expected: list[float]) -> None:
    assert [place.y for place in places_of(history, {0: 4.0, 30: 3.0})] == pytest.approx(expected)


def sweep(kept: float = 0.5) -> Sweep:
    points = [
        ScalePoint(scale, 5.0 - scale, replace(LOOKS[1].pooled, delta=-0.04 * scale), {}, scale < 1)
        for scale in (0.0, 0.5, 1.0)
    ]
    return Sweep(points, kept, True, "linear", "val_loss", "min", 0.005, 20)


def test_the_sweeps_curve_and_the_kept_scale_are_on_the_same_axes() -> None:
    _, ax = plot_run(LOOKS, {0: 5.0, 20: 4.0}, sweep=sweep())
    assert series(ax)["scales of the adapter, linear"] == ([5.0, 4.5, 4.0], pytest.approx([0.0, -2.0, -4.0]))
    assert "this run, by its looks" in series(ax)
    (star,) = (line for line in ax.lines if line.get_marker() == "*")
    assert (star.get_label(), star.get_xdata()[0]) == ("kept: 0.5", 4.5)
    assert {"0", "0.5", "1"} <= {text.get_text() for text in ax.texts}
    _, alone = plot_run([], {}, sweep=sweep(1.0))
    assert list(series(alone)) == ["scales of the adapter, linear"]
    with pytest.raises(ConfigError, match="`sweep` needs `learned`"):
        plot_run(LOOKS, sweep=sweep())


def test_learning_against_forgetting() -> None:
    fig, ax = plot_learning(
        {"LoRA": [(3.9, -9.0), (3.7, -8.0)], "BaseKL": [(4.1, -3.0)]}, {"scales": [(5.2, 0.0), (4.4, -1.0)]}, base=5.2
    )
    centres = {c.get_label(): (c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in ax.containers}
    assert centres["LoRA"] == pytest.approx((3.8, -8.5))
    assert centres["BaseKL"] == pytest.approx((4.1, -3.0))
    assert ax.xaxis_inverted()
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"LoRA", "BaseKL", "scales", "base"}
    with pytest.raises(ConfigError, match="`points` is empty"):
        plot_learning({})
