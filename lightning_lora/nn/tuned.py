# SPDX-License-Identifier: Apache-2.0
"""`TunedNorm` and `TunedModule`: modules that a method trains in full, each beside its frozen original."""

from __future__ import annotations

from torch import nn

from lightning_lora.nn.saved import SavedModule


class TunedNorm(SavedModule):
    """A norm of layer-norm tuning: PEFT's LN_TUNING."""

    title = "layer-norm tuning"
    built_for = frozenset()

    def watched(self) -> list[nn.Parameter]:
        """See `AdapterModule.watched`: all that is trained."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]


class TunedModule(SavedModule):
    """A part of a model that full fine-tuning trains as a whole."""

    title = "full fine-tuning"
    built_for = frozenset()

    def watched(self) -> list[nn.Parameter]:
        """See `AdapterModule.watched`: all that is trained."""
        return [parameter for parameter in self.trained.parameters() if parameter.requires_grad]


def tie_copies(modules: list[TunedModule]) -> None:
    """Let parameters that modules shared before they were copied be shared by the copies too.

    Args:
        modules: All those of one model.
    """
    copies: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, original in module.original.named_parameters(remove_duplicate=False):
            parent, _, own = name.rpartition(".")
            place = module.trained.get_submodule(parent)
            setattr(place, own, copies.setdefault(id(original), getattr(place, own)))
