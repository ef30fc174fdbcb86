# SPDX-License-Identifier: Apache-2.0
"""`refuse_unbuilt`: what a kind of adapter was not built for is refused by name, in one place."""

from __future__ import annotations

from torch import nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adapter import Use


def refuse_unbuilt(model: nn.Module, use: Use, where: str, remedies: dict[Use, str], otherwise: str) -> None:
    """See that every adapter of ``model`` was built for a use.

    Args:
        model: A converted model.
        use: One of those that `AdapterModule.built_for` names.
        where: What to call it in the text.
        remedies: What to do instead, by another use that the adapter is built for; the first that fits is told.
        otherwise: What to do where none does.

    Raises:
        UnsupportedError: One was not.
    """
    for _, module in adapter_modules(model):
        if use not in module.built_for:
            remedy = next((text for other, text in remedies.items() if other in module.built_for), otherwise)
            raise UnsupportedError(f"{module.title} is not built for {where}: {remedy}")
