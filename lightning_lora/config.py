# SPDX-License-Identifier: Apache-2.0
"""`LoRAConfig`: one validated source for the callback, the command line, YAML and adapter files.

The words and their meanings are PEFT's. The forward of an adapted linear layer is

    y = x W^T + b + s * dropout(x) A^T B^T,    s = lora_alpha / r   (use_rslora: lora_alpha / sqrt(r))
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_lora.errors import ConfigError

QuantizeMode = Literal["none", "nf4", "nf4-dq", "fp4", "int8"]
DTypeName = Literal["auto", "fp32", "bf16", "fp16"]
MasterDTypeName = Literal["fp32", "bf16", "fp16"]
InitMode = Literal["kaiming", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """How a model is adapted and, with ``quantize``, how its base is packed.

    Args:
        r: Rank of every adapter, the inner size of ``B A``. At least 1.
        lora_alpha: Numerator of the scale; the update is multiplied by ``lora_alpha / r``.
        lora_dropout: Share of the adapter's input that is dropped in training, in [0, 1).
        target_modules: Which linears to adapt: "all-linear" (all but the output head), a list of name
            suffixes such as ``["q_proj", "v_proj"]``, or a regular expression that matches whole names.
        exclude_modules: Name suffixes, or a regular expression, of modules to leave alone.
        layers_to_transform: Indices of the blocks to adapt, e.g. ``[0, 1, 2]``; all if null.
        layers_pattern: Name of the block list that ``layers_to_transform`` counts, e.g. "layers"; the
            first number in a module's name if null.
        modules_to_save: Name suffixes of modules that are trained in full and kept in checkpoints.
        rank_pattern: Ranks for some modules, by name suffix or regular expression: ``{"q_proj": 32}``.
        alpha_pattern: The same for ``lora_alpha``.
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``lora_alpha / r``.
        use_dora: Train the magnitude of each output apart from its direction (DoRA, Liu et al. 2024).
        init_lora_weights: Start of A: "kaiming" (uniform, as PEFT's default) or "gaussian"
            (standard deviation 1/r). B is zero either way.
        quantize: Packing of the frozen base: "none", "nf4", "nf4-dq" (its scales packed too), "fp4", "int8".
        compute_dtype: Dtype that a packed base computes in: "auto" is that of the activations, which are
            cast down to it when it is narrower and never up.
        adapter_dtype: Dtype of the master adapters; they are cast to the activations' dtype in use.
        loraplus_lr_ratio: LoRA+ (Hayou et al. 2024): the learning rate of B as a multiple of that of A, such
            as 16; null for the same rate. The `LoRA` callback sees to it in the optimizers of a run; without
            a Trainer `loraplus_param_groups` does.

    Raises:
        ConfigError: An argument is out of its range.
        UnsupportedError: A method that is not built was asked for.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: InitMode = "kaiming"
    quantize: QuantizeMode = "none"
    compute_dtype: DTypeName = "auto"
    adapter_dtype: MasterDTypeName = "fp32"
    loraplus_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        _check_alpha("lora_alpha", self.lora_alpha)
        _check_table("rank_pattern", self.rank_pattern)
        _check_table("alpha_pattern", self.alpha_pattern)
        for key, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        check_ratio(self.loraplus_lr_ratio)
        if not _is_number(self.lora_dropout) or not 0.0 <= self.lora_dropout < 1.0:
            raise ConfigError(f"`lora_dropout` must be a number in [0, 1), got {self.lora_dropout!r}")
        _check_names("target_modules", self.target_modules, str, list)
        _check_names("exclude_modules", self.exclude_modules, str, list, None)
        _check_names("modules_to_save", self.modules_to_save, list, None)
        if not self.target_modules:
            raise ConfigError(
                f"`target_modules` must name something, got {self.target_modules!r}; "
                'use "all-linear", a list of name suffixes or a regular expression'
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_regex(name, getattr(self, name))
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name) or {}:
                _check_regex(name, key)
        _check_indices("layers_to_transform", self.layers_to_transform)
        if self.layers_to_transform is None and self.layers_pattern is not None:
            raise ConfigError("`layers_pattern` is given without `layers_to_transform`; give both or none")
        _check_choice("init_lora_weights", self.init_lora_weights, InitMode)
        _check_choice("quantize", self.quantize, QuantizeMode)
        _check_choice("compute_dtype", self.compute_dtype, DTypeName)
        _check_choice("adapter_dtype", self.adapter_dtype, MasterDTypeName)

    def rank_for(self, *names: str) -> int:
        """Rank of a module (``rank_pattern`` or ``r``), by any of its names: in full, inside the HF model."""
        return _by_pattern(self.rank_pattern, names, self.r)

    def alpha_for(self, *names: str) -> float:
        """``lora_alpha`` of a module (``alpha_pattern`` or ``lora_alpha``), by any of its names."""
        return _by_pattern(self.alpha_pattern, names, self.lora_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as primitives, for YAML, JSON and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoRAConfig:
        """A configuration from `to_dict`'s primitives.

        Raises:
            ConfigError: A key is unknown, as in a file of a newer version.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"LoRAConfig does not know {unknown}; it knows {sorted(known)}")
        return cls(**values)


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
        found: The id of the model in which all adapter modules were found last, and weak references to them; a walk
            through a large model takes as long as a swap.
    """

    config: LoRAConfig
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

    config: LoRAConfig
    parts: dict[int, Any]
    moves: int


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """The factor of ``B A``: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rank stabilisation."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def _check_rank(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"`{name}` must be an integer of at least 1, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        raise ConfigError(f"`{name}` must be a positive number, got {value!r}")


def check_ratio(value: Any) -> None:
    """See that ``loraplus_lr_ratio`` is null or a factor.

    Raises:
        ConfigError: It is neither.
    """
    if value is not None and not (_is_number(value) and 0 < value < math.inf):
        raise ConfigError(f"`loraplus_lr_ratio` must be a positive number, such as 16, or null, got {value!r}")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"`{name}` must be one of {list(get_args(choices))}, got {value!r}")


def _check_names(name: str, value: Any, *kinds: Any) -> None:
    right = any(value is None if kind is None else isinstance(value, kind) for kind in kinds)
    if right and (not isinstance(value, list) or all(isinstance(entry, str) for entry in value)):
        return
    words = {str: "a regular expression", list: "a list of names", None: "null"}
    raise ConfigError(f"`{name}` must be {' or '.join(words[kind] for kind in kinds)}, got {value!r}")


def _check_regex(name: str, value: Any) -> None:
    if isinstance(value, str) and value != "all-linear":
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"`{name}` {value!r} is no regular expression: {error}") from error


def _check_indices(name: str, value: Any) -> None:
    indices = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in indices):
        raise ConfigError(f"`{name}` must be a number of 0 or more, or a list of them, got {value!r}")


def _check_table(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        raise ConfigError(f"`{name}` must be a table of names to numbers, such as {{'q_proj': 32}}, got {value!r}")


def matches_pattern(key: str, *names: str) -> bool:
    """Whether a pattern's key is one of ``names``, ends one at a dot, or matches one as a regular expression."""
    return any(re.match(rf"(.*\.)?({key})$", name) for name in names)


def _by_pattern(pattern: dict[str, Any] | None, names: tuple[str, ...], default: Any) -> Any:
    return next((value for key, value in (pattern or {}).items() if matches_pattern(key, *names)), default)
