# SPDX-License-Identifier: Apache-2.0
"""torchmetrics classes give what the pure functions give, over any split in batches and ranks, and draw it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics import Metric, MetricCollection

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting import statistics, transfer
from lightning_lora.forgetting.metrics import EValue, Flips, ForgettingOverLooks, PairedAccuracy, SoftDelta
from lightning_lora.forgetting.sequential import EProcess

N, LOOKS = 60, 3


def items() -> dict[str, torch.Tensor]:
    """Margins and answers of a base and of a model that is worse, in three looks."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(N, generator=generator, dtype=torch.float64)
    model = base - 0.6 * torch.rand(N, generator=generator, dtype=torch.float64)
    return {
        "base": base, "model": model, "right": (model > 0).double(), "right_base": (base > 0).double(),
        "group": torch.arange(N) // 4, "n_choices": 2 + torch.arange(N) % 3, "look": torch.arange(N) // (N // LOOKS),
    }  # fmt: skip


def fed(part: slice) -> dict[str, Metric]:
    """Every metric, fed look by look with a part of each look's items."""
    metrics: dict[str, Metric] = {
        "accuracy": PairedAccuracy(), "grouped": PairedAccuracy(grouped=True), "flips": Flips(),
        "adjusted": Flips(adjusted=True), "soft": SoftDelta(), "e_value": EValue(looks=LOOKS),
        "e_value_open": EValue(tolerance=0.01), "e_value_grouped": EValue(largest_group=4),
        "forgetting": ForgettingOverLooks(),
    }  # fmt: skip
    found = items()
    for look in range(LOOKS):
        x = {name: column[found["look"] == look][part] for name, column in found.items()}
        metrics["accuracy"].update(x["right"], x["right_base"])
        metrics["grouped"].update(x["right"], x["right_base"], x["group"])
        metrics["flips"].update(x["right"], x["right_base"])
        metrics["adjusted"].update(x["right"], x["right_base"], x["n_choices"])
        metrics["soft"].update(x["model"], x["base"])
        metrics["e_value"].update(x["model"], x["base"], look)
        metrics["e_value_open"].update(x["model"], x["base"], look)
        metrics["e_value_grouped"].update(x["model"], x["base"], look, x["group"])
        metrics["forgetting"].update(x["right"], look)
    return metrics


def computed(metrics: dict[str, Metric]) -> dict[str, Any]:
    """Plain numbers."""
    found = {name: metric.compute() for name, metric in metrics.items()}
    return {n: {k: float(x) for k, x in v.items()} if isinstance(v, dict) else float(v) for n, v in found.items()}


def expected() -> dict[str, Any]:
    """The same by the pure functions."""
    x = {name: column.tolist() for name, column in items().items()}
    right, right_base = x["right"], x["right_base"]

    def capital(tolerance: float, planned: bool, largest: int = 1) -> float:
        bet, n = EProcess(tolerance, largest_group=largest), N // LOOKS
        for k in range(LOOKS):
            soft, soft_base = (statistics.soft_accuracy(x[who][k * n : (k + 1) * n]) for who in ("model", "base"))
            groups = x["group"][k * n : (k + 1) * n] if largest > 1 else None
            bet.update([b - m for m, b in zip(soft, soft_base, strict=True)], LOOKS - k if planned else None, groups)
        return bet.e_value

    delta, se = statistics.paired_difference(right, right_base)
    soft = statistics.paired_difference(statistics.soft_accuracy(x["model"]), statistics.soft_accuracy(x["base"]))
    grouped_se = statistics.paired_difference(right, right_base, x["group"])[1]
    shares = {
        "acc": statistics.accuracy(right), "acc_base": statistics.accuracy(right_base), "delta": delta,
        "p_value": statistics.mcnemar_p(*statistics.flips(right, right_base)),
    }  # fmt: skip
    by_look = [statistics.accuracy(right[k * 20 : (k + 1) * 20]) for k in range(LOOKS)]
    lost, gained = statistics.flips(right, right_base)
    adjusted = statistics.chance_adjusted_flips(right, right_base, x["n_choices"])
    return {
        "accuracy": {**shares, "delta_se": se},
        "grouped": {**shares, "delta_se": grouped_se, "p_value": statistics.grouped_p(delta, grouped_se, N // 4)},
        "flips": {"lost": lost, "gained": gained},
        "adjusted": {"lost": adjusted[0], "gained": adjusted[1]},
        "soft": {"soft_delta": soft[0], "soft_delta_se": soft[1]},
        "e_value": capital(0.005, planned=True),
        "e_value_open": capital(0.01, planned=False),
        "e_value_grouped": capital(0.005, planned=False, largest=4),
        "forgetting": {
            "forgetting": transfer.forgetting_measure(by_look),
            "backward_transfer": by_look[-1] - by_look[0],
        },
    }


def test_metrics_are_the_pure_functions() -> None:
    found, wanted = computed(fed(slice(None))), expected()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    assert wanted["flips"]["lost"] > 0
    assert wanted["e_value"] > 1


def _on_rank(rank: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=2)
    found = computed(fed(slice(rank, None, 2)))
    (Path(out) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def test_two_ranks_with_half_the_items_each_give_the_numbers_of_one(tmp_path: Path) -> None:
    mp.start_processes(_on_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        found = pickle.loads((tmp_path / f"{rank}.pickle").read_bytes())
        for name, value in expected().items():
            assert found[name] == pytest.approx(value, rel=1e-6), name


def test_reset_and_state_are_torchmetrics() -> None:
    metric = PairedAccuracy()
    metric.persistent(True)
    first = metric(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert float(first["delta"]) == -0.5
    metric.update(torch.tensor([0.0]), torch.tensor([1.0]))
    again = PairedAccuracy()
    again.load_state_dict(metric.state_dict())
    assert float(metric.compute()["delta"]) == pytest.approx(-2 / 3)
    metric.reset()
    metric.update(torch.tensor([1.0]), torch.tensor([1.0]))
    assert float(metric.compute()["acc"]) == 1.0
    both = MetricCollection({"flips": Flips(), "accuracy": PairedAccuracy()})
    both.update(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    assert {"lost", "gained", "acc", "p_value"} <= both.compute().keys()


@pytest.mark.parametrize("name", list(fed(slice(None))))
def test_metrics_draw_one_value_and_several(name: str) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    metric = fed(slice(None))[name]
    figure, axes = metric.plot()
    assert axes is not None
    figure, axes = metric.plot([metric.compute(), metric.compute()])
    assert len(axes.lines) >= 1
    plt.close("all")


def test_what_does_not_fit_is_refused() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ConfigError, match=r"PairedAccuracy takes flat tensors .*\(2,\).*\(3,\)"):
        PairedAccuracy().update(two, three)
    with pytest.raises(ConfigError, match="flat"):
        SoftDelta().update(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="grouped=True"):
        PairedAccuracy(grouped=True).update(two, two)
    with pytest.raises(ConfigError, match="adjusted=False"):
        Flips().update(two, two, two)
    with pytest.raises(ConfigError, match="tolerance"):
        EValue(tolerance=-1)
    with pytest.raises(ConfigError, match="looks=0"):
        EValue(looks=0)
