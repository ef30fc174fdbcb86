# SPDX-License-Identifier: Apache-2.0
"""The models of a command: a base with an adapter in it, or a base and another whole model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_lora.bars import Bar
from lightning_lora.causal_lm.module import CausalLMModule
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.two_models import TwoModels
from lightning_lora.io.adapter import load_adapter
from lightning_lora.io.checkpoint_file import KEY
from lightning_lora.io.distributed import is_distributed, read_either
from lightning_lora.io.folder import CONFIG, AdapterFolder
from lightning_lora.io.litgpt import is_litgpt
from lightning_lora.model.fingerprint import digest, distinct_tensors, fingerprint, same_base

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Models:
    """What a command compares.

    Args:
        tuned: The base with its adapter, or a whole model.
        base: The base where `tuned` is a whole model, else None: it is `tuned` with the adapter off.
    """

    tuned: CausalLMModule
    base: CausalLMModule | None

    def scorer(self, **options: Any) -> Scorer:
        """Asks both; prompts and tokens are those of the base's tokenizer.

        Args:
            options: Of `Scorer`.
        """
        if self.base is None:
            return Scorer(self.tuned, **options)
        return TwoModels(self.tuned, self.base, tokenizer=self.base.tokenizer, **options)


def read_models(base: str, adapter: str, dtype: str, quantize: str | None, device: str, bar: Bar) -> Models:
    """Load them.

    Args:
        base: Folder or name of the base.
        adapter: Adapter folder, checkpoint, or folder of a whole model.
        dtype: Of the base's weights.
        quantize: Packing of the base; as it was trained if null.
        device: "auto" or torch's name of a device.
        bar: Shows how far the packing is.

    Raises:
        CheckpointError: There is nothing where `base` or `adapter` says.
        ConfigError: An argument has no such value.
    """
    place = _device(device)
    check_base(base)
    if not Path(adapter).expanduser().exists():
        raise CheckpointError(
            f"there is no adapter at {adapter}: name an adapter folder, a checkpoint or a model folder"
        )
    if is_whole_model(adapter):
        if quantize is not None:
            raise ConfigError(f"`quantize` packs a base under an adapter, and {adapter} is a whole model: leave it out")
        return Models(_loaded(adapter, dtype).to(place).eval(), _loaded(base, dtype).to(place).eval())
    module = _loaded(base, dtype)
    if dtype == "auto" and (trained := _trained_in(module, adapter)) != "auto":
        module = _loaded(base, trained)
    load_adapter(module, adapter, quantize=quantize, bar=bar)
    return Models(module.to(place).eval(), None)


def check_base(base: str) -> None:
    """See that what looks like a path leads to a model; what may be a name on the hub is left to transformers.

    Raises:
        CheckpointError: It leads nowhere.
    """
    path = Path(base).expanduser()
    if (path / "config.json").is_file():
        return
    if path.exists() or base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise CheckpointError(f"there is no model at {base}: name the folder that holds its config.json")


def is_whole_model(adapter: str) -> bool:
    """Whether a folder holds a model of its own, no adapter."""
    path = Path(adapter).expanduser()
    return (path / "config.json").is_file() and not (path / CONFIG).is_file() and not is_litgpt(path)


def _loaded(base: str, dtype: Any) -> CausalLMModule:
    module = CausalLMModule(str(Path(base).expanduser()) if Path(base).expanduser().exists() else base, dtype=dtype)
    try:
        module.configure_model()
    except ValueError as error:  # an architecture that transformers does not know, a file that is no model's
        raise CheckpointError(f"{base} cannot be loaded: {error}") from error
    return module


def _trained_in(module: CausalLMModule, adapter: str) -> str:
    """The dtype in which the base's values are those that the adapter was trained over; "auto" for the stored one.

    A run may load a base in another dtype than its files have, and says so nowhere but in the fingerprint.
    """
    path = Path(adapter).expanduser()
    if path.is_file() or is_distributed(path):
        entry = read_either(path, optimizers=False).get(KEY)
        expected = entry.get("fingerprint") if isinstance(entry, dict) else None
    else:
        expected = None if is_litgpt(path) else AdapterFolder.open(path).record.get("fingerprint")
    if not expected or same_base(expected, fingerprint(module, expected.get("without") or ())) is not False:
        return "auto"
    left_out = tuple(f"{name}." for name in expected.get("without") or ())
    tensors = [tensor for name, tensor in distinct_tensors(module.model) if not name.startswith(left_out)]
    found = (name for name, dtype in DTYPES.items() if digest(tensors, dtype) == expected["digest"])
    return next(found, "auto")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"`device` must be auto, cpu, cuda or a numbered one as cuda:1, got {name!r}") from error
