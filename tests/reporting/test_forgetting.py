# SPDX-License-Identifier: Apache-2.0
"""The plot draws what the reports say."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting.report import Report, TaskReport
from lightning_lora.reporting import plot_forgetting


def report(step: int, kind: str = "look", **deltas: float) -> Report:
    def found(delta: float) -> TaskReport:
        return TaskReport(0.5 + delta, 0.5, delta, 0.01, 3, 1, delta, 0.005, 100, 0.6)

    tasks = {name: found(delta) for name, delta in deltas.items()}
    pooled = found(sum(deltas.values()) / len(deltas))
    return Report(step, kind, tasks, pooled, alarms=[], seconds=0.1)


HISTORY = [report(0, a=0.0, b=0.0), report(10, a=-0.02, b=-0.04), report(10, "verdict", a=-0.03, b=-0.05)]


def test_plot_over_steps_has_each_task_and_the_verdict_for_its_look(tmp_path: Path) -> None:
    fig, ax = plot_forgetting(HISTORY)
    lines = {c.get_label(): c[0] for c in ax.containers if c.get_label() != "_verdict"}
    assert set(lines) == {"a", "b", "pooled"}
    assert list(lines["a"].get_xdata()) == [0, 10]
    assert list(lines["a"].get_ydata()) == pytest.approx([0.0, -3.0])
    assert ax.get_xlabel() == "optimizer step"
    fig.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5_000


def test_plot_against_learning_takes_dicts_and_runs_towards_a_lower_loss() -> None:
    _, ax = plot_forgetting([r.to_dict() for r in HISTORY], learned={0: 4.0, 10: 3.5, 99: 3.0})
    lines = {c.get_label(): c[0] for c in ax.containers}
    assert list(lines["pooled"].get_xdata()) == [4.0, 3.5]
    assert ax.xaxis_inverted()
    assert ax.get_xlabel() == "target loss, falling to the right: what was learned"


def test_labels_of_many_looks_stay_apart_and_the_verdict_lies_on_top(tmp_path: Path) -> None:
    looks = [report(step, a=-step / 5000, b=-step / 4000) for step in range(0, 201, 5)]
    learned = {r.step: 3.0 + 2.0 * 0.97**r.step for r in looks}  # most looks lie near the end
    fig, ax = plot_forgetting([*looks, report(200, "verdict", a=-0.05, b=-0.06)], learned=learned)
    fig.savefig(tmp_path / "plot.png")
    boxes = [text.get_window_extent() for text in ax.texts]
    assert [text.get_text() for text in ax.texts][:2] == ["step 0", "200"]
    assert 3 <= len(boxes) <= 14
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    verdicts = [c for c in ax.containers if c.get_label() == "_verdict"]
    assert len(verdicts) == 3
    marks = [c[0] for c in ax.containers if c.get_label() != "_verdict"]
    assert min(c[0].get_zorder() for c in verdicts) > max(mark.get_zorder() for mark in marks)
    assert min(c[0].get_markersize() for c in verdicts) > max(mark.get_markersize() for mark in marks)


def test_plot_of_one_task_has_no_pooled_line_and_uses_given_axes() -> None:
    from matplotlib.figure import Figure

    own = Figure().add_subplot()
    fig, ax = plot_forgetting([report(0, a=0.0), report(5, a=-0.01)], ax=own)
    assert ax is own
    assert fig is own.get_figure()
    assert [c.get_label() for c in ax.containers] == ["a"]


def test_nothing_to_draw_is_named() -> None:
    with pytest.raises(ConfigError, match="no look to draw: 0 reports"):
        plot_forgetting([])
    with pytest.raises(ConfigError, match="none at a step of `learned` \\(\\[7\\]\\)"):
        plot_forgetting(HISTORY, learned={7: 1.0})


def test_a_look_at_one_item_is_left_out_and_its_line_has_no_error(tmp_path: Path) -> None:
    one = TaskReport(1.0, 1.0, 0.0, 1.0, 0, 0, 0.0, 1.0, 1, 1.0)
    first = Report(0, "look", {"a": one}, one, alarms=[], seconds=0.1)
    _, ax = plot_forgetting([first, report(5, a=-0.01), report(10, "verdict", a=-0.02)])
    assert list(next(c for c in ax.containers if c.get_label() == "a")[0].get_xdata()) == [5, 10]
    low, high = ax.get_ylim()
    assert -5.0 < low < high < 5.0
    _, ax = plot_forgetting([first])  # there is nothing else
    assert ax.get_ylim()[0] > -5.0
    assert "100.0 -> 100.0 % (+0.0, 1 item), e-value" in first.summary()
    assert "(-1.0 +- 1.0)" in report(5, a=-0.01).summary()
