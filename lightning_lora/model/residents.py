# SPDX-License-Identifier: Apache-2.0
"""Many adapters over one base: one is in use, the others wait outside the layers.

::

    in use     the parameters of the adapter modules: forward, optimizer, checkpoints and folders see this one only
    waiting    `AdapterRecord.waiting`: by name, its configuration and by slot of a module what it has there

A swap exchanges storages. The parameters stay the objects that an optimizer holds; nothing is copied unless the
waiting tensors are on another device. A module in which the adapter in use has no part is vacant: it computes its base.
"""

from __future__ import annotations

import difflib
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterConfig, AdapterRecord, LoRAConfig, Waiting
from lightning_lora.errors import ConfigError, Notice, UnsupportedError
from lightning_lora.model.apply import put_layers
from lightning_lora.model.lora_targets import other_kind
from lightning_lora.model.methods import kind_name, linear_kind, stands_alone
from lightning_lora.model.slots import adapter_modules, adapter_slots, adapter_slots_unnamed, first_slot
from lightning_lora.nn.adapter import AdapterModule, Held
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.residual import alone
from lightning_lora.nn.saved import SavedModule

BASE = "__base__"  # PEFT's name for no adapter


def list_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that ``model`` holds, the one in use first.

    Raises:
        ConfigError: The model has no adapters.
    """
    record = record_of(model)
    return [record.name, *record.waiting]


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter in use: the one that trains and that checkpoints hold.

    Raises:
        ConfigError: The model has no adapters.
    """
    return record_of(model).name


def set_adapter(model: nn.Module, name: str) -> None:
    """Put the adapter called ``name`` in use; the one that was waits with its values and strength.

    Parameters stay the same objects with other values, so that compiled code runs on as it is. The moments that an
    optimizer keeps for them belong to the former adapter: inside ``fit`` a swap is refused (borrow with
    `use_adapter`), elsewhere gradients that are still there are dropped with a notice.

    Args:
        model: A converted model, or a LightningModule around one; the whole of what was converted.
        name: One of `list_adapters`.

    Raises:
        ConfigError: The model has no adapters, or none of this name, or is a part of what was converted.
        UnsupportedError: A running ``fit`` trains the adapter in use, or parameters are sharded or on the meta device.
    """
    record, slots = slots_of(model)
    known(record, name)
    if name == record.name:
        return
    refuse_in_fit(record)
    _exchange(record, slots, name, in_place=not record.lent)  # what is lent comes back with its values


