# SPDX-License-Identifier: Apache-2.0
"""`AdapterConfig`: what the configurations of all methods have in common, and the checks of their arguments.

One frozen dataclass a method, each in a file of its own beside this one; a checkpoint holds one as primitives.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from lightning_lora.errors import ConfigError

QuantizeMode = Literal["none", "nf4", "nf4-dq", "fp4", "int8"]
DTypeName = Literal["auto", "fp32", "bf16", "fp16"]
MasterDTypeName = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules are adapted and, with ``quantize``, how the frozen base is packed.

    Args:
        target_modules: Which modules to adapt: "all-linear" (all linears but the output head), a list of name
            suffixes such as ``["q_proj", "v_proj"]``, or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt, e.g. ``[0, 1, 2]``; all if null.
        layers_pattern: Name of the block list that ``layers_to_transform`` counts, e.g. "layers"; the
            first number in a module's name if null.
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq" (its scales packed too), "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in: "auto" is that of the activations, which are
            cast down to it when it is narrower and never up.
        adapter_dtype: Dtype of the master adapters; they are cast to the activations' dtype in use.

    Raises:
        ConfigError: An argument is out of its range.
    """

    #: What the method is called in dictionaries; plain LoRA's have no such key.
    method: ClassVar[str] = "lora"
    #: What it is called in texts.
    title: ClassVar[str] = "LoRA"
    #: Whether the base's own weights can be changed to compute the same.
    mergeable: ClassVar[bool] = True
    #: Fields that say how stored tensors are used, and that neither their shapes nor a scale in a file show.
    use_fields: ClassVar[tuple[str, ...]] = ()
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | None = None
    modules_to_save: list[str] | None = None
    quantize: QuantizeMode = "none"
    compute_dtype: DTypeName = "auto"
    adapter_dtype: MasterDTypeName = "fp32"

    def __post_init__(self) -> None:
        check_names("target_modules", self.target_modules, str, list)
        check_names("exclude_modules", self.exclude_modules, str, list, None)
        check_names("modules_to_save", self.modules_to_save, list, None)
        if not self.target_modules and not (self.names_more and self.target_modules == []):
            raise ConfigError(
                f"`target_modules` must name something, got {self.target_modules!r}; "
                'use "all-linear", a list of name suffixes or a regular expression'
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_regex(name, getattr(self, name))
        check_indices("layers_to_transform", self.layers_to_transform)
        if self.layers_to_transform is None and self.layers_pattern is not None:
            raise ConfigError("`layers_pattern` is given without `layers_to_transform`; give both or none")
        check_choice("quantize", self.quantize, QuantizeMode)
        check_choice("compute_dtype", self.compute_dtype, DTypeName)
        check_choice("adapter_dtype", self.adapter_dtype, MasterDTypeName)

    @property
    def free_fields(self) -> tuple[str, ...]:
        """Fields in which a run may differ from its checkpoint: they do not change what the stored tensors mean."""
        return ("compute_dtype",)

    @property
    def names_more(self) -> bool:
        """Whether something is adapted that ``target_modules`` does not choose, so that it may be an empty list."""
        return False

    @property
    def dropout(self) -> float:
        """Share of an adapter's input that is dropped in training."""
        return 0.0

    def patterns(self) -> dict[str, dict[str, Any]]:
        """By the argument's name, tables of values for some modules by name suffix or regular expression."""
        return {}

    def rank_for(self, *names: str) -> int:
        """Rank of a module, by any of its names: in full, inside the HF model; 0 for a method without ranks."""
        return 0

    def alpha_for(self, *names: str) -> float:
        """``lora_alpha`` of a module, by any of its names; 0 for a method without one."""
        return 0.0

    def stored(self) -> Self:
        """What an adapter folder says of this: the same without what only the training needed."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The configuration as primitives, for YAML, JSON and checkpoints."""
        values = dataclasses.asdict(self)
        return values if self.method == "lora" else {"method": self.method, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """A configuration from `to_dict`'s primitives; `config_from_dict` is for any method's.

        Raises:
            ConfigError: A key is unknown, as in a file of a newer version, or the method is another one.
        """
        values = dict(values)
        method = values.pop("method", "lora")
        if method != cls.method:
            raise ConfigError(f"`method` is {method!r}, {cls.__name__} is of {cls.method!r}: use `config_from_dict`")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"{cls.__name__} does not know {unknown}; it knows {sorted(known)}")
        return cls(**values)


def refuse_fields(config: AdapterConfig, names: Iterable[str], why: str) -> None:
    """See that fields that a method has no use for are as they are by default.

    Args:
        config: The configuration.
        names: Of the fields.
        why: The reason, for the text.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"{config.title} has no `{name}`, since {why}: leave it out")


def check_rank(name: str, value: Any) -> None:
    """See that ``value`` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"`{name}` must be an integer of at least 1, got {value!r}")


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_alpha(name: str, value: Any) -> None:
    """See that ``value`` is a positive number."""
    if not is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"`{name}` must be a positive number, got {value!r}")


def check_dropout(name: str, value: Any) -> None:
    """See that ``value`` is a share below 1."""
    if not is_number(value) or not 0.0 <= value < 1.0:
        raise ConfigError(f"`{name}` must be a number in [0, 1), got {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """See that ``value`` is one of those that a `Literal` names."""
    if value not in get_args(choices):
        raise ConfigError(f"`{name}` must be one of {list(get_args(choices))}, got {value!r}")


def check_names(name: str, value: Any, *kinds: Any) -> None:
    """See that ``value`` is of one of ``kinds``: `str` a regular expression, `list` names, None null."""
    right = any(value is None if kind is None else isinstance(value, kind) for kind in kinds)
    if right and (not isinstance(value, list) or all(isinstance(entry, str) for entry in value)):
        return
    words = {str: "a regular expression", list: "a list of names", None: "null"}
    raise ConfigError(f"`{name}` must be {' or '.join(words[kind] for kind in kinds)}, got {value!r}")


def check_regex(name: str, value: Any) -> None:
    """See that ``value``, where it is a string, is a regular expression."""
    if isinstance(value, str) and value != "all-linear":
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"`{name}` {value!r} is no regular expression: {error}") from error


def check_indices(name: str, value: Any) -> None:
    """See that ``value`` is an index, a list of them, or null."""
    indices = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in indices):
        raise ConfigError(f"`{name}` must be a number of 0 or more, or a list of them, got {value!r}")


def check_table(name: str, value: Any) -> None:
    """See that ``value`` is a table by name, or null."""
    if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        raise ConfigError(f"`{name}` must be a table of names to numbers, such as {{'q_proj': 32}}, got {value!r}")


def matches_pattern(key: str, *names: str) -> bool:
    """Whether a pattern's key is one of ``names``, ends one at a dot, or matches one as a regular expression."""
    return any(re.match(rf"(.*\.)?({key})$", name) for name in names)


def by_pattern(pattern: dict[str, Any] | None, names: tuple[str, ...], default: Any) -> Any:
    """What the first key that matches one of ``names`` gives; ``default`` where none does."""
    return next((value for key, value in (pattern or {}).items() if matches_pattern(key, *names)), default)
