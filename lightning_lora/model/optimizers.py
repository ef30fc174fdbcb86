# SPDX-License-Identifier: Apache-2.0
"""`Succession`: adapters take the place of the weights that they adapt in optimizers built before them.

LightningCLI builds its optimizer before conversion, and modules cache parameter lists in ``__init__``:
such an optimizer holds only frozen or replaced weights and would train nothing, silently.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Size, Tensor, nn
from torch.optim import Optimizer

from lightning_lora.errors import Notice, OptimizerError, UnsupportedError
from lightning_lora.model.loraplus import check_same_ratio
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.state import trained_outside
from lightning_lora.nn.sharded import is_sharded


class Succession:
    """Remembers, over one conversion, which new parameter stands for which old one.

    Old parameters are held weakly: a dense weight that was packed is freed unless an optimizer holds it.

    Args:
        model: The model before conversion.
    """

    def __init__(self, model: nn.Module) -> None:
        self._before = {name: weakref.ref(p) for name, p in model.named_parameters(remove_duplicate=False)}
        self._heirs: dict[int, tuple[weakref.ref, list[nn.Parameter]]] = {}

    def converted(self, model: nn.Module) -> None:
        """Note the heirs, once ``model`` carries its adapters."""
        for name, module in adapter_modules(model):
            for own, heirs in module.successors().items():
                self._add(f"{name}.{own}", heirs)
        self._before = {}

    def _add(self, name: str, heirs: list[nn.Parameter]) -> None:
        reference = self._before.get(name)
        old = reference() if reference is not None else None
        if reference is not None and old is not None:
            known = self._heirs.setdefault(id(old), (reference, []))
            known[1].extend(heir for heir in heirs if not any(heir is other for other in known[1]))

    def heirs(self, old: nn.Parameter) -> list[nn.Parameter]:
        """The parameters that stand for ``old`` now."""
        reference, heirs = self._heirs.get(id(old), (None, []))
        return heirs if reference is not None and reference() is old else []


def repair_optimizers(optimizers: Iterable[Optimizer], model: nn.Module, succession: Succession | None = None) -> None:
    """Make the optimizers hold exactly what ``model`` trains; groups and their settings stay.

    Frozen and replaced parameters leave their groups; an adapter joins the group that held the weight it
    adapts. What no group can be found for joins the first group of the first optimizer, with a notice.

    Raises:
        OptimizerError: An optimizer that would have to change has already taken steps, or one that was built
            over adapters leaves some of them out.
    """
    optimizers = list(optimizers)
    trainable = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad}
    names = {key: name for key, (name, _) in trainable.items()}
    placed = {key for optimizer in optimizers for key in held_by(optimizer)}
    held = any(id_ in trainable for id_ in placed)  # it was built when the adapters were in the model
    inherited: list[str] = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept: list[nn.Parameter] = []
            for old in group["params"]:
                if id(old) in trainable:
                    kept.append(old)
                    continue
                heirs = succession.heirs(old) if succession is not None else []
                heirs = [p for p in heirs if id(p) in trainable and id(p) not in placed]
                placed.update(map(id, heirs))
                inherited.extend(trainable[id(p)][0] for p in heirs)
                kept.extend(heirs)
            _replace(optimizer, group, kept, names)
    missing = [(name, p) for key, (name, p) in trainable.items() if key not in placed]
    if missing and held:
        raise OptimizerError(
            f"the optimizer holds some of what is trained and leaves out {len(missing)} parameters, {missing[0][0]!r} "
            "first: give it all of `self.parameters()`, or keep their layers out with `exclude_modules`"
        )
    if missing and optimizers:
        first = optimizers[0].param_groups[0]
        _replace(optimizers[0], first, [*first["params"], *(p for _, p in missing)], names)
    if inherited or (missing and optimizers):
        _say(inherited, [name for name, _ in missing], type(optimizers[0]).__name__)


def held_by(optimizer: Optimizer) -> set[int]:
    """The ids of an optimizer's parameters."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def check_optimizers(
    optimizers: Iterable[Optimizer], model: nn.Module, held_by: Callable[[Optimizer], set[int]] = held_by
) -> None:
    """See that every trainable parameter of the adapters is in some optimizer, and that nothing else is trained.

    Args:
        optimizers: The optimizers of the run.
        model: The converted model.
        held_by: The ids of the model's parameters that an optimizer moves.

    Raises:
        OptimizerError: Some are not, or the base is trained too, with names.
        UnsupportedError: An optimizer of bitsandbytes holds parameters that are spread over processes.
    """
    check_trained(model)
    optimizers = list(optimizers)
    for optimizer in optimizers:
        kind = type(optimizer)
        if kind.__module__.startswith("bitsandbytes.") and any(
            is_sharded(p) for group in optimizer.param_groups for p in group["params"]
        ):
            raise UnsupportedError(
                f"bitsandbytes' {kind.__name__} cannot step parameters that are sharded (FSDP 2, tensor parallelism): "
                "use `torch.optim.AdamW` there, or DDP; the adapters' states are small"
            )
    held = {key for optimizer in optimizers for key in held_by(optimizer)}
    lost = [
        f"{name}.{own}"
        for name, module in adapter_modules(model)
        for own, p in module.named_parameters()
        if p.requires_grad and id(p) not in held
    ]
    if lost:
        raise OptimizerError(
            f"{len(lost)} adapter parameters are in no optimizer and would never be trained, {lost[0]!r} first: "
            "return an optimizer over `self.parameters()` from `configure_optimizers`"
        )


