# SPDX-License-Identifier: Apache-2.0
"""How often the alarm of `ForgettingMonitor` is false, and how soon it is right: simulated runs, the real functions.

    python benchmarks/alarm.py [--runs 1000] [--tiny] [--figures docs/concepts]

A made-up item has a margin: by how much the base prefers the right choice to the best wrong one. The model's margin
is correlated with it, so that one answer in ten changes; it may be worse on average (a drop), or larger or smaller as a
whole (confidence, which changes no answer), or larger here and smaller there. A run has 20 looks, each at fresh items.
Three statistics go through the same bet:

- soft accuracy, `statistics.soft_accuracy`, each model by the spread of its own margins: what the monitor uses, which
  raises its alarm only where more answers were lost than gained too;
- accuracy, 1 or 0;
- the raw margin, in units of the base's spread, cut at four of them: what a log-probability would say.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from lightning_lora.forgetting.power import paired_sd, required_items, unpaired_sd
from lightning_lora.forgetting.sequential import EProcess, mean_e_value, raises_alarm
from lightning_lora.forgetting.statistics import paired_difference, soft_accuracy

LOOKS, ITEMS, ACCURACY, FLIPS = 20, 250, 0.60, 0.10
ALPHA, FIND_LOOKS, FIND_LEAST = 0.05, 8, 0.95
LEVEL = 1 / ALPHA


@dataclass(frozen=True)
class Scenario:
    """What training did to the model.

    Args:
        name: in the table.
        drop: of accuracy, from the first look on or from `start` [share of items].
        confidence: factor of every margin of the model.
        start: looks before the drop.
        choices: 2 for margins of the normal distribution; more for the right choice's score less the best of the
            wrong ones', skewed and not normal.
        passage: items that are about one passage.
        lean: how much their margins have in common, as a correlation.
        accuracy: of the base [share of items].
        flips: share of answers that change by chance.
        uneven: standard deviation of the logarithm of a factor that each of the model's margins has to itself: an item
            becomes more certain, another less so, and no answer changes by it.
        wrong: factor of the model's margins below 0 alone: more certain of what it has wrong.
    """

    name: str
    drop: float = 0.0
    confidence: float = 1.0
    start: int = 0
    choices: int = 2
    passage: int = 1
    lean: float = 0.0
    accuracy: float = ACCURACY
    flips: float = FLIPS
    uneven: float = 0.0
    wrong: float = 1.0


NULLS = (
    Scenario("no drop"),
    Scenario("no drop, +25 % confidence", confidence=1.25),
    Scenario("no drop, -20 % confidence", confidence=0.8),
    Scenario("no drop, four choices, -20 % confidence", confidence=0.8, choices=4),
)
#: Confidence that moves otherwise from item to item: what soft accuracy is not blind to.
UNEVEN = tuple(
    replace(
        scenario, name=f"{scenario.name}, {'no answer' if flips == 0 else 'one answer in ten'} changed", flips=flips
    )
    for scenario in (
        Scenario("a factor for each item, base 60 %", uneven=0.5),
        Scenario("a factor for each item, base 80 %", uneven=0.5, accuracy=0.8),
        Scenario("wrong answers' margins x 1.2", wrong=1.2),
    )
    for flips in (0.0, FLIPS)
)
DROPS = (
    Scenario("two points lost", drop=0.02),
    Scenario("two points lost, +25 % confidence", drop=0.02, confidence=1.25),
    Scenario("two points lost, -20 % confidence", drop=0.02, confidence=0.8),
    Scenario("two points lost, four choices", drop=0.02, choices=4),
)

Difference = Callable[[Sequence[float], Sequence[float]], list[float]]


def soft_difference(base: Sequence[float], model: Sequence[float]) -> list[float]:
    return [b - m for b, m in zip(soft_accuracy(base), soft_accuracy(model), strict=True)]


def accuracy_difference(base: Sequence[float], model: Sequence[float]) -> list[float]:
    return [float(b > 0) - float(m > 0) for b, m in zip(base, model, strict=True)]


def margin_difference(base: Sequence[float], model: Sequence[float]) -> list[float]:
    scale = 4.0 * float(np.std(base))
    return [min(1.0, max(-1.0, (b - m) / scale)) for b, m in zip(base, model, strict=True)]


STATISTICS: dict[str, Difference] = {
    "soft accuracy": soft_difference,
    "accuracy": accuracy_difference,
    "raw margin": margin_difference,
}


class Margins:
    """Draws margins of base and model for the items of a look.

    With two choices both are normal with a mean that gives the accuracy. With more, every choice has a score, the
    right one a head start. The correlation of base and model, and the head starts, are found by bisection on a large
    sample, so that the shares of right answers and of flips without a drop are as asked.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        rng = np.random.default_rng(0)
        self._noise = rng.standard_normal((2, 200_000, scenario.choices))
        self.start = self._head_start(scenario.accuracy)
        self.dropped = self._head_start(scenario.accuracy - scenario.drop)
        self.correlation = _bisect(lambda r: -self._flips(r), -scenario.flips, 0.0, 1.0) if scenario.flips else 1.0
        del self._noise

    def look(self, rng: np.random.Generator, dropped: bool, items: int) -> tuple[list[float], list[float]]:
        """Margins of the base and of the model."""
        shape, passage, lean = (2, items, self.scenario.choices), self.scenario.passage, self.scenario.lean
        noise = rng.standard_normal(shape)
        if lean:
            shared = rng.standard_normal((2, -(-items // passage), shape[2])).repeat(passage, axis=1)[:, :items]
            noise = math.sqrt(lean) * shared + math.sqrt(1.0 - lean) * noise
        base = self._margins(noise[0], self.start)
        model = self._margins(self._moved(noise, self.correlation), self.dropped if dropped else self.start)
        model = self.scenario.confidence * np.where(model < 0, self.scenario.wrong * model, model)
        if self.scenario.uneven:
            model = model * np.exp(self.scenario.uneven * rng.standard_normal(items))
        return base.tolist(), model.tolist()

    def _moved(self, noise: np.ndarray, correlation: float) -> np.ndarray:
        return correlation * noise[0] + math.sqrt(1.0 - correlation**2) * noise[1]

    def _margins(self, noise: np.ndarray, start: float) -> np.ndarray:
        if self.scenario.choices == 2:
            return start + noise[:, 0]
        return start + noise[:, 0] - noise[:, 1:].max(axis=1)

    def _head_start(self, accuracy: float) -> float:
        if self.scenario.choices == 2:
            return NormalDist().inv_cdf(accuracy)
        return _bisect(lambda x: float((self._margins(self._noise[0], x) > 0).mean()), accuracy, -5.0, 5.0)

    def _flips(self, correlation: float) -> float:
        base = self._margins(self._noise[0], self.start) > 0
        model = self._margins(self._moved(self._noise, correlation), self.start) > 0
        return float((base != model).mean())


def _bisect(rising: Callable[[float], float], target: float, low: float, high: float) -> float:
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Rule:
    """How the bet is set up.

    Args:
        tolerance: a drop that is nobody's concern [share of items].
        planned: whether the number of looks is known from the beginning.
        items: of a look, over all tasks.
        tasks: that share them; the alarm is on the mean of their e-values.
        hit: how many of the tasks the drop is in; None for all.
        by_passage: whether the stake is on whole passages, as it is where a task declares them.
        by_answers: whether an alarm needs more answers lost than gained too, as the monitor's does.
    """

    tolerance: float = 0.0
    planned: bool = True
    items: int = ITEMS
    tasks: int = 1
    hit: int | None = None
    by_passage: bool = False
    by_answers: bool = True


class Look(NamedTuple):
    """What is known after a look.

    Args:
        e_value: the mean of the tasks' capitals.
        alarm: whether that is one.
    """

    e_value: float
    alarm: bool


#: Ten items about each passage, which mostly are lost and gained together.
PASSAGES = (
    Scenario("no drop", passage=10, lean=0.8),
    Scenario("half a point lost", drop=0.005, passage=10, lean=0.8),
    Scenario("five points lost", drop=0.05, passage=10, lean=0.8),
)

#: By what they are called in the table.
SETTINGS = {
    "tolerance 0": Rule(),
    "tolerance 0, number of looks unknown": Rule(planned=False),
    "tolerance half a point (the default)": Rule(0.005),
    "tolerance half a point, number of looks unknown": Rule(0.005, planned=False),
    "tolerance 0, four tasks share the items, all hit": Rule(tasks=4),
    "tolerance 0, 40 items a look": Rule(items=40),
}


def paths(
    scenario: Scenario,
    difference: Difference = soft_difference,
    rule: Rule = Rule(),
    runs: int = 1000,
    seed: int = 1,
    whole: bool = False,
) -> Iterator[list[Look]]:
    """The looks of one run after another, look by look, up to the alarm or to the last of `LOOKS`.

    Args:
        scenario: what training did.
        difference: base less model for each item, in [-1, 1].
        rule: of the bet.
        runs: how many.
        seed: of all of them.
        whole: go on after an alarm.
    """
    margins = Margins(scenario)
    hit = rule.tasks if rule.hit is None else rule.hit
    size = rule.items // rule.tasks
    groups = [i // scenario.passage for i in range(size)] if rule.by_passage else None
    largest = scenario.passage if rule.by_passage else 1
    for run in range(runs):
        rng = np.random.default_rng((seed, run))
        bets, path = [EProcess(rule.tolerance, largest_group=largest) for _ in range(rule.tasks)], []
        changed: list[float] = []
        for k in range(LOOKS):
            for task, bet in enumerate(bets):
                dropped = k >= scenario.start and task < hit
                base, model = margins.look(rng, dropped, size)
                changed += filter(None, accuracy_difference(base, model))
                bet.update(difference(base, model), LOOKS - k if rule.planned else None, groups)
            e_value = mean_e_value([bet.e_value for bet in bets])
            flips = (changed.count(1.0), changed.count(-1.0)) if rule.by_answers else (1, 0)
            path.append(Look(e_value, raises_alarm(e_value, ALPHA, *flips)))
            if path[-1].alarm and not whole:
                break
        yield path


def alarm_looks(
    scenario: Scenario,
    difference: Difference = soft_difference,
    rule: Rule = Rule(),
    runs: int = 1000,
) -> list[int | None]:
    """The look of each run's alarm, from 1; None without one."""
    return [len(path) if path[-1].alarm else None for path in paths(scenario, difference, rule, runs)]


def share(alarms: Sequence[int | None], within: int = LOOKS) -> float:
    """Share of runs with an alarm within so many looks."""
    return sum(look is not None and look <= within for look in alarms) / len(alarms)


def table(runs: int) -> None:
    """The three statistics, at tolerance 0: the monitor's rule, and the bet alone on the other two."""
    rule = {name: Rule(by_answers=name == "soft accuracy") for name in STATISTICS}
    print(f"| {LOOKS} looks of {ITEMS} items, {runs} runs | " + " | ".join(STATISTICS) + " |")
    print("|---|" + "---|" * len(STATISTICS))
    for scenario in NULLS:
        cells = [f"{share(alarm_looks(scenario, by, rule[name], runs)):.3f}" for name, by in STATISTICS.items()]
        print(f"| {scenario.name}: false alarms | " + " | ".join(cells) + " |", flush=True)
    for scenario in DROPS:
        found = [alarm_looks(scenario, by, rule[name], runs) for name, by in STATISTICS.items()]
        cells = [f"{share(alarms, FIND_LOOKS):.3f} ({median(alarms)})" for alarms in found]
        print(f"| {scenario.name}: found in {FIND_LOOKS} looks (median look) | " + " | ".join(cells) + " |", flush=True)


def uneven(runs: int) -> None:
    """Confidence that moves otherwise from item to item: the bet alone, and with the answers that it must show."""
    columns = {
        f"{'the rule' if by else 'capital alone'}, tolerance {tolerance:g}": Rule(tolerance, by_answers=by)
        for tolerance in (0.0, 0.005)
        for by in (False, True)
    }
    print(f"| false alarms, {runs} runs | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for scenario in UNEVEN:
        cells = [f"{share(alarm_looks(scenario, rule=rule, runs=runs)):.3f}" for rule in columns.values()]
        print(f"| {scenario.name} | {' | '.join(cells)} |", flush=True)


def rules(runs: int) -> None:
    """What the settings of the bet do, on soft accuracy."""
    at_tolerance = Scenario("half a point lost", drop=0.005)
    two, late = DROPS[0], Scenario("two points lost from the eleventh look on", drop=0.02, start=10)
    head = ["false alarms, no drop", "half a point lost", f"two points: in {FIND_LOOKS} looks", "in 16 looks"]
    print(f"| {runs} runs | " + " | ".join([*head, "lost at look 11: in 8 more"]) + " |\n" + "|---" * 6 + "|")
    for name, rule in SETTINGS.items():
        found = alarm_looks(two, rule=rule, runs=runs)
        cells = [
            share(alarm_looks(NULLS[0], rule=rule, runs=runs)),
            share(alarm_looks(at_tolerance, rule=rule, runs=runs)),
            share(found, FIND_LOOKS),
            share(found, 16),
            share(alarm_looks(late, rule=rule, runs=runs), late.start + 8),
        ]
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


def passages(runs: int) -> None:
    """Items that lean on each other: a stake on each, and one on each passage."""
    stakes = {
        f"{'each passage' if by else 'each item'}, tolerance {tolerance:g}": Rule(tolerance, by_passage=by)
        for tolerance in (0.0, 0.005)
        for by in (False, True)
    }
    size = PASSAGES[0].passage
    head = [f"{ITEMS // size} passages of {size} items a look, {runs} runs", *(found.name for found in PASSAGES)]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for name, rule in stakes.items():
        cells = [f"{share(alarm_looks(scenario, rule=rule, runs=runs)):.3f}" for scenario in PASSAGES]
        print(f"| stake on {name} | " + " | ".join(cells) + " |", flush=True)


def median(alarms: Sequence[int | None]) -> str:
    """The look by which half of the runs have raised the alarm."""
    looks = sorted(math.inf if look is None else look for look in alarms)
    middle = looks[len(looks) // 2]
    return str(middle) if middle < math.inf else "none"


def figures(folder: Path) -> None:
    """The pictures of docs/concepts/forgetting_statistics.md."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9})
    folder.mkdir(parents=True, exist_ok=True)
    draw_soft_accuracy().savefig(folder / "soft_accuracy.png", dpi=150)
    draw_bets().savefig(folder / "e_process.png", dpi=150)
    draw_items().savefig(folder / "required_items.png", dpi=150)


def draw_soft_accuracy() -> Any:
    """The curve, and what a change of confidence alone does to four statistics."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    x = np.linspace(-2, 2, 401)
    left.step([-2, 0, 2], [0, 0, 1], where="pre", color="0.6", label="accuracy")
    left.plot(x, 1 / (1 + np.exp(-1.702 * x / 0.5)), color="C0", label="soft accuracy, h = 0.5")
    left.set(xlabel="margin, in standard deviations of the look", ylabel="value of the item")
    left.legend(frameon=False)
    factors = np.geomspace(0.5, 2, 13)
    margins = Margins(Scenario("no drop"))
    base, model = margins.look(np.random.default_rng(0), False, 4000)
    rows: dict[str, Callable[[Sequence[float]], Sequence[float]]] = {
        "raw margin / 4 sd": lambda m: np.clip(np.array(m) / (4 * np.std(base)), -1, 1).tolist(),
        "choice probability": lambda m: (1 / (1 + np.exp(-np.array(m)))).tolist(),
        "accuracy": lambda m: [float(value > 0) for value in m],
        "soft accuracy": soft_accuracy,
    }
    for color, (name, value) in zip(("C3", "C1", "0.6", "C0"), rows.items(), strict=True):
        found = [paired_difference(value([f * m for m in model]), value(base)) for f in factors]
        delta, error = (100 * np.array(column) for column in zip(*found, strict=True))
        right.plot(factors, delta, color=color, label=name, linestyle="--" if name == "accuracy" else "-")
        right.fill_between(factors, delta - 1.96 * error, delta + 1.96 * error, color=color, alpha=0.15, linewidth=0)
    right.axhline(0, color="black", linewidth=0.5)
    right.set_xscale("log", base=2)
    right.set_xticks([0.5, 0.8, 1, 1.25, 2], ["0.5", "0.8", "1", "1.25", "2"])
    right.minorticks_off()
    right.set(xlabel="factor of every margin: no answer changes", ylabel="model less base [points]")
    right.legend(frameon=False)
    return figure


def draw_bets() -> Any:
    """The capital of thirty runs each."""
    import matplotlib.pyplot as plt

    shown = {
        "no drop": (NULLS[0], soft_difference),
        "two points lost from the eleventh look on": (Scenario("late", drop=0.02, start=10), soft_difference),
        "no drop, -20 % confidence, raw margins": (NULLS[2], margin_difference),
    }
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), sharey=True, layout="constrained")
    for ax, (title, (scenario, difference)) in zip(axes, shown.items(), strict=True):
        for path in paths(scenario, difference, runs=30, whole=True):
            capital = [1.0, *(look.e_value for look in path)]
            alarm = next((k for k, e in enumerate(capital) if e >= LEVEL), None)
            ax.plot(range(LOOKS + 1), capital, color="C0" if alarm is None else "C3", linewidth=0.8, alpha=0.7)
        ax.axhline(LEVEL, color="black", linestyle="--", linewidth=0.8)
        ax.set(yscale="log", ylim=(0.02, 1e5), xlim=(0, LOOKS), xlabel=f"look, {ITEMS} fresh items each")
        ax.set_title(title, fontsize=9)
    axes[0].set_ylabel("e-value")
    axes[0].text(0.3, 1.15 * LEVEL, r"alarm: 1/$\alpha$ = 20", va="bottom")
    return figure


def draw_items() -> Any:
    """Items for a drop, by what is compared."""
    import matplotlib.pyplot as plt

    margins = Margins(Scenario("no drop"))
    base, model = margins.look(np.random.default_rng(0), False, 20_000)
    _, error = paired_difference(soft_accuracy(model), soft_accuracy(base))
    # A drop is a little smaller in soft accuracy than in accuracy.
    moved = [m - 0.05 for m in base]
    ratio = -paired_difference(soft_accuracy(moved), soft_accuracy(base))[0]
    ratio /= -paired_difference([float(m > 0) for m in moved], [float(m > 0) for m in base])[0]
    drops = np.linspace(0.004, 0.05, 47)
    lines = {
        "two separate accuracies": [required_items(d, unpaired_sd(ACCURACY)) for d in drops],
        "paired accuracy, one answer in ten changed": [required_items(d, paired_sd(FLIPS, d)) for d in drops],
        "paired soft accuracy": [required_items(ratio * d, error * math.sqrt(len(base))) for d in drops],
    }
    figure, ax = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    for color, (name, needed) in zip(("0.6", "C1", "C0"), lines.items(), strict=True):
        ax.plot(100 * drops, needed, color=color, label=name)
    ax.set(yscale="log", xlabel="drop to be found [points]", ylabel="items (level 5 %, power 80 %)", xlim=(0, 5))
    ax.legend(frameon=False)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--tiny", action="store_true", help="a few runs, to see that the script works")
    parser.add_argument("--figures", type=Path, help="draw the pictures into this folder instead of printing tables")
    arguments = parser.parse_args()
    if arguments.figures:
        figures(arguments.figures)
    else:
        count = 3 if arguments.tiny else arguments.runs
        table(count)
        print()
        uneven(max(1, count // 4))
        print()
        rules(max(1, count // 4))
        print()
        passages(count)
