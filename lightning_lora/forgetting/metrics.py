# SPDX-License-Identifier: Apache-2.0
"""The statistics as torchmetrics: fed batch by batch, put together over ranks, plotted.

Each keeps its items (a number or two for each) and computes what the pure functions say of all of them, so that any
split over batches and ranks gives the numbers of one process::

    flips = Flips()
    flips.update(model=torch.tensor([0.0, 1.0]), base=torch.tensor([1.0, 1.0]))
    flips.compute()  # {"lost": 1, "gained": 0}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from lightning_lora.errors import ConfigError
from lightning_lora.forgetting import statistics, transfer
from lightning_lora.forgetting.sequential import BETS, EProcess


class _Items(Metric):
    """Columns of one number for each item, kept until `compute`; in float64, since they are few and are compared."""

    is_differentiable = False
    full_state_update = False

    def __init__(self, *columns: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._columns = columns
        for name in columns:
            self.add_state(f"{name}_items", default=[], dist_reduce_fx="cat")

    def _keep(self, **columns: Tensor) -> None:
        """Keep one more batch.

        Raises:
            ConfigError: if the columns are not as long as each other, or not flat.
        """
        shapes = {name: tuple(column.shape) for name, column in columns.items()}
        if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise ConfigError(f"{type(self).__name__} takes flat tensors with a value for each item: got {shapes}.")
        for name, column in columns.items():
            getattr(self, f"{name}_items").append(column.detach().to(torch.float64))

    def _lists(self) -> list[list[float]]:
        kept = [getattr(self, f"{name}_items") for name in self._columns]
        return [dim_zero_cat(column).tolist() if len(column) else [] for column in kept]

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw the value, or several (one for each step), with matplotlib.

        Args:
            val: what `compute` or `forward` gave, or a list of these; None computes.
            ax: matplotlib axes to draw on; None makes a figure.

        Returns:
            The figure and its axes.
        """
        return self._plot(val, ax)


class PairedAccuracy(_Items):
    """Accuracy of model and base on the same items: `statistics.paired_difference` and a test.

    ``compute`` gives ``acc``, ``acc_base``, ``delta``, ``delta_se`` [share of items] and ``p_value``, by
    `statistics.mcnemar_p`, or by `statistics.grouped_p` where items are grouped.

    Args:
        grouped: ``update`` gets the group of each item (such as its passage, as a number).
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, grouped: bool = False, **kwargs: Any) -> None:
        super().__init__("model", "base", *(("group",) if grouped else ()), **kwargs)
        self.grouped = grouped

    @override
    def update(self, model: Tensor, base: Tensor, group: Tensor | None = None) -> None:
        """Take a batch of items.

        Args:
            model: 1 or 0 for each item, of the model. Shape: (items,)
            base: the same of the base. Shape: (items,)
            group: the group of each item, where `grouped`. Shape: (items,)
        """
        if self.grouped != (group is not None):
            raise ConfigError(
                f"PairedAccuracy(grouped={self.grouped}) got group={'some' if not self.grouped else None}."
            )
        self._keep(model=model, base=base, **({} if group is None else {"group": group}))

    @override
    def compute(self) -> dict[str, Tensor]:
        model, base, *group = self._lists()
        delta, delta_se = statistics.paired_difference(model, base, *group)
        if group:
            p_value = statistics.grouped_p(delta, delta_se, len(set(group[0])))
        else:
            p_value = statistics.mcnemar_p(*statistics.flips(model, base))
        return _tensors(
            self.device,
            acc=statistics.accuracy(model),
            acc_base=statistics.accuracy(base),
            delta=delta,
            delta_se=delta_se,
            p_value=p_value,
        )


class Flips(_Items):
    """Items lost and gained: `statistics.flips`, and with the number of choices `statistics.chance_adjusted_flips`.

    ``compute`` gives ``lost`` and ``gained`` [items]; adjusted for chance they are shares of items.

    Args:
        adjusted: ``update`` gets the number of choices of each item.
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, adjusted: bool = False, **kwargs: Any) -> None:
        super().__init__("model", "base", *(("n_choices",) if adjusted else ()), **kwargs)
        self.adjusted = adjusted

    @override
    def update(self, model: Tensor, base: Tensor, n_choices: Tensor | None = None) -> None:
        """Take a batch of items.

        Args:
            model: 1 or 0 for each item, of the model. Shape: (items,)
            base: the same of the base. Shape: (items,)
            n_choices: number of choices of each item, where `adjusted`. Shape: (items,)
        """
        if self.adjusted != (n_choices is not None):
            raise ConfigError(f"Flips(adjusted={self.adjusted}) got n_choices={'some' if not self.adjusted else None}.")
        self._keep(model=model, base=base, **({} if n_choices is None else {"n_choices": n_choices}))

    @override
    def compute(self) -> dict[str, Tensor]:
        model, base, *n_choices = self._lists()
        if n_choices:
            lost, gained = statistics.chance_adjusted_flips(model, base, [int(k) for k in n_choices[0]])
        else:
            lost, gained = statistics.flips(model, base)
        return _tensors(self.device, lost=lost, gained=gained)


