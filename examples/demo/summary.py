# SPDX-License-Identifier: Apache-2.0
"""What came of the demo: tables for people, and whether it held."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.table import bytes_of, section, size
from lightning_lora import AdapterCheckpoint, ApplyReport, ForgettingMonitor
from lightning_lora.forgetting.report import TaskReport
from lightning_lora.io.merge import MergeReport
from small_base.data import MODEL_DIR


@dataclass(frozen=True)
class Outcome:
    """Everything the tables speak of."""

    out: Path
    applied: ApplyReport
    adapters: AdapterCheckpoint
    monitor: ForgettingMonitor
    merged: MergeReport
    loss: dict[int, float]  # on held-out Shakespeare, by optimizer step [nats/token]

    @property
    def plot(self) -> Path:
        return self.out / "forgetting.png"

    @property
    def adapter(self) -> Path:
        return Path(self.adapters.best_adapter_path)


def tables(outcome: Outcome) -> str:
    """The whole summary."""
    return "\n\n".join((_adapted(outcome), _learned(outcome.loss), _forgotten(outcome.monitor), _merge(outcome.merged)))


def checks(outcome: Outcome) -> list[tuple[str, bool]]:
    """What has to hold, and whether it did."""
    losses = [outcome.loss[step] for step in sorted(outcome.loss)]
    verdict = outcome.monitor.report
    error, limit = outcome.merged.logit_error, outcome.merged.logit_limit
    return [
        ("the loss on the target fell", losses[-1] < losses[0]),
        ("forgetting was seen: a general task fell significantly", any(z(t) < -2 for t in verdict.tasks.values())),
        ("the adapter folder is there", (outcome.adapter / "adapter_model.safetensors").is_file()),
        ("the merged model gives the live one's outputs", error is not None and error <= limit),
        ("the plot is there", outcome.plot.stat().st_size > 0),
    ]


def z(task: TaskReport) -> float:
    """The paired difference in standard errors; below -2 is forgetting by the usual measure."""
    return task.delta / task.delta_se if task.delta_se else 0.0


def _adapted(outcome: Outcome) -> str:
    report = outcome.applied
    base = bytes_of(MODEL_DIR / "model.safetensors")
    checkpoint = Path(outcome.adapters.best_model_path)
    share = 100 * report.trainable_params / report.logical_params
    rows = [
        ("linears adapted", f"{len(report.adapted)}"),
        ("parameters of the base", f"{report.logical_params:,}"),
        ("trainable", f"{report.trainable_params:,} ({share:.1f} %)"),
        ("base in memory", f"{size(report.base_bytes)} -> {size(report.packed_bytes)} ({report.quantize})"),
        ("on disk: base model", size(base)),
        ("on disk: adapter folder", size(bytes_of(outcome.adapter))),
        ("on disk: checkpoint, with optimizer", size(bytes_of(checkpoint))),
    ]
    return section("What was adapted", rows)


def _learned(loss: dict[int, float]) -> str:
    first, last = min(loss), max(loss)
    row = ("Shakespeare, held out", f"{loss[first]:.3f}", f"{loss[last]:.3f}", f"{loss[last] - loss[first]:+.3f}")
    return section(f"Learned in {last} steps: loss in nats a token", [row], ("", "before", "after", "difference"))


def _forgotten(monitor: ForgettingMonitor) -> str:
    header = ("", "items", "before", "after", "difference", "z", "lost", "gained")
    report = monitor.report
    tasks = {**report.tasks, "all together": report.pooled}
    rows = [
        (
            name,
            f"{t.n_items:,}",
            f"{100 * t.acc_base:.1f} %",
            f"{100 * t.acc:.1f} %",
            f"{100 * t.delta:+.1f} +- {100 * t.delta_se:.1f}",
            f"{z(t):+.1f}",
            f"{t.flips_lost}",
            f"{t.flips_gained}",
        )
        for name, t in tasks.items()
    ]
    return section("Forgotten: accuracy on general tasks, paired with the base", rows, header)


def _merge(report: MergeReport) -> str:
    error = (
        "not measured" if report.logit_error is None else f"{report.logit_error:.1e} (limit {report.logit_limit:.0e})"
    )
    rows = [
        ("layers", f"{len(report.layers)}, written in {report.dtype}"),
        ("weights, relative error of the worst layer", f"{report.worst[1]:.1e}"),
        ("outputs, relative error to the live model", error),
    ]
    return section("Merged", rows)
