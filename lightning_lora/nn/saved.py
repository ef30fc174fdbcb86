# SPDX-License-Identifier: Apache-2.0
"""`SavedModule`: a module of ``modules_to_save``, trained in full beside its frozen original."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.nn.adapter import AdapterModule, Held, freeze_statistics


class SavedModule(AdapterModule):
    """Runs ``trained``, a copy of the user's module; switched off, the frozen ``original``.

    A strength of lambda runs ``original + lambda (trained - original)``, parameter by parameter.

    Args:
        original: The user's module; frozen here.
        record: Shared by all modules of one `apply_lora`.
    """

    title = "`modules_to_save`"
    inner = "original"
    built_for = frozenset({"fsdp2", "deepspeed", "tensor_parallel", "mixed_batch", "beside"})

    def __init__(self, original: nn.Module, record: AdapterRecord) -> None:
        super().__init__(record)
        self.training = original.training
        self.trained = copy.deepcopy(original).requires_grad_(True)
        self.original = original.requires_grad_(False)
        for module in original.modules():
            freeze_statistics(module)

    def own_names(self) -> list[str]:
        """The copy's parameters and persistent buffers (a BatchNorm's statistics move in training)."""
        return [f"trained.{name}" for name in self.trained.state_dict()]

    @property
    def replaced(self) -> nn.Module:
        """See `AdapterModule.replaced`: the original."""
        return self.original

    @property
    def added(self) -> nn.Module:
        """See `AdapterModule.added`: the trained copy."""
        return self.trained

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """See `AdapterModule.successors`: each parameter's own copy."""
        return {name: [parameter] for name, parameter in self.trained.named_parameters()}

    def _nothing(self) -> dict[str, Tensor]:
        return {f"trained.{name}": tensor.detach() for name, tensor in self.original.state_dict(keep_vars=True).items()}

    def untrained(self) -> bool:
        """Whether the copy equals its original bit for bit."""
        state = self.original.state_dict()
        return all(torch.equal(value, state[name]) for name, value in self.trained.state_dict().items())

    @property
    def active(self) -> nn.Module:
        """The module whose weights are in use."""
        in_use = self.enabled and not self.vacant and self.strength != 0.0
        return self.trained if in_use else self.original

    def value(self, name: str, strength: float) -> Tensor:
        """A parameter or buffer of the user's module at a strength: 0 the original's, 1 the trained one's.

        Args:
            name: As in the user's module.
            strength: Between the two a parameter is their mixture, a buffer the trained one's.
        """
        parent, _, attribute = name.rpartition(".")
        source = self.original if strength == 0.0 else self.trained
        tensor = getattr(source.get_submodule(parent), attribute)
        if strength in (0.0, 1.0) or not isinstance(tensor, nn.Parameter):
            return tensor
        return torch.lerp(self.original.get_parameter(name), tensor, strength)

    def values(self, held: Held) -> dict[str, Tensor]:
        """What an adapter's part makes of the user's module, by its own names: parameters mixed by the strength."""
        found = {}
        for name, tensor in held.tensors.items():
            own = name.removeprefix("trained.")
            original = dict(self.original.named_parameters(remove_duplicate=False)).get(own)
            mixed = original is not None and held.strength != 1.0
            found[own] = torch.lerp(original, tensor, held.strength) if mixed else tensor  # type: ignore[arg-type]
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the user's module takes and gives."""
        if not self.enabled or self.vacant or self.strength in (0.0, 1.0):
            return self.active(*args, **kwargs)
        mixed = {name: self.value(name, self.strength) for name, _ in self.trained.named_parameters()}
        return torch.func.functional_call(self.trained, mixed, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Code around the module reads its attributes: `lm_head.weight`, `embed_tokens.padding_idx`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules", {})
            if "trained" not in modules or "original" not in modules:
                raise
            return getattr(self.active, name)
