# SPDX-License-Identifier: Apache-2.0
"""`AdapterRecord`: what one conversion of a model did, shared by all adapter modules that it made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_lora.config.base import AdapterConfig


@dataclass
class AdapterRecord:
    """What one `apply_lora` did, shared by every adapter module that it made.

    It is also where the adapters that are not in use wait, so that no forward, optimizer or checkpoint sees them.

    Args:
        config: The configuration of the adapter in use.
        fingerprint: Of the base before packing, or None where it could not be read (meta device).
        name: What the adapter in use is called.
        waiting: The others, by name.
        lent: Names of adapters whose parameters `use_adapter` will put back.
        fitting: Whether a Trainer's ``fit`` is running, whose optimizer knows the adapter in use.
        slots: How many adapter modules there are.
        moves: How many times an adapter module was moved or cast: what has waited since may have to follow.
        use: Which values the adapters have: a number that no other swap or load had. `use_adapter` puts it back.
        uses: How many such numbers were given.
        verified: Adapter files that were found whole, so that a swap does not check them again.
        shared: What the modules of a method have in common, such as VeRA's two matrices.
        found: The id of the model in which all adapter modules were found last, and weak references to them; a walk
            through a large model takes as long as a swap.
    """

    config: AdapterConfig
    fingerprint: dict[str, Any] | None = field(default=None)
    name: str = "default"
    waiting: dict[str, Waiting] = field(default_factory=dict)
    lent: list[str] = field(default_factory=list)
    fitting: bool = False
    slots: int = 0
    moves: int = 0
    use: int = 0
    uses: int = 0
    verified: set[tuple[int, ...]] = field(default_factory=set)
    shared: Any = None
    found: tuple[int, list[Any]] | None = field(default=None, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of another model: what was found is not taken along."""
        return {**vars(self), "found": None}

    def new_slot(self) -> int:
        """A number for one more adapter module."""
        self.slots += 1
        return self.slots

    def new_use(self) -> None:
        """The adapters have other values from now on; a recomputed forward is known to be another by this."""
        self.uses += 1
        self.use = self.uses


@dataclass(frozen=True)
class Waiting:
    """An adapter that is not in use.

    Args:
        config: Its configuration.
        parts: What it has in each module (`lightning_lora.nn.adapter.Held`), by the module's slot.
        moves: `AdapterRecord.moves` when it began to wait.
    """

    config: AdapterConfig
    parts: dict[int, Any]
    moves: int
