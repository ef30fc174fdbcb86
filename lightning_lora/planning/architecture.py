# SPDX-License-Identifier: Apache-2.0
"""A model without values, from its configuration: what it has, what adapters add, what packing leaves.

The real class is built on the meta device, so that every count is the architecture's own and none a formula's.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import ConfigError, MissingDependencyError, Notice
from lightning_lora.model.targets import Targets, find_heads, find_targets
from lightning_lora.nn.layers import is_conv1d, linear_shape
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.planning.decoders import Decoder, DecoderConfig, context_length, known_decoder


@dataclass(frozen=True)
class Architecture:
    """A model's sizes.

    Args:
        name: Of its class.
        config: transformers' configuration, or a `DecoderConfig`.
        params: Parameters.
        nbytes: Bytes of parameters and buffers in the dtype asked for [bytes].
        matmul_params: Parameters that a token is multiplied with: all linears, the head too.
        layers: Number of blocks; 0 where the configuration does not say.
        hidden: Width of the activations between blocks.
        vocab: Length of the logits; 0 without a head.
        adapted: ``(in, out, r)`` of each linear with an adapter.
        packed_nbytes: Bytes of the base when packed [bytes].
        largest_weight: Elements of the largest packed matrix.
        widest: Largest width of any linear's output, the head left out.
        saved_params: Parameters that are trained in full beside the adapters.
        context: Tokens that it was made for; None where the configuration does not say.
        rotary: Whether its positions are rotary, and so without an end.
    """

    name: str
    config: Any
    params: int
    nbytes: int
    matmul_params: int
    layers: int
    hidden: int
    vocab: int
    adapted: list[tuple[int, int, int]]
    packed_nbytes: int
    largest_weight: int
    widest: int
    saved_params: int
    context: int | None
    rotary: bool

    @property
    def adapter_params(self) -> int:
        """Parameters of all A and B."""
        return sum(r * (inn + out) for inn, out, r in self.adapted)


def read_config(model: str | os.PathLike[str] | Mapping[str, Any] | Any) -> Any:
    """Transformers' configuration of a model; nothing is ever downloaded.

    Args:
        model: A folder with a ``config.json``, such a file, its contents, a configuration, or a name that is in the
            local cache.

    Raises:
        ConfigError: There is no configuration, or of no known architecture.
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoConfig, PretrainedConfig
    except ImportError as error:
        raise MissingDependencyError(
            "planning needs `transformers`, which is not installed: pip install 'lightning-lora[hf]'"
        ) from error
    if isinstance(model, PretrainedConfig):
        return model
    if not isinstance(model, Mapping):
        path = Path(model).expanduser()
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            try:
                return AutoConfig.from_pretrained(str(model), local_files_only=True)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"there is no configuration at {os.fspath(model)!r}, and none of that name in the local cache: "
                    "give a folder or a config.json; nothing is downloaded"
                ) from error
        try:
            model = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file} is no JSON: {error}. Give the model's config.json") from error
    if not isinstance(model, Mapping):
        raise ConfigError(f"{file} holds a {type(model).__name__}, not a mapping of keys: give the model's config.json")
    values = dict(model)
    kind = values.pop("model_type", None)
    _check_type(kind)
    try:
        return AutoConfig.for_model(kind, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"a value in the configuration of `model_type` {kind!r} is wrong: {error}") from error


def _check_type(kind: Any) -> None:
    from transformers import CONFIG_MAPPING, __version__

    if kind in CONFIG_MAPPING:
        return
    near = difflib.get_close_matches(str(kind), [str(name) for name in CONFIG_MAPPING.keys()], n=3)  # noqa: SIM118
    raise ConfigError(
        f"`model_type` {kind!r} is none that this version of transformers ({__version__}) knows"
        + (f"; nearest: {', '.join(near)}" if near else "")
    )


