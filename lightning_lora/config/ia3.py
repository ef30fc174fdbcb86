# SPDX-License-Identifier: Apache-2.0
"""`IA3Config`: which keys, values and feed-forwards are rescaled (Liu et al. 2022); the words are PEFT's."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from lightning_lora.config.base import AdapterConfig, check_names, check_regex
from lightning_lora.errors import ConfigError

#: Names of keys and values, and of what a feed-forward ends in, in transformers' families.
KEYS_AND_VALUES = (
    "k_proj",
    "v_proj",
    "key",
    "value",
    "k",
    "v",
    "k_lin",
    "v_lin",
    "query_key_value",
    "c_attn",
    "qkv_proj",
)
FEEDFORWARDS = ("down_proj", "fc2", "fc_out", "dense_4h_to_h", "wo", "w2", "lin2", "mlp.c_proj", "output.dense")


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """Which linears are rescaled, and which of them at their inputs; the rest is `AdapterConfig`'s.

    Args:
        target_modules: As `AdapterConfig` has it; "auto" (default) is keys, values and the last linear of each
            feed-forward, by the names that transformers' families give them.
        feedforward_modules: Which of those are rescaled at their inputs instead of their outputs: endings of names,
            or a regular expression that matches whole names. With "auto", those of the feed-forwards if null.

    Raises:
        ConfigError: An argument is out of its range.
    """

    method: ClassVar[str] = "ia3"
    title: ClassVar[str] = "IA3"

    target_modules: str | list[str] = "auto"
    feedforward_modules: str | list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("feedforward_modules", self.feedforward_modules, str, list, None)
        check_regex("feedforward_modules", self.feedforward_modules)
        names, targets = self.feedforward_modules, self.target_modules
        if isinstance(names, list) and isinstance(targets, list):
            alone = [n for n in names if not any(n.endswith(t) or t.endswith(n) for t in targets)]
            if alone:
                raise ConfigError(
                    f"`feedforward_modules` names {alone[0]!r}, which `target_modules` {targets} does not: name it "
                    "there too"
                )

    @property
    def suffixes(self) -> list[str] | None:
        """What "auto" stands for; null where modules were named."""
        return [*KEYS_AND_VALUES, *FEEDFORWARDS] if self.target_modules == "auto" else None

    def is_feedforward(self, *names: str) -> bool:
        """Whether a module is rescaled at its input, by any of its names: in full, inside the transformers model."""
        asked = self.feedforward_modules
        if asked is None:
            asked = list(FEEDFORWARDS) if self.target_modules == "auto" else []
        if isinstance(asked, str):
            return any(re.fullmatch(asked, name) for name in names)
        return any(name.endswith(ending) for name in names for ending in asked)  # PEFT's rule: no dot is needed
