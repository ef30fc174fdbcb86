# SPDX-License-Identifier: Apache-2.0
"""The portable layout: an adapter that PEFT, vLLM, SGLang, TGI and llama.cpp scale in one and the same way.

    A' = (A; 0)    (R, in)         R: the smallest rank that servers accept and that holds every adapter
    B' = (s B, 0)  (out, R)        s: scaling * strength, multiplied in fp32
    r = lora_alpha = R             a scale of 1 by whatever rule

Linears that servers fuse with an adapted one, and those of the same name in other layers, get an adapter with
B = 0. Modules are named by their last component wherever that is unambiguous.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, MergeError, UnsupportedError
from lightning_lora.io.folder import PREFIX, AdapterFolder
from lightning_lora.io.loader_rules import RANKS, missing_siblings
from lightning_lora.io.loaders import LOADERS
from lightning_lora.io.names import adapter_root, named_adapters, plain_modules, task_type
from lightning_lora.io.peft_rules import Spec
from lightning_lora.model.inner import inner_model
from lightning_lora.model.slots import adapter_record
from lightning_lora.model.targets import is_adaptable, matches
from lightning_lora.nn.layers import linear_shape
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear
from lightning_lora.nn.saved import SavedModule
from lightning_lora.nn.sharded import is_sharded

#: Largest relative error of an update that the read-back may find, by the dtype of the file.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def portable_contents(
    model: nn.Module, dtype: torch.dtype | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], LoRAConfig]:
    """``adapter_config.json``, the tensors, and the configuration that converts a model to them.

    Args:
        model: A converted model, or a LightningModule around one.
        dtype: Of the written factors; fp32 if null.

    Raises:
        AdapterMismatchError: The model has no adapters.
        UnsupportedError: Something that is no low-rank update of a linear layer, a rank that no server takes,
            or values that do not fit `dtype`.
    """
    adapted = _adapted(model)
    _, root = adapter_root(model)
    plain = plain_modules(root)
    rank = _common_rank(adapted)
    zeros = _completion(set(adapted), plain)
    tensors = {}
    for name, module in adapted.items():
        factors = dict(zip("AB", _folded(module, rank), strict=True))
        cast = {x: fitting_cast(name, f, dtype or torch.float32) for x, f in factors.items()}
        tensors.update({f"{PREFIX}{name}.lora_{x}.weight": factor for x, factor in cast.items()})
    for name in zeros:
        inn, out = linear_shape(plain[name])
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _start(name, inn, rank, tensors, dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.zeros(out, rank, dtype=dtype or torch.float32)
    names = {*adapted, *zeros}
    spec = Spec(target_modules=_target_names(names, plain), r=rank, lora_alpha=rank)
    config = {
        "peft_type": "LORA",
        "task_type": task_type(root, []),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(module.fan_in_fan_out for module in adapted.values()),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        **dataclasses.asdict(spec),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    return config, tensors, _own_config(model, spec, names)


def check_portable(model: nn.Module, part: Path) -> float:
    """Read a portable folder back and compare every module's update, by each loader's scale, with the live one.

    Args:
        model: The live model.
        part: The folder.

    Returns:
        The largest ``||dW' - dW|| / ||dW||``.

    Raises:
        MergeError: It is larger than the dtype explains, or a loader's scale is not 1.
    """
    folder = AdapterFolder.open(part)
    tensors, adapted = folder.tensors(), _adapted(model)
    worst = 0.0
    for key in tensors:
        name, _, factor = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if factor != "B":
            continue
        A, B = (tensors[f"{PREFIX}{name}.lora_{x}.weight"] for x in "AB")
        scales = {loader: rules.scale(folder, name, A.shape[0]) for loader, rules in LOADERS.items()}
        if set(scales.values()) != {1.0}:
            raise MergeError(f"{name!r}: the portable folder would be scaled by {scales}, which must be 1")
        if name not in adapted:
            error = float(B.abs().max())
        else:
            live = adapted[name]
            scale = live.scaling * live.strength
            live_A, live_B = (factor.cpu() for factor in live.update_factors())
            error = update_error(A, B, live_A, live_B.double() * scale)
        if not error <= LIMITS[B.dtype]:
            raise MergeError(
                f"{name!r}: the update that was read back differs from the live one by {error:.2e}, the limit for "
                f"{B.dtype} is {LIMITS[B.dtype]:.0e}; leave `dtype` out to write fp32"
            )
        worst = max(worst, error)
    return worst


def update_error(A: Tensor, B: Tensor, live_A: Tensor, live_B: Tensor) -> float:
    """``||B A - B' A'|| / ||B' A'||`` from the factors alone, in fp64: no matrix of the layer's size is made.

    With the differences stacked, ``D = (B, -B') (A; A')``, the norm is ``sqrt(sum((B^T B) * (A A^T)))`` of the
    stacked factors; the floor of the result is about 1e-8.
    """
    A, B, live_A, live_B = (factor.double() for factor in (A, B, live_A, live_B))
    size = _norm(live_A, live_B)
    difference = _norm(torch.cat([A, live_A]), torch.cat([B, -live_B], dim=1))
    return difference / size if size > 0 else difference


def _norm(A: Tensor, B: Tensor) -> float:
    return float(((B.t() @ B) * (A @ A.t())).sum().clamp(min=0).sqrt())


def _adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted linears by name; everything that has no place in a portable folder is refused."""
    if adapter_record(model) is None:
        raise AdapterMismatchError("the model has no adapters to write; call `apply_lora` or add the `LoRA` callback")
    if adapter_root(model)[0] != inner_model(model)[0]:
        raise UnsupportedError(
            "adapters lie outside the transformers model, where no server looks for them: "
            'leave them out, or write layout="peft", which PEFT loads over the whole module'
        )
    adapters = dict(named_adapters(model))
    saved = [name for name, module in adapters.items() if isinstance(module, SavedModule)]
    if saved:
        raise UnsupportedError(
            f"{saved} were trained in full (`modules_to_save`), which servers do not load: merge the model "
            '(`merge_adapters`, `merge_to_disk`), or write layout="peft" for PEFT alone'
        )
    other = next((name for name, module in adapters.items() if "portable" not in module.built_for), None)
    if other is not None:
        merge = "" if adapters[other].unmergeable else "merge the model (`merge_adapters`), or "
        raise UnsupportedError(
            f"{other!r} is {adapters[other].title}, which is no low-rank update: {merge}write "
            'layout="peft" for PEFT alone'
        )
    linears = {name: module for name, module in adapters.items() if isinstance(module, LoRALinear)}
    tied = _tied_to_an_embedding(adapter_root(model)[1], linears)
    if tied:
        raise UnsupportedError(
            f"{tied!r} is adapted and shares its weight with an embedding, which servers change together or not "
            "at all: merge the model (`merge_adapters`, `merge_to_disk`), which unties them"
        )
    return linears