def read_any(model: str | os.PathLike[str] | Mapping[str, Any] | Any) -> Any:
    """A configuration with what a plan needs: a `DecoderConfig` where the family is known, else transformers'.

    Raises:
        ConfigError, MissingDependencyError: See `read_config`.
    """
    values = model
    if isinstance(model, str | os.PathLike):
        path = Path(model).expanduser()
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError):
            return read_config(model)  # which says what is wrong, or finds a name in the cache
    known = known_decoder(values) if isinstance(values, Mapping) else None
    return read_config(model) if known is None else known


def architecture(config: Any, lora: LoRAConfig, dtype: torch.dtype) -> Architecture:
    """Build the model on the meta device and count.

    Args:
        config: transformers' configuration, or a `DecoderConfig`.
        lora: Which modules, which ranks, and how linears are packed ("none": as for nf4).
        dtype: Of the base.

    Raises:
        ConfigError: transformers cannot build the model.
        TargetError: The adapters match nothing.
    """
    model = on_meta(config, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        targets = find_targets(model, lora)
    kind = lora.quantize if lora.quantize != "none" else "nf4"
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    nbytes = sum(t.numel() * t.element_size() for t in tensors)
    freed, largest = _packing(model, targets, kind)
    heads = {id(model.get_submodule(name)) for name in find_heads(model)}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    text = config.get_text_config()
    context, rotary = positions(config)
    return Architecture(
        name=config.name if isinstance(config, DecoderConfig) else type(model).__name__,
        config=config,
        params=sum(p.numel() for p in model.parameters()),
        nbytes=nbytes,
        matmul_params=sum(m.weight.numel() for m in linears),  # type: ignore[operator, misc]
        layers=int(getattr(text, "num_hidden_layers", 0) or 0),
        hidden=int(getattr(text, "hidden_size", 0) or 0),
        vocab=max((linear_shape(m)[1] for m in linears if id(m) in heads), default=0),
        adapted=[(*linear_shape(model.get_submodule(n)), lora.rank_for(n)) for n in targets.adapted],
        packed_nbytes=nbytes - freed,
        largest_weight=largest,
        widest=max((linear_shape(m)[1] for m in linears if id(m) not in heads), default=0),
        saved_params=sum(p.numel() for n in targets.saved for p in model.get_submodule(n).parameters()),
        context=context,
        rotary=rotary,
    )


def positions(config: Any) -> tuple[int | None, bool]:
    """Tokens that a model was made for, None where its configuration does not say, and whether they are rotary.

    Args:
        config: transformers' configuration, or a `DecoderConfig`.
    """
    if isinstance(config, DecoderConfig):
        return config.context, True
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    named = getattr(text, "max_position_embeddings", None)
    if type(named) is not int or named < 1:
        return None, rope is not None
    return context_length(named, rope), rope is not None


def on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration without values.

    Raises:
        ConfigError: transformers cannot build it.
    """
    with torch.device("meta"):
        return build(config, dtype)


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model of a configuration with random values, on the device of the moment.

    Raises:
        ConfigError: transformers cannot build it.
    """
    if isinstance(config, DecoderConfig):
        return Decoder(config, dtype)
    import transformers

    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or "", None)
    kinds = [named] if named is not None else [transformers.AutoModelForCausalLM, transformers.AutoModel]
    problem: Exception | None = None
    for kind in kinds:
        make = getattr(kind, "_from_config", None) or kind.from_config
        try:
            return make(copy.deepcopy(config), dtype=dtype)
        except Exception as error:  # whatever a model's own code raises over a wrong configuration
            problem = error
    raise ConfigError(f"transformers cannot build {type(config).__name__}: {problem}")


def _packing(model: nn.Module, targets: Targets, kind: str) -> tuple[int, int]:
    """Bytes that packing saves, and elements of the largest matrix."""
    sizes: dict[tuple[int, ...], int] = {}
    freed = largest = 0
    for name in targets.packed:
        weight: Any = model.get_submodule(name).weight
        shape = tuple(weight.shape)
        if shape not in sizes:
            sizes[shape] = PackedWeight(torch.empty(shape, dtype=weight.dtype, device="meta"), kind).nbytes
        freed += weight.numel() * weight.element_size() - sizes[shape]
        largest = max(largest, weight.numel())
    return freed, largest
