# SPDX-License-Identifier: Apache-2.0
"""Looks, verdicts, the cache of the base, alarms and state, without a Trainer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.errors import ConfigError, Notice
from lightning_lora.forgetting import statistics
from lightning_lora.forgetting.monitor import Monitor, drop_p
from lightning_lora.forgetting.remedies import holds
from lightning_lora.forgetting.report import Report, TaskReport, compare
from lightning_lora.forgetting.scoring import ItemScore, Scorer
from lightning_lora.forgetting.sizes import Sizes
from lightning_lora.forgetting.tasks import LoadedTask, load_tasks
from lightning_lora.model.slots import adapter_modules
from tests.forgetting import tiny


@pytest.fixture
def scored(tokenizer: Any) -> Callable[..., tuple[Scorer, list[int]]]:
    """A scorer over a model, and the number of rows of each forward."""

    def make(model: nn.Module, after: Callable[[Tensor], Tensor] = lambda x: x) -> tuple[Scorer, list[int]]:
        rows: list[int] = []

        def forward(module: nn.Module, ids: Tensor) -> Tensor:
            rows.append(len(ids))
            return after(module(ids).logits)

        return Scorer(model, tokenizer, forward=forward), rows

    return make


def test_untrained_adapters_show_no_difference_and_no_notice(
    loaded: dict[str, LoadedTask], tokenizer: Any, recwarn: pytest.WarningsRecorder
) -> None:
    report = Monitor(loaded, items_per_look=30).look(Scorer(tiny.adapted(), tokenizer), step=0)
    assert (report.pooled.delta, report.pooled.delta_se, report.pooled.soft_delta) == (0.0, 0.0, 0.0)
    assert (report.pooled.flips_lost, report.pooled.flips_gained, report.pooled.p_value) == (0, 0, 1.0)
    assert {name: task.n_items for name, task in report.tasks.items()} == {"alpha": 20, "beta": 10}
    assert report.pooled.n_items == 30
    assert not [w for w in recwarn if issubclass(w.category, Notice)]


def test_a_model_that_is_not_its_base_at_step_0_is_named(
    loaded: dict[str, LoadedTask], scored: Callable[..., tuple[Scorer, list[int]]]
) -> None:
    scorer, _ = scored(tiny.adapted(), lambda logits: logits + torch.randn(logits.shape) * 1e-3)
    with pytest.warns(Notice, match="adapters are untrained, yet 30 of 30 items"):
        Monitor(loaded, items_per_look=30).look(scorer, step=0)


def test_verdict_agrees_with_the_items(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    model = tiny.adapted(0.3)
    scorer = Scorer(model, tokenizer)
    monitor = Monitor(loaded)
    report = monitor.verdict(scorer, step=7)
    bank = monitor.bank.sample()
    with scorer.quietly():
        on = scorer.score(loaded, bank)
        for _, module in adapter_modules(model):
            module.enabled = False
        off = scorer.score(loaded, bank)
    for name, task in report.tasks.items():
        assert task == compare(on[name], off[name])
        right, right_base = ([s.correct for s in side[name]] for side in (on, off))
        assert task.flips_lost == sum(b > a for a, b in zip(right, right_base, strict=True)) > 0
        assert task.delta == pytest.approx((sum(right) - sum(right_base)) / len(right))
    weighted = sum(t.delta * t.n_items for t in report.tasks.values()) / 60
    soft = sum(t.soft_delta * t.n_items for t in report.tasks.values()) / 60
    assert report.pooled.delta == pytest.approx(weighted)
    assert report.pooled.soft_delta == pytest.approx(soft)
    assert (report.kind, report.step, report.pooled.n_items) == ("verdict", 7, 60)


def test_base_is_asked_once_for_an_item_in_full_precision(
    loaded: dict[str, LoadedTask], scored: Callable[..., tuple[Scorer, list[int]]]
) -> None:
    scorer, rows = scored(tiny.adapted(0.1))
    monitor = Monitor(loaded, items_per_look=60)
    monitor.look(scorer, step=1)
    model_and_base = sum(rows)
    rows.clear()
    monitor.verdict(scorer, step=2)
    assert sum(rows) == model_and_base / 2


def test_base_is_asked_in_the_models_batches_in_16_bits(
    loaded: dict[str, LoadedTask], scored: Callable[..., tuple[Scorer, list[int]]]
) -> None:
    scorer, rows = scored(tiny.adapted(0.1), lambda logits: logits.bfloat16())
    monitor = Monitor(loaded, items_per_look=30)
    for step in (1, 2, 3):
        rows.clear()
        (monitor.look if step < 3 else monitor.verdict)(scorer, step)
        assert rows[: len(rows) // 2] == rows[len(rows) // 2 :]


def test_no_item_twice_over_looks_and_a_resume(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    scorer = Scorer(tiny.adapted(0.1), tokenizer)
    first, whole = Monitor(loaded, items_per_look=12), Monitor(loaded, items_per_look=12)
    for step in (1, 2):
        first.look(scorer, step, left=6 - step)
    state = json.loads(json.dumps(first.state_dict()))  # primitives only
    second = Monitor(loaded, items_per_look=12)
    second.load_state_dict(state)
    for step in (3, 4):
        second.look(scorer, step, left=6 - step)
    for step in (1, 2, 3, 4):
        whole.look(scorer, step, left=6 - step)

    def untimed(monitor: Monitor) -> list[dict[str, Any]]:
        return [{**r.to_dict(), "seconds": 0} for r in monitor.history]

    assert untimed(second) == untimed(whole)
    assert second.last_step == 4
    assert second.e_value == whole.e_value != 1.0


def test_state_of_another_bank_begins_the_looks_again(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    monitor = Monitor(loaded, items_per_look=12)
    monitor.look(Scorer(tiny.adapted(0.3), tokenizer), 1)
    other = Monitor(loaded, items_per_look=12, seed=1)
    with pytest.warns(Notice, match="another `seed`"):
        other.load_state_dict(monitor.state_dict())
    assert (other.bank.fresh, other.e_value, len(other.history)) == (60, 1.0, 1)
    other = Monitor(loaded, items_per_look=12, tolerance=0.1)
    with pytest.warns(Notice, match="evidence for an alarm begins anew.*tolerance"):
        other.load_state_dict(monitor.state_dict())
    assert (other.bank.fresh, other.e_value) == (48, 1.0)
    other = Monitor(loaded, items_per_look=20)  # larger looks go on where the smaller ones stopped
    other.load_state_dict(monitor.state_dict())
    assert (other.bank.fresh, other.e_value) == (48, monitor.e_value)


def test_the_bases_scores_are_in_the_state(
    loaded: dict[str, LoadedTask], scored: Callable[..., tuple[Scorer, list[int]]]
) -> None:
    scorer, rows = scored(tiny.adapted(0.1))
    first, second = Monitor(loaded, items_per_look=60), Monitor(loaded, items_per_look=60)
    first.look(scorer, step=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rows.clear()
    found = second.verdict(scorer, step=2)
    asked = sum(rows)
    rows.clear()
    assert {**found.to_dict(), "seconds": 0} == {**first.verdict(scorer, step=2).to_dict(), "seconds": 0}
    assert asked == sum(rows)


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory, task_folder: Path) -> dict[str, LoadedTask]:
    """A task of 15 passages with 1 to 5 questions each, mixed up, beside one whose items stand alone."""
    of = [passage for passage in range(15) for _ in range(1 + passage % 5)]
    random.Random(0).shuffle(of)
    docs = [{**doc, "passage": f"passage {p}"} for doc, p in zip(tiny.items(len(of), seed=1), of, strict=True)]
    path = tiny.write_task(tmp_path_factory.mktemp("p"), "passages", docs, metadata={"cluster_by": "passage"})
    return load_tasks([str(path), str(task_folder / "beta.yaml")])


def test_passages_come_whole_and_count_as_one_each(passages: dict[str, LoadedTask], tokenizer: Any) -> None:
    scorer = Scorer(tiny.adapted(0.3), tokenizer)
    taken: list[set[str | None]] = []

    def record(report: Report, model: Any, base: Any) -> None:
        taken.append({score.group for score in model["passages"]})
        found = report.tasks["passages"]
        assert found.n_groups == len(taken[-1]) < found.n_items
        whole = [i for i, group in enumerate(passages["passages"].groups() or []) if group in taken[-1]]
        assert [score.doc_id for score in model["passages"]] == whole

    monitor = Monitor(passages, items_per_look=20, recorders=[record])
    sizes = Sizes(monitor, None, verdict=True, tries=0)
    for step in (1, 2, 3):
        foretold = sizes.look_passes(None)
        report = monitor.look(scorer, step, left=4 - step)
        assert foretold == 2 * report.pooled.n_items
        assert report.pooled.n_groups == report.tasks["passages"].n_independent + report.tasks["beta"].n_items
    assert not taken[0] & taken[1] | taken[1] & taken[2]
    assert [bet.largest_group for bet in monitor.bets.values()] == [5, 1]

    again = Monitor(passages, items_per_look=20)
    again.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert again.look(scorer, 4).to_dict()["e_values"] == monitor.look(scorer, 4).to_dict()["e_values"]

    verdict = monitor.verdict(scorer, 5)
    grouped, alone = verdict.tasks["passages"], verdict.tasks["beta"]
    assert (grouped.p_from, alone.p_from, verdict.pooled.p_from) == ("grouped z", "mcnemar", "grouped z")
    assert verdict.p_holm == statistics.holm({"passages": grouped.p_value, "beta": alone.p_value})
    assert verdict.metrics()["forgetting/passages/n_groups"] == 15.0
    assert "forgetting/beta/n_groups" not in verdict.metrics()
    assert Report.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_items_that_come_again_are_named_and_said_once(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    scorer, monitor = Scorer(tiny.adapted(), tokenizer), Monitor(loaded, items_per_look=30)
    assert [monitor.look(scorer, step).again for step in (1, 2)] == [[], []]
    with pytest.warns(Notice, match="every item of alpha, beta has been looked at; from here on items come again") as w:
        assert [monitor.look(scorer, step).again for step in (3, 4)] == [["alpha", "beta"]] * 2
    assert len([x for x in w if "come again" in str(x.message)]) == 1


def test_target_tasks_are_learning_and_raise_no_alarm(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    tasks, targets = {"alpha": loaded["alpha"]}, {"beta": loaded["beta"]}
    scorer = Scorer(tiny.adapted(0.3), tokenizer)
    report = Monitor(tasks, items_per_look=10, targets=targets).look(scorer, 1)
    both = Monitor(targets, items_per_look=10).look(scorer, 1)
    assert report.learning == both.tasks
    assert list(report.tasks) == list(report.e_values) == ["alpha"]
    assert report.metrics()["learning/beta/delta"] == both.tasks["beta"].delta
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_observers_and_recorders_are_told(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    class Draws:
        def measure(self, scorer: Scorer, step: int) -> dict[str, float]:
            assert not torch.is_grad_enabled()
            assert not scorer.module.training
            torch.rand(3)
            return {"forgetting/kl": 0.25 * step}

    told = []
    monitor = Monitor(loaded, items_per_look=12, observers=[Draws()], recorders=[lambda *args: told.append(args)])
    scorer = Scorer(tiny.adapted(0.1), tokenizer)
    before = torch.get_rng_state()
    report = monitor.look(scorer, 4)
    assert torch.equal(before, torch.get_rng_state())
    assert report.metrics()["forgetting/kl"] == 1.0
    (said, model, base), *rest = told
    assert not rest
    assert said is report
    assert report.tasks["beta"] == compare(model["beta"], base["beta"])


def test_report_round_trips_and_names_its_metrics(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    monitor = Monitor(loaded, items_per_look=30)
    scorer = Scorer(tiny.adapted(0.2), tokenizer)
    look, verdict = monitor.look(scorer, 1), monitor.verdict(scorer, 2)
    assert Report.from_dict(json.loads(json.dumps(look.to_dict()))) == look
    fields = {"acc", "acc_base", "delta", "delta_se", "flips_lost", "flips_gained", "soft_delta", "n_items"}
    expected = {f"forgetting/{name}/{f}" for name in ("alpha", "beta", "pooled") for f in fields}
    assert set(look.metrics()) >= expected | {"forgetting/e_value", "forgetting/seconds"}
    assert {key for key in look.metrics() if key.count("/") == 2} == expected
    assert set(verdict.metrics()) - set(look.metrics()) >= {"forgetting/alpha/p_value", "forgetting/beta/p_holm"}
    assert "alpha" in look.summary()
    assert "step 1" in look.summary()


def score(correct: float, margin: float, number: int) -> ItemScore:
    return ItemScore(number, (str(number), ""), (), correct, margin)


def test_the_verdicts_test_finds_a_real_drop_and_no_other() -> None:
    """250 made-up items: every fifth right answer lost, or none, or one of five items."""
    generator = torch.Generator().manual_seed(0)
    margins = torch.randn(250, generator=generator) + 0.5
    base = [score(float(m > 0), float(m), i) for i, m in enumerate(margins)]
    hurt = [score(0.0, -abs(s.margin), i) if i % 5 == 0 else s for i, s in enumerate(base)]
    assert drop_p(compare(hurt, base), 0.005) < 1e-6
    assert drop_p(compare(base, base), 0.0) == 0.5
    assert drop_p(compare(base, base), 0.005) > 0.5
    assert drop_p(compare(base, hurt), 0.005) > 0.999
    few = [score(1.0, 1.0, i) for i in range(5)]
    assert drop_p(compare([*few[:4], score(0.0, -1.0, 4)], few), 0.005) > 0.05


def test_verdict_over_a_part_of_the_bank_says_so(loaded: dict[str, LoadedTask], tokenizer: Any) -> None:
    monitor, scorer = Monitor(loaded, items_per_look=15), Scorer(tiny.adapted(0.3), tokenizer)
    look = monitor.look(scorer, 1)
    part, whole = monitor.verdict(scorer, 2, items=30), monitor.verdict(scorer, 2)
    assert (look.left_out, part.left_out, whole.left_out) == (0, 30, 0)
    assert (part.pooled.n_items, whole.pooled.n_items) == (30, 60)
    assert "30 items of the bank left out: beyond the time budget" in part.summary()
    assert "left out" not in whole.summary()


def test_broken_model_alarms(loaded: dict[str, LoadedTask], scored: Callable[..., tuple[Scorer, list[int]]]) -> None:
    model = tiny.adapted(0.1)
    on = next(module for _, module in adapter_modules(model))
    scorer, _ = scored(model, lambda logits: logits * float("nan") if on.enabled else logits)
    report = Monitor(loaded, items_per_look=60).look(scorer, 5)
    assert "pooled" in report.alarms
    assert report.pooled.acc == 0.0
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_alarm_needs_answers_lost_and_not_confidence_alone(tmp_path: Path, tokenizer: Any) -> None:
    """Margins are multiplied item by item: by 10 where the base is wrong, and by -1 on some that it has right."""
    model = tiny.adapted(1e-6)
    on = next(module for _, module in adapter_modules(model))
    factors: dict[int, float] = {}

    def forward(module: nn.Module, ids: Tensor) -> Tensor:
        logits = module(ids).logits
        if not on.enabled:
            return logits
        keys = (ids[:, :3] * torch.tensor([90_000, 300, 1])).sum(1).tolist()
        return logits * torch.tensor([factors[key] for key in keys]).view(-1, 1, 1)

    scorer = Scorer(model, tokenizer, forward=forward)
    docs = [{"context": f"{i:03d}", "choices": ["a", "b"], "gold": 0} for i in range(180)]
    keys = [sum(90_000 // 300**k * token for k, token in enumerate(tokenizer.encode(doc["context"]))) for doc in docs]
    assert len(set(keys)) == len(docs)

    def load(name: str) -> dict[str, LoadedTask]:
        return load_tasks(tiny.write_task(tmp_path, name, docs, target_delimiter=""))

    first = load("first")
    with scorer.quietly(), scorer.base():
        margins = [s.margin for s in scorer.score(first, {"first": range(180)})["first"]]
    for i, (doc, margin) in enumerate(zip(docs, margins, strict=True)):
        doc["gold"] = int((margin > 0) != (i % 4 > 0))  # three in four right
    task = load("uneven")
    confident = {key: 10.0 if i % 4 == 0 else 1.0 for i, key in enumerate(keys)}
    losing = {key: -1.0 if i % 4 == 1 else confident[key] for i, key in enumerate(keys)}
    factors |= confident
    calm, other = Monitor(task, items_per_look=20), Monitor(task, items_per_look=20)
    looks = [calm.look(scorer, step, left=8 - step) for step in range(6)]
    assert all((look.pooled.flips_lost, look.pooled.flips_gained, look.alarms) == (0, 0, []) for look in looks)
    assert calm.e_value > 1000
    other.load_state_dict(json.loads(json.dumps(calm.state_dict())))
    factors |= losing
    for monitor in (calm, other):
        assert monitor.look(scorer, 6, left=2).alarms == ["pooled"]
    factors |= confident
    assert other.look(scorer, 7, left=1).alarms == ["pooled"]  # what earlier looks lost still counts
    other.begin_anew()
    assert other.look(scorer, 8, left=1).alarms == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tolerance": -0.1}, "`tolerance`.*got -0.1"),
        ({"tolerance": 1.0}, "`tolerance`.*got 1.0"),
        ({"alpha": 0.0}, "`alpha`.*got 0.0"),
        ({"items_per_look": 0}, "`items_per_eval`.*got 0"),
    ],
)
def test_values_out_of_range_are_refused(loaded: dict[str, LoadedTask], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Monitor(loaded, **kwargs)


def found(delta: float, soft: float | None = None, error: float = 0.01, n: int = 400) -> TaskReport:
    soft = delta if soft is None else soft
    return TaskReport(0.5 + delta, 0.5, delta, error, 0, 0, soft, error, n, 1.0)


@pytest.mark.parametrize(
    ("pooled", "tasks", "expected"),
    [
        (found(-0.004), {"a": found(0.01), "b": found(-0.018)}, True),  # one task by chance
        (found(0.02), {"a": found(-0.25), "b": found(0.3)}, False),  # one has collapsed, the other hides it
        (found(0.0), {"a": found(0.0, soft=-0.1), "b": found(0.0)}, True),  # not an answer less
        (found(0.0, soft=-0.0085), {"a": found(0.0, soft=-0.0085)}, True),  # confidence moved, no answer did
        (found(-0.001, soft=-0.0085), {"a": found(-0.001, soft=-0.0085)}, False),
        (found(0.0), {"a": found(-0.01, soft=-0.1), "b": found(0.01)}, False),
        (found(-0.006), {"a": found(-0.006)}, False),
        (found(-0.004), {"a": found(-0.004, error=0.0, n=400)}, True),
        (found(-0.001), {"a": found(-0.2, error=0.0, n=4), "b": found(0.0)}, True),  # four items say little
    ],
)
def test_a_model_holds_together_and_in_every_task(pooled: TaskReport, tasks: dict, expected: bool) -> None:
    assert holds(pooled, tasks, 0.005) is expected
