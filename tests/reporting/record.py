# SPDX-License-Identifier: Apache-2.0
"""A record with every part of a page, and texts that would be markup were they not escaped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.sweep import ScalePoint, Sweep
from lightning_lora.model.diagnosis import Diagnosis
from lightning_lora.model.spectrum import Spectrum
from lightning_lora.reporting.record import RunRecord, Watch
from tests.reporting.test_forgetting import report

SCRIPT = "<script>alert('x')</script>"
TASK = f"a$b_{SCRIPT}"


def history() -> list[Report]:
    looks = [
        report(0, **{TASK: 0.0, "b": 0.0}), report(10, **{TASK: -0.02, "b": -0.04}),
        report(10, "verdict", **{TASK: -0.03, "b": -0.05}),
    ]  # fmt: skip
    gauges = {"forgetting/kl": 0.25, "forgetting/confidence": 0.8, "forgetting/confidence_base": 0.7}
    return [replace(look, learning={"law": look.tasks["b"]}, gauges=gauges) for look in looks]


def sweep() -> Sweep:
    found = history()[-1].pooled
    points = [
        ScalePoint(scale, 4.0 - scale, replace(found, delta=-0.04 * scale), {}, scale < 1) for scale in (0.5, 1.0)
    ]
    return Sweep(points, 0.5, True, "uniform", "val_loss", "min", 0.005, 10)


def diagnosis() -> dict[str, Any]:
    modules = {
        f"model.layers.{i}.{name}": Spectrum(4, (3.0, 2.0, 1.0, i / 10), base_norm=math.nan if i else 10.0)
        for i in range(2) for name in ("self_attn.q_proj", "mlp.up_proj")
    }  # fmt: skip
    return Diagnosis(10, modules).to_dict()


def full(**changes: Any) -> RunRecord:
    watch = Watch([look.to_dict() for look in history()], 0.005, 0.05)
    rows = [("net", "LlamaForCausalLM", 1_000_000, 2_000, 4_000_000)]
    sizes = {
        "base_params": 998_000, "base_bytes": 3_992_000, "trainable_params": 2_000, "adapter_params": 2_000,
        "adapter_bytes": 8_000, "rows": rows,
    }  # fmt: skip
    record = RunRecord(
        title=f"Run of {SCRIPT}",
        facts={"optimizer steps": "10"},
        configuration={"LoRA": {"r": 16, "target_modules": SCRIPT}, "Data": {"path": "https://example.org/data"}},
        sizes=sizes,
        files={"adapters/last.ckpt": 12_345},
        curves={
            "training loss": [(5, 4.0), (10, math.nan), (15, 3.5)], "val_loss": [(0, 4.2), (10, 3.4)],
            "val_acc": [(0, 0.2), (10, 0.3)],
        },
        watches=[watch],
        sweep=sweep().to_dict(),
        diagnosis=diagnosis(),
        environment={"torch": "2.13"},
    )  # fmt: skip
    return replace(record, **changes)
