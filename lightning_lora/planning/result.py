# SPDX-License-Identifier: Apache-2.0
"""What a plan found, and how it is printed: one column a method, then the advice and what all of it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from lightning_lora.planning.advice import NAMES, Advice
from lightning_lora.planning.devices import Device
from lightning_lora.planning.estimate import RESERVE, UTILIZATION, MethodPlan


@dataclass(frozen=True)
class Plan:
    """What `plan` found. ``print(plan)`` gives the table.

    Args:
        model: Name of the model's class.
        params: Its parameters.
        adapter_params: Those of all A and B.
        adapted: How many linears get an adapter.
        r: Rank of the adapters that were planned.
        context: Tokens that the model was made for; None where its configuration does not say.
        batch_size: Sequences in a forward.
        sequence_length: Tokens in each.
        gradient_checkpointing: Whether blocks keep their inputs alone.
        device: Where it is to run.
        methods: What each needs, by "full", "lora", "qlora".
        advice: Which to take, and why.
        notes: What could not be found out.
    """

    model: str
    params: int
    adapter_params: int
    adapted: int
    r: int
    context: int | None
    batch_size: int
    sequence_length: int
    gradient_checkpointing: bool
    device: Device | None
    methods: dict[str, MethodPlan]
    advice: Advice
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """In primitives, as JSON holds it."""
        plain = {name: value for name, value in vars(self).items() if name not in ("methods", "advice", "device")}
        return {
            **plain,
            "device": None if self.device is None else asdict(self.device),
            "methods": {name: found.to_dict() for name, found in self.methods.items()},
            "advice": asdict(self.advice),
        }

    def __str__(self) -> str:
        return _text(self)


Row = tuple[str, Callable[[MethodPlan], str]]


def _text(plan: Plan) -> str:
    """The table, the recommendation, and what they rest on."""
    lines = [
        f"{plan.model}: {plan.params:,} parameters; {plan.adapter_params:,} in adapters of rank {plan.r} "
        f"on {plan.adapted} linears",
        f"{plan.batch_size} x {plan.sequence_length:,} tokens"
        + (", gradient checkpointing" if plan.gradient_checkpointing else "")
        + (f", on {plan.device.name} ({plan.device.memory / 1e9:g} GB)" if plan.device else ""),
        "",
    ]
    columns = list(plan.methods.values())
    rows = [[name, *(cell(found) for found in columns)] for name, cell in _rows(plan)]
    header = ["", *(NAMES[found.method] for found in columns)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines += ["", *_advice(plan), *(f"Note: {note}." for note in plan.notes)]
    if plan.device:
        lines.append(
            f"Assumed: {100 * RESERVE:g} % of the device's memory is not to be had, and training reaches "
            f"{100 * UTILIZATION:g} % of its matrix rate."
        )
    return "\n".join(lines)


def _rows(plan: Plan) -> list[Row]:
    rows: list[Row] = [
        ("trainable parameters", lambda m: f"{m.trainable_params:,}"),
        ("weights", lambda m: _size(m.memory.weights)),
        ("adapters", lambda m: _size(m.memory.adapters)),
        ("gradients", lambda m: _size(m.memory.gradients)),
        ("optimizer", lambda m: _size(m.memory.optimizer)),
        ("activations", lambda m: _size(m.memory.activations) if _counted(m) else "not known"),
        ("logits and loss", lambda m: _size(m.memory.logits) if _counted(m) else "not known"),
        ("workspace", lambda m: _size(m.memory.workspace + m.memory.dequantized)),
        (
            "total" if all(map(_counted, plan.methods.values())) else "total without activations",
            lambda m: _size(m.memory.total),
        ),
        ("weights on disk", lambda m: _size(m.file_bytes)),
    ]
    if plan.device is None:
        return rows
    rows += [
        ("fits", lambda m: "not known" if m.fits is None else "yes" if m.fits else "no"),
        ("largest batch", lambda m: _count(m.largest_batch)),
        ("longest sequence", lambda m: _count(m.largest_sequence) + (" (context)" if _capped(m, plan.context) else "")),
        ("tokens a second", lambda m: f"{m.tokens_per_second or 0:,.0f}"),
    ]
    if any(m.hours is not None for m in plan.methods.values()):
        rows += [("hours", lambda m: _hours(m.hours or 0.0)), ("cost [USD]", lambda m: _dollars(m.cost or 0.0))]
    return rows


def _counted(method: MethodPlan) -> bool:
    return method.memory.activations > 0


def _capped(method: MethodPlan, context: int | None) -> bool:
    return context is not None and method.largest_sequence == context


def _hours(hours: float) -> str:
    minutes = 60 * hours
    return f"{hours:,.1f}" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 0.1 else "<0.1 min" if hours else "0"


def _dollars(cost: float) -> str:
    return f"{cost:,.0f}" if cost >= 10 else f"{cost:.2f}" if cost >= 0.01 else "<0.01" if cost else "0"


def _advice(plan: Plan) -> list[str]:
    advice = plan.advice
    head = "Take nothing of this:" if advice.method is None else f"Take {NAMES[advice.method]}"
    if advice.method is not None:
        head += f" with r={advice.r}, lora_alpha={2 * advice.r}:" if advice.r is not None else ":"
    return [head, *(f"  - {reason}." for reason in advice.reasons), *(f"  ! {text}." for text in advice.warnings)]


def _size(nbytes: int) -> str:
    return "-" if not nbytes else f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}" if value else "none"