def check_trained(model: nn.Module) -> None:
    """See that nothing is trained that checkpoints and adapter folders would not hold.

    Raises:
        OptimizerError: Parameters outside adapters and ``modules_to_save`` need gradients, with their names.
    """
    outside = trained_outside(model)
    if outside:
        raise OptimizerError(
            f"{len(outside)} parameters of the frozen base would be trained, {outside[0]!r} first, and no checkpoint "
            "would hold them: name their modules in `modules_to_save` instead of unfreezing them"
        )


def _replace(optimizer: Optimizer, group: dict, parameters: list[nn.Parameter], names: dict[int, str]) -> None:
    old = group["params"]
    if len(old) == len(parameters) and all(a is b for a, b in zip(old, parameters, strict=True)):
        return
    if any(p in optimizer.state for p in old):
        raise OptimizerError(
            f"{type(optimizer).__name__} has already taken steps on parameters that are frozen now: build the "
            "optimizer in `configure_optimizers`, after the adapters are in the model"
        )
    if "param_names" in group:  # an optimizer over `named_parameters()` keeps both lists in step
        names = names | dict(zip(map(id, old), group["param_names"], strict=True))
        group["param_names"] = [names[id(p)] for p in parameters]
    group["params"] = parameters


def _say(inherited: list[str], missing: list[str], optimizer: str) -> None:
    text = f"{optimizer} was built before the adapters were in the model: "
    if inherited:
        text += f"{len(inherited)} adapter parameters took the place of the weights they adapt"
    if missing:
        joined = f"{len(missing)} trainable parameters, {missing[0]!r} first, joined its first group"
        text += f"{', and ' if inherited else ''}{joined}"
    warnings.warn(text, Notice, stacklevel=3)


def fitting_state(state: dict[str, Any], optimizer: Optimizer, shapes: Sequence[Size] | None = None) -> dict[str, Any]:
    """A stored optimizer state for one that may hold fewer parameters: those that are trained.

    An optimizer over a whole model has a state for what got gradients, and for the frozen rest none: in the order
    of its groups, what has a state is what is trained.

    Args:
        state: Of whole tensors.
        optimizer: The one that will get it.
        shapes: Of its parameters, whole, where a process holds parts that do not know them.

    Raises:
        OptimizerError: Groups or shapes differ in another way, or the ratio of learning rates does.
    """
    check_same_ratio(state["param_groups"], optimizer)
    whole = iter(shapes or [p.shape for group in optimizer.param_groups for p in group["params"]])
    held = [[next(whole) for _ in group["params"]] for group in optimizer.param_groups]
    stored = [group["params"] for group in state["param_groups"]]
    if [len(group) for group in stored] == [len(group) for group in held]:
        return state
    kept = [[number for number in group if number in state["state"]] for group in stored]
    pairs = [(state["state"][n], s) for ns, ss in zip(kept, held, strict=False) for n, s in zip(ns, ss, strict=False)]
    fits = all(
        not isinstance(value, Tensor) or value.dim() == 0 or value.shape == shape
        for values, shape in pairs
        for value in values.values()
    )
    if [len(group) for group in kept] != [len(group) for group in held] or not fits:
        raise OptimizerError(
            f"the checkpoint's optimizer has groups of {[len(group) for group in stored]} parameters, this run's of "
            f"{[len(group) for group in held]}: make the optimizer as the earlier run did, or start anew from its "
            "weights with `init_from`"
        )
    order = {number: place for place, number in enumerate(n for group in kept for n in group)}
    groups = [
        {**group, "params": [order[number] for number in numbers]}
        for group, numbers in zip(state["param_groups"], kept, strict=True)
    ]
    for group in groups:
        group.pop("param_names", None)  # of the whole model
    return {**state, "state": {order[n]: state["state"][n] for n in order}, "param_groups": groups}
