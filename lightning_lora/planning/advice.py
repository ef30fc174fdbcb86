# SPDX-License-Identifier: Apache-2.0
"""Which way of tuning to take for a goal, with the reasons: what practitioners' guides agree on, and what fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_lora.errors import ConfigError
from lightning_lora.planning.estimate import MethodPlan

#: What a run is for.
GOALS = {
    "behaviour": "a style, a format, a persona, following instructions",
    "knowledge": "facts of a domain that the base does not know",
    "narrow": "one task, and nothing else matters",
    "variants": "many versions of one base, served together",
}

#: Fewer examples than this are gathered before anything is tuned.
FEW = 1_000
#: From here on an adapter holds a run back.
MANY = 10_000_000
#: Parameters from which LoRA over a 16-bit base becomes large for one card.
LARGE = 20e9


@dataclass(frozen=True)
class Advice:
    """A recommendation.

    Args:
        method: "full", "lora", "qlora"; None where nothing fits.
        r: Rank to begin with; None for full tuning.
        reasons: Why, a sentence each.
        warnings: What to watch, a sentence each.
    """

    method: str | None
    r: int | None
    reasons: list[str]
    warnings: list[str]


def advise(
    methods: Mapping[str, MethodPlan],
    params: int,
    goal: str = "behaviour",
    examples: int | None = None,
    r: int | None = None,
) -> Advice:
    """Choose among methods.

    Args:
        methods: What each needs.
        params: Of the base.
        goal: One of `GOALS`.
        examples: How many examples there are; None when nobody says.
        r: Rank that ``methods`` are of; `suggested_rank` if None.

    Raises:
        ConfigError: Another goal.
    """
    if goal not in GOALS:
        told = "; ".join(f"{name!r} for {text}" for name, text in GOALS.items())
        raise ConfigError(f"`goal`={goal!r} is none that is known: {told}")
    fitting = [name for name, plan in methods.items() if plan.fits is not False]
    reasons: list[str] = []
    warnings = _data_warnings(examples)
    wanted = _wanted(goal, examples, params, reasons)
    method = next((name for name in wanted if name in fitting), None)
    if method is None:
        warnings.append("nothing fits: take a smaller model, a shorter sequence, checkpointing, or shard over devices")
        return Advice(None, None, reasons, warnings)
    if method != wanted[0]:
        reasons.append(f"{NAMES[wanted[0]]} would be the first choice and does not fit; {NAMES[method]} does")
    elif any(plan.fits is False for plan in methods.values()):
        left = [NAMES[name] for name, plan in methods.items() if plan.fits is False]
        reasons.append(f"it fits, {' and '.join(left)} {'does' if len(left) == 1 else 'do'} not")
    if goal == "knowledge" and method != "full":
        warnings.append(
            "an adapter learns the style of a domain before its facts: test with question answering "
            "(`ForgettingMonitor(target_tasks=...)`), not with the loss"
        )
    if method != "full":
        warnings.append("a frozen base does not prevent forgetting while the adapter is on: put `ForgettingMonitor` in")
    else:
        warnings.append("full tuning forgets most: watch general tasks and keep the base's checkpoint")
    if method == "full":
        return Advice(method, None, reasons, warnings)
    begin = suggested_rank(goal, examples)
    if r is not None and r != begin:
        reasons.append(f"r={r} is what was asked for; for this goal and as much data r={begin} is where to begin")
    return Advice(method, begin if r is None else r, reasons, warnings)


#: The methods in words.
NAMES = {"full": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}


def _wanted(goal: str, examples: int | None, params: int, reasons: list[str]) -> list[str]:
    """The methods from the first choice to the last; why is added to ``reasons``."""
    adapters = ["qlora", "lora"] if params >= LARGE else ["lora", "qlora"]
    if goal == "knowledge":
        reasons.append("new facts want full tuning or continued pre-training; adapters learn them less well")
        return ["full", *adapters]
    if goal == "narrow":
        if examples is not None and examples >= 100 * FEW:
            reasons.append("for one narrow task with much data full tuning may win, and nothing else has to be kept")
            return ["full", *adapters]
        reasons.append("for one narrow task with little data an adapter reaches full tuning and overfits less")
        return [*adapters, "full"]
    if examples is not None and examples >= MANY:
        reasons.append("beyond some ten million examples an adapter holds a run back")
        return ["full", *adapters]
    if goal == "variants":
        reasons.append("adapters are small files over one base: many are served at once and swapped in milliseconds")
    else:
        reasons.append("for behaviour and format an adapter of modest rank on all linears comes close to full tuning")
    if params >= LARGE:
        reasons.append("at this size a base of 4 bits leaves room for longer sequences, for a percent or so of quality")
    return [*adapters, "full"]


def suggested_rank(goal: str = "behaviour", examples: int | None = None) -> int:
    """The rank to begin with.

    Args:
        goal: One of `GOALS`.
        examples: How many examples there are; None when nobody says.
    """
    if goal == "knowledge" or (examples or 0) > 500_000:
        return 64
    return 8 if examples is not None and examples < 10 * FEW and goal != "narrow" else 16


def _data_warnings(examples: int | None) -> list[str]:
    if examples is None or examples >= FEW:
        return []
    return [
        f"{examples:,} examples are few: 500 to 1,000 may do for classification, generation wants 5,000 to 10,000. "
        "Gather more before tuning, or try prompts first"
    ]
