# SPDX-License-Identifier: Apache-2.0
"""`export_experts`: adapters of fused experts as two factors for each expert, for servers whose experts are apart.

::

    fused, as trained                                  apart, as the model's own files name its experts
    ...mlp.experts   A (E r, in)    B (out, r E)       ...mlp.experts.<e>.gate_proj   A[e]   B[e], its first rows
                                                       ...mlp.experts.<e>.up_proj     A[e]   B[e], the others
                                                       ...mlp.experts.<e>.down_proj   ...

transformers knows which of a file's tensors it fuses, and in what order; B is taken apart by that same knowledge.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, UnsupportedError
from lightning_lora.io.atomic import atomic_folder
from lightning_lora.io.folder import CONFIG, PREFIX, WEIGHTS, check_target, package_version
from lightning_lora.io.names import adapter_root, named_adapters, task_type
from lightning_lora.model.slots import is_adapted
from lightning_lora.nn.experts import LoRAExperts, is_transposed
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.lowrank import Site


@dataclass(frozen=True)
class ExpertExport:
    """What `export_experts` wrote.

    Args:
        path: The folder.
        layers: How many two-dimensional layers have factors, the experts' and all others.
        r: Rank of all of them.
    """

    path: Path
    layers: int
    r: int


@torch.no_grad()
def export_experts(model: nn.Module, dir: str | os.PathLike[str]) -> ExpertExport:
    """Write a folder in which each expert has factors of its own, with linears' beside them, all at scale 1.

    The names are those of the model's files (``experts.0.w1``, ``experts.0.gate_proj``), which servers go by. It is
    for them alone: PEFT and `load_adapter` read the folder of `save_adapter`, where the experts are fused as in the
    model.

    Args:
        model: A converted model whose experts are adapted (``target_parameters``).
        dir: The folder. An adapter folder that stands there is replaced as a whole, anything else is not.

    Raises:
        AdapterMismatchError: The model has no adapters of fused experts.
        UnsupportedError: Something else than experts and linears is adapted, or in this model's files the experts are
            fused too.
        CheckpointError: The folder holds something that is not of an adapter folder, or is a file.
    """
    path = Path(dir).expanduser()
    check_target(path)
    adapters = dict(named_adapters(model)) if is_adapted(model) else {}
    if not any(isinstance(module, LoRAExperts) for module in adapters.values()):
        raise AdapterMismatchError("no fused experts are adapted: name their parameters in `target_parameters`")
    _, root = adapter_root(model)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in adapters.items():
        if isinstance(module, LoRAExperts):
            for site in module.sites:
                pairs |= _apart(root, name, module, site)
        elif type(module) is LoRALinear:
            pairs[name] = module.lora_A, module.lora_B * (module.scaling * module.strength)
        else:
            raise UnsupportedError(
                f"{name!r} is adapted too (a {type(module).__name__}), which servers do not load beside experts: merge "
                "the model with `merge_adapters`"
            )
    r = max(A.shape[0] for A, _ in pairs.values())
    tensors = {}
    for name, (A, B) in pairs.items():
        missing = r - A.shape[0]
        tensors[f"{PREFIX}{name}.lora_A.weight"] = _padded(A, (0, 0, 0, missing))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = _padded(B, (0, missing))
    config = {
        "peft_type": "LORA",
        "task_type": task_type(root, []),
        "base_model_name_or_path": getattr(getattr(root, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(getattr(m, "fan_in_fan_out", False) for m in adapters.values()),
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "use_rslora": False,
    }
    with atomic_folder(path) as part:
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt", "lightning_lora": package_version()})
    return ExpertExport(path, len(pairs), r)


def _apart(root: nn.Module, name: str, module: LoRAExperts, site: Site) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of one fused parameter by the names of the layers that it is made of."""
    A, B = module.expert_factors(site, *(factor.detach().float() for factor in module.factors(site)))
    key = f"{name}.{site.parameter}"
    if is_transposed(module.base_layer):
        raise UnsupportedError(f"{key!r} is fused in the model's files too: no server keeps these experts apart")
    # Rows are numbered, so that each tensor of the files tells which expert's rows it holds, and which of them.
    count, out = B.shape[:2]
    rows = torch.arange(count * out, dtype=torch.float64).view(count, out, 1)
    found = {}
    for own, numbers in _as_in_files(root, {key: rows}).items():
        if numbers.dim() != 2:
            raise UnsupportedError(f"{key!r} is fused in the model's files too: no server keeps these experts apart")
        first = int(numbers[0, 0])
        expert, row = first // out, first % out
        rows_of_B = B[expert, row : row + numbers.shape[0]]
        found[own.removesuffix(".weight")] = A[expert], rows_of_B * module.factor(site)
    return found


def _as_in_files(root: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names and in the shapes that its files have."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise UnsupportedError(
            "`export_experts` needs transformers 5, which knows how a model's files name its experts"
        ) from error
    found: dict[str, Tensor] = revert_weight_conversion(root, tensors)
    return found


def _padded(tensor: Tensor, padding: tuple[int, ...]) -> Tensor:
    return nn.functional.pad(tensor.detach().float().cpu(), padding).contiguous()