class SoftDelta(_Items):
    """Paired difference of soft accuracy: `statistics.soft_accuracy`, `statistics.paired_difference`.

    ``compute`` gives ``soft_delta``, below 0 for forgetting, and ``soft_delta_se`` [share of items].

    Args:
        bandwidth: width of the curve, in standard deviations of the margins.
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, bandwidth: float = 0.5, **kwargs: Any) -> None:
        super().__init__("model", "base", **kwargs)
        self.bandwidth = bandwidth

    @override
    def update(self, model: Tensor, base: Tensor) -> None:
        """Take a batch of items of one task.

        Args:
            model: margin of the right choice over the best wrong one, of the model [nats]. Shape: (items,)
            base: the same of the base. Shape: (items,)
        """
        self._keep(model=model, base=base)

    @override
    def compute(self) -> dict[str, Tensor]:
        soft, soft_base = (statistics.soft_accuracy(margins, self.bandwidth) for margins in self._lists())
        delta, delta_se = statistics.paired_difference(soft, soft_base)
        return _tensors(self.device, soft_delta=delta, soft_delta_se=delta_se)


class EValue(_Items):
    """The stopping rule over looks: `sequential.EProcess` on soft accuracy. An alarm is a value of 1/alpha or more.

    The items of a look may come in several batches and on several ranks; looks are put in order by their number. A
    look must be complete when the value is computed.

    Args:
        tolerance: a drop that is nobody's concern [share of items].
        looks: number of looks planned; None when nobody knows.
        bandwidth: width of soft accuracy's curve, in standard deviations of the margins.
        bets: shares of the capital that are staked.
        largest_group: for items that belong together, the number of items in the largest group of the task; ``update``
            gets the group of each item then. None where every item stands alone.
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(
        self,
        tolerance: float = 0.005,
        looks: int | None = None,
        bandwidth: float = 0.5,
        bets: Sequence[float] = BETS,
        largest_group: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__("model", "base", *(() if largest_group is None else ("group",)), "look", **kwargs)
        EProcess(tolerance, bets=bets, largest_group=largest_group or 1)  # refuses what it cannot use
        self.largest_group = largest_group
        if looks is not None and looks < 1:
            raise ConfigError(f"`looks` is the number of looks planned, 1 or more, or None: got looks={looks!r}.")
        self.tolerance, self.looks, self.bandwidth, self.bets = tolerance, looks, bandwidth, tuple(bets)

    @override
    def update(self, model: Tensor, base: Tensor, look: int, group: Tensor | None = None) -> None:
        """Take a batch of items of one task that no earlier look has seen.

        Args:
            model: margin of the right choice over the best wrong one, of the model [nats]. Shape: (items,)
            base: the same of the base. Shape: (items,)
            look: number of the look.
            group: the group of each item as a number, where there is a `largest_group`. Shape: (items,)
        """
        if (self.largest_group is None) != (group is None):
            raise ConfigError(
                f"EValue(largest_group={self.largest_group}) got group={'some' if group is not None else None}."
            )
        looks = torch.full_like(model, look, dtype=torch.float64)
        self._keep(model=model, base=base, **({} if group is None else {"group": group}), look=looks)

    @override
    def compute(self) -> Tensor:
        bet = EProcess(self.tolerance, bets=self.bets, largest_group=self.largest_group or 1)
        by_look = _by_look(*self._lists())
        for k, (model, base, *groups) in enumerate(by_look.values()):
            soft = statistics.soft_accuracy(model, self.bandwidth)
            soft_base = statistics.soft_accuracy(base, self.bandwidth)
            left = None if self.looks is None else max(1, self.looks - k)
            bet.update([b - m for m, b in zip(soft, soft_base, strict=True)], left, *groups)
        return torch.tensor(bet.e_value, device=self.device)


class ForgettingOverLooks(_Items):
    """One task over looks at the same items: `transfer.forgetting_measure` and `transfer.backward_transfer`.

    ``compute`` gives ``forgetting``, the best earlier look less the last, and ``backward_transfer``, the last less the
    first [share of items].

    Args:
        kwargs: of `torchmetrics.Metric`.
    """

    higher_is_better = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("correct", "look", **kwargs)

    @override
    def update(self, correct: Tensor, look: int) -> None:
        """Take a batch of items.

        Args:
            correct: 1 or 0 for each item; or its difference to the base, where looks have other items. Shape: (items,)
            look: number of the look.
        """
        self._keep(correct=correct, look=torch.full_like(correct, look, dtype=torch.float64))

    @override
    def compute(self) -> dict[str, Tensor]:
        scores = [statistics.accuracy(correct) for (correct,) in _by_look(*self._lists()).values()]
        return _tensors(
            self.device,
            forgetting=transfer.forgetting_measure(scores),
            backward_transfer=transfer.backward_transfer({"task": scores}),
        )


def _by_look(*columns: list[float]) -> dict[float, list[list[float]]]:
    """The items of each look, looks in order; the last column says which look an item is of."""
    *values, looks = columns
    return {
        look: [[x for x, of in zip(column, looks, strict=True) if of == look] for column in values]
        for look in sorted(set(looks))
    }


def _tensors(device: torch.device, **values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(float(value), device=device) for name, value in values.items()}
