# SPDX-License-Identifier: Apache-2.0
"""`PEFT_TYPES`: how each method's configuration stands in PEFT's ``adapter_config.json``, both ways; a row a method.

What all methods have in common there (which modules, base, task) is written and read in one place, by
`lightning_lora.io.peft_rules`; a row has the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_lora.config import (
    AdaLoRAConfig,
    AdapterConfig,
    BottleneckConfig,
    IA3Config,
    LoRAConfig,
    NormTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeRAConfig,
)
from lightning_lora.errors import CheckpointError, UnsupportedError
from lightning_lora.io.peft_rules import Spec, refuse_unbuilt_lora


@dataclass(frozen=True)
class Chosen:
    """Modules of a live model, as a row writes them.

    Args:
        spec: PEFT's words for which modules are adapted, with which rank and scale.
        names: Of the adapted modules, inside the transformers model.
        transposed: Whether a weight among them is stored ``(in, out)``.
        parameters: Names of fused experts' parameters that are adapted.
        tokens: Ids of the rows that are trained, or a table of them by name of the embedding.
    """

    spec: Spec
    names: list[str]
    transposed: bool
    parameters: list[str] | None = None
    tokens: list[int] | dict[str, list[int]] | None = None


@dataclass(frozen=True)
class PeftType:
    """One value of PEFT's ``peft_type``.

    Args:
        name: The value.
        config: Our configuration for it.
        read: (the parsed file, arguments that all methods share) -> our configuration.
        write: (our configuration, modules) -> what the file has beside what all methods share; also which of
            `Spec`'s words it takes.
        refuse: (the parsed file, what to call it): raises for what the file asks for and is not built.
        layers: Whether the file has ``layers_to_transform``.
        exclude: Whether the file has ``exclude_modules``.
        ranks: Whether its ``rank_pattern`` says which ranks of a module stayed (`lightning_lora.io.rank_pattern`).
        by_names: Whether the file's patterns say which modules are adapted; else the method's own rule does.
    """

    name: str
    config: type[AdapterConfig]
    read: Callable[[Mapping[str, Any], dict[str, Any]], AdapterConfig]
    write: Callable[[Any, Chosen], dict[str, Any]]
    refuse: Callable[[Mapping[str, Any], str], None] = lambda config, where: None
    layers: bool = True
    exclude: bool = True
    ranks: bool = False
    by_names: bool = True


def _read_lora(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    spec = Spec.from_json(config)
    return LoRAConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=config.get("lora_dropout") or 0.0,
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        **more_words(config),
        **shared,
    )


def more_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA's words for what ``target_modules`` does not choose, of a parsed ``adapter_config.json``."""
    return {name: config.get(name) or None for name in ("target_parameters", "trainable_token_indices")}


def _write_lora(config: LoRAConfig, chosen: Chosen) -> dict[str, Any]:
    return {
        "bias": "none",
        "r": chosen.spec.r,
        "lora_alpha": chosen.spec.lora_alpha,
        "rank_pattern": chosen.spec.rank_pattern,
        "alpha_pattern": chosen.spec.alpha_pattern,
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": chosen.transposed,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": "gaussian" if config.init_lora_weights == "gaussian" else True,
        **({"target_parameters": chosen.parameters} if chosen.parameters else {}),
        **({"trainable_token_indices": chosen.tokens} if chosen.tokens else {}),
    }


