# SPDX-License-Identifier: Apache-2.0
r"""PEFT's rules as functions: what an ``adapter_config.json`` adapts, and the shortest one for given modules.

PEFT chooses by matching every module name of the model, and the rank of a match by its pattern tables::

    target_modules   list: name == t or name ends with "." + t     string: re.fullmatch
    exclude_modules  the same, and they win
    modules_to_save  name ends with m (no dot needed); everything below a match is excluded from targets
    rank_pattern     the first key with  re.match("(.*\.)?(key)$", name), else r

A configuration is accepted here only when these rules, run over all names of the plain model, give each
module exactly what the live model gives it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.errors import CheckpointError, UnsupportedError

#: What PEFT can do, asked for by these keys, that is not built here: refused by name unless it is falsy.
UNBUILT_KEYS = (
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "use_bdlora",
    "monteclora_config",
    "kasa_config",
    "megatron_config",
    "ensure_weight_tying",
)

#: Initialisations that leave the base as it is; all others of PEFT's subtract something from it.
BASE_KEEPING_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica", "kaiming")


@dataclass(frozen=True)
class Spec:
    """The part of an ``adapter_config.json`` that says which modules and with which rank and scale."""

    target_modules: list[str] | str
    r: int
    lora_alpha: float
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Spec:
        """The same part of a configuration read from a file, PEFT's defaults where a key is missing."""
        return cls(
            target_modules=config.get("target_modules") or [],
            r=config.get("r", 8),
            lora_alpha=config.get("lora_alpha", 8),
            modules_to_save=config.get("modules_to_save"),
            exclude_modules=config.get("exclude_modules"),
            layers_to_transform=config.get("layers_to_transform"),
            layers_pattern=config.get("layers_pattern"),
            rank_pattern=config.get("rank_pattern"),
            alpha_pattern=config.get("alpha_pattern"),
        )

    def targets(self, name: str) -> bool:
        """Whether PEFT puts an adapter on the module called `name`."""
        if self.exclude_modules and _in(self.exclude_modules, name):
            return False
        if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in self.modules_to_save or ()):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return _in(self.target_modules, name)
        return _in(self.target_modules, name) and self._in_layers(name)

    def saves(self, name: str) -> bool:
        """Whether PEFT trains and keeps the whole module called `name`."""
        return any(name.endswith(m) for m in self.modules_to_save or ())

    def rank(self, name: str) -> int:
        """The rank that PEFT gives the module called `name`."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        """The ``lora_alpha`` that PEFT gives the module called `name`."""
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def _in_layers(self, name: str) -> bool:
        """PEFT's ``layers_to_transform`` for a name that a suffix has matched."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        if patterns:
            found = (re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", name) for p in patterns)
            match = next((m for m in found if m), None)
        else:
            match = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", name)
        if match is None:
            return False
        index = int(match["idx"])
        return index == wanted if isinstance(wanted, int) else index in wanted


@dataclass(frozen=True)
class Scale:
    """Rank and ``lora_alpha`` of one adapted module."""

    r: int
    lora_alpha: float


def shortest_spec(
    names: Sequence[str],
    adapted: Mapping[str, Scale],
    saved: Sequence[str],
    hint: Spec | None = None,
    parameters: Mapping[str, Scale] | None = None,
) -> Spec:
    """The shortest configuration that PEFT reads as exactly these modules, ranks and scales.

    Args:
        names: Every module name of the plain model, the root's left out.
        adapted: Rank and alpha by the name of each adapted module.
        saved: Names of the modules that are kept in full.
        hint: The user's own choice; its ranges and patterns are taken where they fit.
        parameters: Rank and alpha by the name of each adapted parameter, of fused experts.

    Raises:
        UnsupportedError: PEFT's rules cannot express the choice.
    """
    to_save = _save_names(names, saved)
    sized = {**adapted, **(parameters or {})}
    own = (hint.r, hint.lora_alpha) if hint else (8, 8)
    r = _most_common(s.r for s in sized.values()) if sized else own[0]
    alpha = _most_common(s.lora_alpha for s in sized.values()) if sized else own[1]
    ranks = _patterns({n: s.r for n, s in sized.items()}, r, hint.rank_pattern if hint else None)
    alphas = _patterns({n: s.lora_alpha for n, s in sized.items()}, alpha, hint.alpha_pattern if hint else None)
    for choice in _target_choices(adapted, hint):
        spec = Spec(r=r, lora_alpha=alpha, modules_to_save=to_save, rank_pattern=ranks, alpha_pattern=alphas, **choice)
        if all(spec.targets(name) == (name in adapted) for name in names):
            return spec
    inside = [n for n in adapted if any(re.match(rf"(^|.*\.){m}($|\..*)", n) for m in to_save or ())]
    raise UnsupportedError(
        f"PEFT's format cannot express this choice of modules: {inside or sorted(adapted)} would be excluded "
        f"by `modules_to_save` {to_save}. Rename one of them, or leave it out of `modules_to_save`."
    )


def refuse_unbuilt_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse by name what an ``adapter_config.json`` of LoRA asks for and this version cannot do.

    Args:
        config: The parsed file.
        where: What to call it in the message.

    Raises:
        UnsupportedError: A part of LoRA that is not built.
    """
    for key in UNBUILT_KEYS:
        if config.get(key):
            raise UnsupportedError(f"{where}: `{key}` is {config[key]!r}; this version cannot load it.")
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{where}: `bias` is {config['bias']!r}; this version trains and loads no biases.")
    init = config.get("init_lora_weights", True)
    if init not in BASE_KEEPING_INITS:
        raise UnsupportedError(
            f"{where}: `init_lora_weights` is {init!r}, which changes the base weights: the adapter "
            "does not fit the plain base. In PEFT, save it with `path_initial_model_for_weight_conversion`."
        )


def check_types(config: Mapping[str, Any], where: str) -> None:
    """See that the values of an ``adapter_config.json`` have the types that PEFT gives them.

    Args:
        config: The parsed file.
        where: What to call it in the message.

    Raises:
        CheckpointError: One has another type.
    """
    for key, (what, fits) in _TYPES.items():
        value = config.get(key)
        if value is not None and not fits(value):
            raise CheckpointError(f"{where}: `{key}` must be {what}, got {value!r}")


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_table(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(fits(item) for item in value.values())


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or _is_list(value, str)


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an integer of at least 1", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "lora_dropout": ("a number", _is_number),
    "target_modules": ("a string or a list of strings", _is_names),
    "exclude_modules": ("a string or a list of strings", _is_names),
    "modules_to_save": ("a list of strings", lambda value: _is_list(value, str)),
    "layers_to_transform": ("an integer or a list", lambda v: isinstance(v, int) or _is_list(v, int)),
    "layers_pattern": ("a string or a list of strings", _is_names),
    "rank_pattern": ("a table of integers", lambda value: _is_table(value, _is_rank)),
    "target_parameters": ("a list of strings", lambda value: _is_list(value, str)),
    "trainable_token_indices": (
        "a list of integers or a table of such lists",
        lambda value: _is_list(value, int) or _is_table(value, lambda ids: _is_list(ids, int)),
    ),
    "alpha_pattern": ("a table of numbers", lambda value: _is_table(value, _is_number)),
}


def _target_choices(adapted: Mapping[str, Scale], hint: Spec | None) -> Iterable[dict[str, Any]]:
    """Ways to name the adapted modules, the most readable first."""
    suffixes = sorted({name.rpartition(".")[2] for name in adapted})
    yield {"target_modules": suffixes}
    if hint is not None:
        layers = {"layers_to_transform": hint.layers_to_transform, "layers_pattern": hint.layers_pattern}
        if hint.layers_to_transform is not None:
            yield {"target_modules": suffixes, **layers}
        if hint.exclude_modules:
            yield {"target_modules": suffixes, "exclude_modules": hint.exclude_modules}
            yield {"target_modules": suffixes, "exclude_modules": hint.exclude_modules, **layers}
    yield {"target_modules": sorted(adapted)}
    yield {"target_modules": "|".join(re.escape(name) for name in sorted(adapted))}


def _save_names(names: Sequence[str], saved: Sequence[str]) -> list[str] | None:
    """Names for ``modules_to_save``: last components where only saved modules end so, else full paths."""
    if not saved:
        return None
    chosen = set()
    for name in saved:
        for candidate in (name.rpartition(".")[2], name):
            others = [n for n in names if n.endswith(candidate) and n not in saved]
            if not others:
                chosen.add(candidate)
                break
        else:
            raise UnsupportedError(
                f"PEFT's format cannot say that {name!r} is kept in full and {others[0]!r} is not, "
                "since it compares the ends of names. Rename one of them."
            )
    return sorted(chosen)


def _patterns(values: Mapping[str, Any], default: Any, hint: Mapping[str, Any] | None) -> dict[str, Any]:
    """A pattern table that gives every name its value: the user's, one by suffix, or one by whole names."""
    deviating = {name: value for name, value in values.items() if value != default}
    by_suffix = {name.rpartition(".")[2]: value for name, value in deviating.items()}
    by_name = {f"^{re.escape(name)}": value for name, value in deviating.items()}
    tables = [dict(hint or {}), {re.escape(k): v for k, v in sorted(by_suffix.items())}]
    for table in tables:
        if all(_by_pattern(table, name, default) == value for name, value in values.items()):
            return table
    return by_name


def _most_common(values: Iterable[Any]) -> Any:
    """The value that occurs most; the first one among equals."""
    return Counter(values).most_common(1)[0][0]


def _in(wanted: Sequence[str] | str, name: str) -> bool:
    """PEFT's match of a name: a whole regular expression, or one of a list of suffixes at a dot."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return name in wanted or any(name.endswith(f".{suffix}") for suffix in wanted)


def _by_pattern(table: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's look-up in ``rank_pattern`` and ``alpha_pattern``."""
    for key, value in (table or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