def _tied_to_an_embedding(root: nn.Module, linears: Mapping[str, LoRALinear]) -> str | None:
    shared = {id(module.weight) for module in root.modules() if isinstance(module, nn.Embedding)}
    dense = ((name, m.base_layer._parameters.get("weight")) for name, m in linears.items())
    return next((name for name, weight in dense if id(weight) in shared), None)


def _common_rank(adapted: Mapping[str, LoRALinear]) -> int:
    name, largest = max(((name, module.update_rank) for name, module in adapted.items()), key=lambda item: item[1])
    fitting = next((rank for rank in RANKS if rank >= largest), None)
    if fitting is None:
        raise UnsupportedError(f"{name!r} has rank {largest}, servers take {RANKS[-1]} at most: merge the model")
    return fitting


def _folded(module: LoRALinear, rank: int) -> tuple[Tensor, Tensor]:
    """A and B in fp32 on the CPU, the scale in B, both padded with zeros to `rank`."""
    if is_sharded(module.lora_A) or module.lora_A.is_meta:
        raise UnsupportedError("adapters are sharded or on the meta device: they are written from whole tensors")
    A, B = (factor.float().cpu() for factor in module.update_factors())
    missing = rank - module.update_rank
    B = B * (module.scaling * module.strength)
    return torch.nn.functional.pad(A, (0, 0, 0, missing)), torch.nn.functional.pad(B, (0, missing))


def fitting_cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in another dtype.

    Raises:
        UnsupportedError: Its values have no room there.
    """
    cast = tensor.to(dtype).contiguous()
    if cast.isinf().any() and not tensor.isinf().any():
        raise UnsupportedError(f"{name!r}: values up to {tensor.abs().max():.3g} do not fit {dtype}: use bf16 or fp32")
    return cast


def _start(name: str, inn: int, rank: int, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    """A of an adapter that is zero: another's with the same input, so that training can go on from it."""
    parent = PREFIX + name.rpartition(".")[0]
    fitting = [key for key, tensor in tensors.items() if key.endswith("lora_A.weight") and tensor.shape[1] == inn]
    beside = [key for key in fitting if key.startswith(f"{parent}.")]
    if not fitting:
        return torch.zeros(rank, inn, dtype=dtype or torch.float32)
    return tensors[(beside or fitting)[0]].clone()


def _completion(adapted: set[str], plain: Mapping[str, nn.Module]) -> list[str]:
    """The linears that need an adapter too: siblings of adapted ones, and their like in all layers."""
    linears = {name for name, module in plain.items() if is_adaptable(module) or isinstance(module, PackedLinear)}
    names = adapted | {name for name in missing_siblings(adapted) if name in linears}
    kinds = {_kind(name) for name in names}
    return [name for name in plain if name in linears and (name in names or _kind(name) in kinds)]


def _kind(name: str) -> str:
    """The name with its first number, the index of its layer, left out."""
    return re.sub(r"(^|\.)\d+(\.|$)", r"\1*\2", name, count=1)


def _target_names(names: set[str], plain: Mapping[str, nn.Module]) -> list[str]:
    """Last components, where PEFT's rules read them as exactly these modules; else whole names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    spec = Spec(target_modules=short, r=1, lora_alpha=1)
    return short if all(spec.targets(name) == (name in names) for name in plain) else sorted(names)


def _own_config(model: nn.Module, spec: Spec, names: set[str]) -> LoRAConfig:
    """What `apply_lora` needs to make the adapters of a portable folder, over a base packed as in training."""
    record = adapter_record(model)
    trained = record.config if record and isinstance(record.config, LoRAConfig) else LoRAConfig()
    trained = trained.converted()
    excluded = trained.exclude_modules
    if excluded and any(matches(excluded, name) for name in names):
        excluded = None
    return dataclasses.replace(
        trained,
        r=spec.r,
        lora_alpha=float(spec.r),
        lora_dropout=0.0,
        target_modules=spec.target_modules,
        exclude_modules=excluded,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        rank_pattern=None,
        alpha_pattern=None,
        use_rslora=False,
        adapter_dtype="fp32",  # s B in the trained dtype would be another update
    )