def _read_ia3(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    return IA3Config(feedforward_modules=config.get("feedforward_modules") or [], **shared)


def _write_ia3(config: IA3Config, chosen: Chosen) -> dict[str, Any]:
    """PEFT wants each of ``feedforward_modules`` to be one of ``target_modules``, and compares ends of names."""
    rescaled = {name: config.is_feedforward(name) for name in chosen.names}
    targets = chosen.spec.target_modules
    entries = [targets] if isinstance(targets, str) else targets
    kinds = {entry: {rescaled[name] for name in chosen.names if name.endswith(entry)} for entry in entries}
    if isinstance(targets, str) or any(len(found) > 1 for found in kinds.values()):
        entries = sorted(chosen.names)
        kinds = {name: {rescaled[name]} for name in entries}
    return {
        "target_modules": entries,
        "feedforward_modules": [entry for entry in entries if kinds[entry] == {True}],
        "fan_in_fan_out": chosen.transposed,
        "init_ia3_weights": True,
    }


def _read_adalora(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    words = {name: config[name] for name in _ADALORA if config.get(name) is not None}
    alpha, r = config.get("lora_alpha", 8), config.get("init_r", 12)
    return AdaLoRAConfig(
        lora_alpha=alpha if alpha > 0 else r,  # PEFT scales by 1 then
        lora_dropout=config.get("lora_dropout") or 0.0,
        **words,
        **shared,
    )


def _write_adalora(config: AdaLoRAConfig, chosen: Chosen) -> dict[str, Any]:
    return {
        "bias": "none",
        **{name: getattr(config, name) for name in _ADALORA},
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": chosen.transposed,
        "init_lora_weights": True,
        # PEFT reads no file without a number that leaves room for its schedule.
        "total_step": max(config.total_step or 0, config.tinit + config.tfinal + 2),
    }


def _read_vera(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    return VeRAConfig(**{name: config[name] for name in _VERA if config.get(name) is not None}, **shared)


def _write_vera(config: VeRAConfig, chosen: Chosen) -> dict[str, Any]:
    words = {name: getattr(config, name) for name in _VERA}
    return {"bias": "none", **words, "fan_in_fan_out": chosen.transposed, "init_weights": True}


def _refuse_biases(config: Mapping[str, Any], where: str) -> None:
    if config.get("bias", "none") != "none":
        raise UnsupportedError(f"{where}: `bias` is {config['bias']!r}; this version trains and loads no biases.")


_ADALORA = ("init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
_VERA = ("r", "d_initial", "projection_prng_key", "save_projection", "vera_dropout")


def _read_prompt(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    return PromptTuningConfig(num_virtual_tokens=_virtual_tokens(config))


def _read_prefix(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    return PrefixTuningConfig(num_virtual_tokens=_virtual_tokens(config))


def _virtual_tokens(config: Mapping[str, Any]) -> int:
    count = config.get("num_virtual_tokens")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise CheckpointError(f"`num_virtual_tokens` is {count!r}, a number of 1 or more is needed")
    return count


def _write_prompt(config: PromptTuningConfig, chosen: Chosen) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",  # it is over
    }


def _write_prefix(config: PrefixTuningConfig, chosen: Chosen) -> dict[str, Any]:
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_transformer_submodules": 1,
        "prefix_projection": False,  # what an MLP gave is in the file, not the MLP
    }


def _refuse_unbuilt_virtual(config: Mapping[str, Any], where: str) -> None:
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise UnsupportedError(
            f"{where}: `task_type` is {config['task_type']!r}; virtual tokens are built for causal models "
            "(CAUSAL_LM) only."
        )
    if config.get("modules_to_save"):
        raise UnsupportedError(
            f"{where}: `modules_to_save` is {config['modules_to_save']!r}; beside virtual tokens no module is trained "
            "in full."
        )
    if config.get("num_transformer_submodules") not in (None, 1):
        raise UnsupportedError(
            f"{where}: `num_transformer_submodules` is {config['num_transformer_submodules']!r}; only 1 is built."
        )


def _read_norms(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    return NormTuningConfig(**shared)


def _read_bottleneck(config: Mapping[str, Any], shared: dict[str, Any]) -> AdapterConfig:
    known = {field.name for field in dataclasses.fields(BottleneckConfig)}
    return BottleneckConfig(**{**shared, **{key: value for key, value in config.items() if key in known}})


def _write_bottleneck(config: BottleneckConfig, chosen: Chosen) -> dict[str, Any]:
    return config.to_dict()


_VIRTUAL: dict[str, Any] = {"refuse": _refuse_unbuilt_virtual, "layers": False, "by_names": False}

_ROWS = (
    PeftType("LORA", LoRAConfig, _read_lora, _write_lora, refuse_unbuilt_lora),
    PeftType("IA3", IA3Config, _read_ia3, _write_ia3, layers=False),
    PeftType("ADALORA", AdaLoRAConfig, _read_adalora, _write_adalora, refuse_unbuilt_lora, ranks=True),
    PeftType("VERA", VeRAConfig, _read_vera, _write_vera, _refuse_biases, exclude=False),
    PeftType("PROMPT_TUNING", PromptTuningConfig, _read_prompt, _write_prompt, **_VIRTUAL),
    PeftType("PREFIX_TUNING", PrefixTuningConfig, _read_prefix, _write_prefix, **_VIRTUAL),
    PeftType("LN_TUNING", NormTuningConfig, _read_norms, lambda config, chosen: {}, layers=False),
)

PEFT_TYPES: dict[str, PeftType] = {row.name: row for row in _ROWS}

#: Of methods that PEFT has not, by ``method`` in a file without a ``peft_type``: folders that this package alone loads.
OWN_TYPES: dict[str, PeftType] = {
    BottleneckConfig.method: PeftType(
        "", BottleneckConfig, _read_bottleneck, _write_bottleneck, layers=False, by_names=False
    )
}


def type_of(config: Mapping[str, Any], where: str) -> PeftType:
    """The row of a parsed ``adapter_config.json``.

    Args:
        config: The parsed file.
        where: What to call it in the message.

    Raises:
        UnsupportedError: A method, or a part of one, that is not built.
    """
    kind = config.get("peft_type")
    row = PEFT_TYPES.get(kind) if isinstance(kind, str) else None
    if kind is None and isinstance(config.get("method"), str):
        row = OWN_TYPES.get(config["method"])
    if row is None:
        raise UnsupportedError(
            f"{where}: `peft_type` is {kind!r}; this version reads {', '.join(sorted(PEFT_TYPES))} only."
        )
    row.refuse(config, where)
    return row


def has_folder(config: AdapterConfig) -> bool:
    """Whether a configuration's method leaves an adapter folder."""
    return _row_for(config) is not None


def _row_for(config: AdapterConfig) -> PeftType | None:
    rows = [*PEFT_TYPES.values(), *OWN_TYPES.values()]
    return next((row for row in rows if row.config is type(config)), None)


def type_for(config: AdapterConfig) -> PeftType:
    """The row of one of our configurations.

    Raises:
        UnsupportedError: PEFT has no such method.
    """
    row = _row_for(config)
    if row is None:
        raise UnsupportedError(
            f"{config.title} leaves no adapter to write: merge the model (`merge_adapters`, `MergeOnFitEnd`), or keep "
            "its checkpoint"
        )
    return row