@contextmanager
def use_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, ``model`` runs the adapter called ``name``; what was in use comes back, on exceptions too.

    The parameters that an optimizer holds are set aside as they are, gradients included, and others take their
    place. So this may be used in the middle of training, for a reference model say.

    Args:
        model: As for `set_adapter`.
        name: One of `list_adapters`.

    Raises:
        ConfigError: As `set_adapter`.
        UnsupportedError: Parameters are sharded or on the meta device.
    """
    record, slots = slots_of(model)
    known(record, name)
    before, use, lent = record.name, record.use, [(module, module.objects(), module.held()) for module in slots]
    record.lent.append(before)
    try:
        if name != before:
            _exchange(record, slots, name, in_place=False)
        yield
    finally:
        record.lent.remove(before)
        if record.name != before:
            _exchange(record, slots, before, in_place=False)
        for module, objects, held in lent:
            module.put_back(objects, held)
        record.use = use


def rename_adapter(model: nn.Module, name: str) -> None:
    """Call the adapter in use by another name.

    Raises:
        ConfigError: The model has no adapters, or the name is taken or none.
    """
    record = record_of(model)
    check_name(record, name)
    if name in record.waiting:
        raise ConfigError(f"the model has an adapter {name!r} already; `delete_adapter` it first")
    record.name = name


def delete_adapter(model: nn.Module, name: str) -> None:
    """Forget a waiting adapter.

    Raises:
        ConfigError: The model has no adapters, or none of this name, or it is in use.
    """
    record = record_of(model)
    known(record, name)
    if name == record.name or name in record.lent:
        raise ConfigError(f"adapter {name!r} is in use: put another one in use with `set_adapter` before deleting it")
    del record.waiting[name]


def keep_adapter(model: nn.Module, name: str, config: AdapterConfig, parts: Mapping[int, Held]) -> None:
    """Let an adapter wait under a name, or take the place of the one of that name, in use or not.

    Args:
        model: A converted model with a module for each part (`add_slots`).
        name: What it is to be called.
        config: Its configuration.
        parts: What it has in each module, by slot.

    Raises:
        ConfigError: The name cannot be used now.
        UnsupportedError: As `set_adapter`, where the adapter in use is to be replaced.
    """
    record, slots = slots_of(model)
    check_name(record, name)
    fitted = {module.slot: module.fitted(parts[module.slot]) for module in slots if module.slot in parts}
    if name != record.name:
        record.waiting[name] = Waiting(config, fitted, record.moves)
        return
    refuse_in_fit(record)
    _put_in_use(record, slots, [fitted.get(module.slot) for module in slots], in_place=not record.lent)
    record.config = config


def add_slots(model: nn.Module, adapted: Collection[str], saved: Collection[str], config: AdapterConfig) -> None:
    """Put vacant adapter modules where an adapter that is to come has a part and none stands yet.

    Args:
        model: A converted model.
        adapted: Names of its linears, packed ones too, as they are before conversion.
        saved: Names of modules that are trained in full.
        config: That of the adapter that is to come.

    Raises:
        UnsupportedError: The adapter is of another kind than the model's, or of one that stands alone. Or a module is
            trained in full by one adapter and adapted inside by another, or has running statistics that conversion
            froze.
    """
    record = record_of(model)
    refuse_beside(record, config)
    if kind_name(config) != kind_name(record.config):
        new, own = kind_name(config), kind_name(record.config)
        raise UnsupportedError(
            f"the adapter is {new} and the model's adapters are {own}: the two cannot share a model. Load it into a "
            "model of its own"
        )
    slots = dict(adapter_slots(model))
    _refuse_alone(model, slots, adapted)
    kinds = [(name, LoRALinear) for name in adapted] + [(name, SavedModule) for name in saved]
    for name, kind in kinds:
        around = [n for n, m in slots.items() if isinstance(m, SavedModule) and (n == name or name.startswith(f"{n}."))]
        within = [n for n in slots if kind is SavedModule and (n == name or n.startswith(f"{name}."))]
        clash = [n for n in [*around, *within] if not (n == name and isinstance(slots[n], kind))]
        if clash:
            raise UnsupportedError(
                f"{name!r} is adapted by one adapter and {clash[0]!r} is trained in full by another, or the other way "
                "round: the two cannot share a model"
            )
    fresh = [name for name in saved if name not in slots]
    frozen = [n for n in fresh if any(hasattr(m, "track_running_stats") for m in model.get_submodule(n).modules())]
    if frozen:
        raise UnsupportedError(
            f"{frozen[0]!r} is trained in full and has running statistics, which are frozen with this base: convert "
            "the model with it in `modules_to_save`, or load this adapter first"
        )
    learns = any(p.requires_grad for _, module in adapter_modules(model) for p in module.parameters())
    layer = linear_kind(record.config)
    missing = {name: layer(model.get_submodule(name), record, 0, 0.0) for name in adapted if name not in slots}
    full = {name: SavedModule(model.get_submodule(name), record) for name in fresh}
    for module in full.values():
        module.hold(None)
    put_layers(model, {**missing, **full})
    for added in (*missing.values(), *full.values()):
        added.learns = learns


def _refuse_alone(model: nn.Module, slots: dict[str, AdapterModule], adapted: Collection[str]) -> None:
    """See that nothing is adapted, now or by the adapter that is to come, which adapters do not take turns in."""
    here = next((m.title for m in slots.values() if "beside" not in m.built_for), None)
    coming = next(
        (kind.title for n in adapted if n not in slots and (kind := other_kind(model.get_submodule(n)))), None
    )
    if here or coming:
        raise UnsupportedError(
            f"{here or coming} is not built for several adapters in one model: load it into a model of its own"
        )


def refuse_beside(record: AdapterRecord, config: AdapterConfig) -> None:
    """See that adapters of these methods may share a model.

    Raises:
        UnsupportedError: One of the two stands alone.
    """
    if any(getattr(c, "names_more", False) for c in (config, record.config)):
        raise UnsupportedError(
            "`target_parameters` and `trainable_token_indices` are not built for several adapters in one model: load "
            "the adapter into a model of its own"
        )
    for one in (config, record.config):
        if isinstance(one, LoRAConfig) and one.takes_from_base:
            raise UnsupportedError(alone(one.init_lora_weights))
    single = next((c for c in (config, record.config) if stands_alone(c)), None)
    if single is not None:
        raise UnsupportedError(
            f"several adapters in one model are built for LoRA and DoRA, not for {single.title}: load it into a model "
            "of its own"
        )


def record_of(model: nn.Module) -> AdapterRecord:
    """What all adapter modules of a model share.

    Raises:
        ConfigError: There are none, or they come from conversions of several parts.
    """
    return _record_of(adapter_slots_unnamed(model))


def slots_of(model: nn.Module) -> tuple[AdapterRecord, list[AdapterModule]]:
    """What all adapter modules of a model share, and all of them.

    Raises:
        ConfigError: There are none, or they come from conversions of several parts, or ``model`` is a part of what
            was converted.
    """
    first = first_slot(model)
    if first is not None and first.record.found is not None and first.record.found[0] == id(model):
        known = [module for reference in first.record.found[1] if (module := reference()) is not None]
        if len(known) == first.record.slots:
            return first.record, known
    slots = adapter_slots_unnamed(model)
    record = _record_of(slots)
    if len(slots) < record.slots:
        raise ConfigError(
            f"this module holds {len(slots)} of {record.slots} adapter modules: give the whole model that was converted"
        )
    record.found = (id(model), [weakref.ref(module) for module in slots])
    return record, slots


def _record_of(slots: list[AdapterModule]) -> AdapterRecord:
    if not slots:
        raise ConfigError("the model has no adapters; call `apply_lora` or `load_adapter` first")
    record = slots[0].record
    if len({id(module.record) for module in slots}) > 1:
        raise ConfigError("parts of the model were converted one by one: name adapters on each part")
    return record


def known(record: AdapterRecord, name: str) -> None:
    """See that there is an adapter of this name.

    Raises:
        ConfigError: There is none; the nearest name is given.
    """
    names = [record.name, *record.waiting]
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f" (nearest: {near[0]!r})" if near else ""
        raise ConfigError(f"the model has no adapter {name!r}{hint}; it has {names}")


def check_name(record: AdapterRecord, name: str) -> None:
    """See that an adapter may be put under this name.

    Raises:
        ConfigError: It is no name, or that of an adapter which `use_adapter` will put back.
    """
    if not isinstance(name, str) or not name or name == BASE:
        raise ConfigError(f"`name` must be a word other than {BASE!r}, got {name!r}")
    if name in record.lent:
        raise ConfigError(f"adapter {name!r} comes back at the end of `use_adapter` and cannot be replaced inside it")


def refuse_in_fit(record: AdapterRecord) -> None:
    """See that no ``fit`` is running, whose optimizer would go on with another adapter's moments.

    Raises:
        UnsupportedError: One is.
    """
    if record.fitting:
        raise UnsupportedError(
            f"`fit` is training adapter {record.name!r}, and its optimizer would go on with that one's moments: borrow "
            "another with `use_adapter` inside `fit`, or put it in use before"
        )


def _exchange(record: AdapterRecord, slots: list[AdapterModule], name: str, in_place: bool) -> None:
    incoming = record.waiting[name]
    # All that can fail comes first: where the model has moved, tensors follow.
    if in_place and incoming.moves == record.moves:  # as it is: `exchange` refuses what has been sharded since
        parts = [incoming.parts.get(module.slot) for module in slots]
    else:
        parts = [_fitted(module, incoming, record) for module in slots]
    outgoing = _put_in_use(record, slots, parts, in_place)
    del record.waiting[name]
    record.waiting[record.name] = Waiting(record.config, outgoing, record.moves)
    record.name, record.config = name, incoming.config


def _put_in_use(
    record: AdapterRecord, slots: list[AdapterModule], parts: list[Held | None], in_place: bool
) -> dict[int, Held]:
    """Give every module its part; what they had, by slot."""
    outgoing: dict[int, Held] = {}
    changed: list[Tensor] = []
    record.new_use()
    formers: list[Held | None] = []
    try:
        for module, part in zip(slots, parts, strict=True):
            if in_place:
                former = module.exchange(part, changed)
            else:
                former = module.held()
                former = None if former is None else former.detached()
                module.hold(part, in_place=False)
            formers.append(former)
            if former is not None:
                outgoing[module.slot] = former
    except BaseException:  # Ctrl-C among them: no model is left with a part of each adapter
        for module, former in zip(slots, formers, strict=False):
            if in_place:
                module.exchange(former, changed)
            else:
                module.hold(former, in_place=False)
        raise
    torch.autograd.graph.increment_version(changed)  # a graph that saved the former values must not use these
    stale = False
    for parameter in changed:
        if parameter.grad is not None:
            parameter.grad, stale = None, True
    if stale:
        warnings.warn(
            f"adapter {record.name!r} went out of use and its gradients were dropped; an optimizer that trained it "
            "holds its moments for these parameters: build a new one to train another adapter",
            Notice,
            stacklevel=4,
        )
    return outgoing


def _fitted(module: AdapterModule, waiting: Waiting, record: AdapterRecord) -> Held | None:
    """What an adapter has in a module, where and as the module's own tensors are."""
    part: Held | None = waiting.parts.get(module.slot)
    if part is None or (waiting.moves == record.moves and module.is_plain()):
        return part
    return module.fitted(part)


def parts_of(model: nn.Module, name: str) -> tuple[AdapterConfig, dict[int, Held]]:
    """The configuration of an adapter, in use or waiting, and what it has in each module, by slot.

    Raises:
        ConfigError: The model has no adapters, or none of this name, or is a part of what was converted.
    """
    record, slots = slots_of(model)
    known(record, name)
    if name == record.name:
        live = {module.slot: held.detached() for module in slots if (held := module.held()) is not None}
        return record.config, live
    waiting = record.waiting[name]
    parts = {m.slot: part for m in slots if (part := _fitted(m, waiting, record)) is not None}
    # A swap puts other tensors into the dictionaries of what waits: whoever holds on to a part has his own.
    return waiting.config, {slot: part._replace(tensors=dict(part.tensors)) for slot, part in parts.items()}
