# SPDX-License-Identifier: Apache-2.0
r"""Remedies: what is done to the adapters of a model that forgets, when training ends for it.

Both look for the most of what was learned that *holds*: over all items of the bank neither accuracy nor soft accuracy
lies below the base's by more than the tolerance, and of no single task can it be said that it does.

.. math::
    holds \iff D(0) \le \tau \;\land\; \forall\, tasks: D_j(z) \le \tau, \qquad
    D(z) = \begin{cases}
        \max(-\Delta - z\, SE,\; -\Delta_{soft} - z\, SE_{soft}) & \Delta < 0 \\
        -\Delta - z\, SE & \Delta \ge 0
    \end{cases}

with :math:`z` of 95 %, one-sided. Soft accuracy is finer, but confidence that grows on some items and shrinks on others
moves it without one answer changed: it counts only where accuracy itself lies below the base's. A task alone has few
items: its own estimate would lie above the tolerance by chance at scales at which nothing is forgotten. Its lower bound
lies above it where it has collapsed, whatever others gained.

A single look is too small to say that; the whole bank is not. Since the choice is made on these items, the drop on
others may be a little larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

from lightning_lora.forgetting.paired import PairedScores
from lightning_lora.forgetting.report import TaskReport
from lightning_lora.forgetting.scales import at_scale, compare_tasks, largest_that_holds, multiply_scale
from lightning_lora.forgetting.scoring import Scorer, untrained
from lightning_lora.forgetting.snapshots import Snapshots
from lightning_lora.ranks import from_rank_zero

_Z95 = NormalDist().inv_cdf(0.95)

#: Into how many parts the way from the base to the adapter is cut where a scale is chosen, and how many are tried.
PARTS, SCALES_TRIED = 32, 5


def holds(pooled: TaskReport, tasks: Mapping[str, TaskReport], tolerance: float) -> bool:
    """Whether a model holds, see the module; every rank is told rank 0's answer.

    Args:
        pooled: all items of all tasks together, against the base.
        tasks: each task against the base.
        tolerance: a drop that is nobody's concern [share of items].
    """
    drops = [_drop(pooled, 0.0), *(_drop(found, _Z95) for found in tasks.values())]
    return from_rank_zero(max(drops) <= tolerance)


def _drop(found: TaskReport, z: float) -> float:
    """The drop by accuracy or soft accuracy, whichever says more, less z standard errors."""
    drops = [(-found.delta, found.delta_se)]
    if found.delta < 0:
        drops.append((-found.soft_delta, found.soft_delta_se))
    return max(drop - z * max(error, 1.0 / found.n_independent) for drop, error in drops)


def roll_back(
    scorer: Scorer,
    pairs: PairedScores,
    picked: Mapping[str, Sequence[int]],
    snapshots: Snapshots,
    tolerance: float,
) -> dict[str, Any]:
    """Put back the newest snapshot that holds.

    Untrained adapters hold by themselves. When none of the snapshots holds, the oldest is put back.

    Args:
        scorer: the model; its adapters are changed.
        pairs: the tasks, and what is known of the base.
        picked: documents by task on which it must hold.
        snapshots: where to go back to, at least one.
        tolerance: a drop that is nobody's concern [share of items].

    Returns:
        ``rolled_back_to``, the optimizer step of the snapshot, ``holds``, and ``items``, on how many it was seen.
    """
    model = scorer.module
    items = sum(map(len, picked.values()))
    for step in reversed(snapshots.steps):
        snapshots.put_back(model, step)
        if untrained(model) or holds(*compare_tasks(scorer, pairs, picked), tolerance):
            return {"rolled_back_to": step, "holds": True, "items": items}
    return {"rolled_back_to": step, "holds": False, "items": items}


def scale_down(
    scorer: Scorer, pairs: PairedScores, picked: Mapping[str, Sequence[int]], tolerance: float
) -> dict[str, Any]:
    """Multiply the adapters by the largest scale that holds.

    When not even the smallest one tried holds, that is set: a scale of 0 would leave nothing that could be saved.

    Args:
        scorer: the model; the strength of its adapters is changed.
        pairs: the tasks, and what is known of the base.
        picked: documents by task on which it must hold.
        tolerance: a drop that is nobody's concern [share of items].

    Returns:
        ``scale``, by which the adapters were multiplied, ``holds``, and ``items``, on how many it was seen.
    """

    def at(lam: float) -> bool:
        with at_scale(scorer.module, lam):
            return holds(*compare_tasks(scorer, pairs, picked), tolerance)

    found = largest_that_holds(at, PARTS)
    scale = found or 1 / PARTS
    multiply_scale(scorer.module, scale)
    return {"scale": scale, "holds": found is not None, "items": sum(map(len, picked.values()))}


def outcome_text(outcome: Mapping[str, Any]) -> str:
    """What was done, as sentences; "" when nothing was changed.

    Args:
        outcome: what `roll_back` or `scale_down` gave.
    """
    over = f"over {outcome.get('items', 0):,} items of the bank"
    if "rolled_back_to" in outcome:
        why = "the newest kept look that holds" if outcome["holds"] else "the oldest kept look, and not even it holds"
        return (
            f"The adapters are those of step {outcome['rolled_back_to']} again, {why} {over}; the optimizer's state is "
            f"not taken back."
        )
    if "scale" in outcome:
        why = "the largest scale that holds" if outcome["holds"] else "and not even that holds"
        return f"The adapters were multiplied by {outcome['scale']:g}, {why} {over}."
    return ""
