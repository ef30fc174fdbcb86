# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA for the Lightning Trainer you already have.

Add the `LoRA` callback, keep your LightningModule, and see on every run what the model forgets. Names are
imported when they are first used; ``import lightning_lora`` costs what Lightning itself does.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from lightning_lora.version import __version__ as __version__

if TYPE_CHECKING:
    from lightning_lora.callbacks.adalora import AdaLoRA
    from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
    from lightning_lora.callbacks.adapter_diagnostics import AdapterDiagnostics
    from lightning_lora.callbacks.adapter_summary import AdapterSummary
    from lightning_lora.callbacks.base_kl import BaseKL
    from lightning_lora.callbacks.bottleneck import Bottleneck
    from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
    from lightning_lora.callbacks.full import FullTuning
    from lightning_lora.callbacks.ia3 import IA3
    from lightning_lora.callbacks.lora import LoRA
    from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
    from lightning_lora.callbacks.norms import NormTuning
    from lightning_lora.callbacks.prefix import PrefixTuning
    from lightning_lora.callbacks.prompt import PromptTuning
    from lightning_lora.callbacks.replay_mix import ReplayMix
    from lightning_lora.callbacks.run_report import RunReport
    from lightning_lora.callbacks.scale_sweep import ScaleSweep
    from lightning_lora.callbacks.vera import VeRA
    from lightning_lora.causal_lm.datamodule import InstructionDataModule
    from lightning_lora.causal_lm.module import CausalLMModule
    from lightning_lora.config import (
        AdaLoRAConfig,
        AdapterConfig,
        BottleneckConfig,
        FullTuningConfig,
        IA3Config,
        LoRAConfig,
        NormTuningConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        VeRAConfig,
    )
    from lightning_lora.io.adapter import load_adapter, save_adapter
    from lightning_lora.io.checkpoint import load_from_checkpoint
    from lightning_lora.io.expert_files import export_experts
    from lightning_lora.io.loaders import validate_adapter
    from lightning_lora.io.merge import merge_adapters, merged_state_dict
    from lightning_lora.io.merge_disk import merge_to_disk
    from lightning_lora.model.apply import ApplyReport, apply_adapters, apply_lora, disable_adapters, set_adapter_scale
    from lightning_lora.model.combine import add_weighted_adapter
    from lightning_lora.model.eva import eva_start
    from lightning_lora.model.loraplus import loraplus_param_groups
    from lightning_lora.model.mixed import mixed_batch
    from lightning_lora.model.residents import (
        active_adapter,
        delete_adapter,
        list_adapters,
        set_adapter,
        use_adapter,
    )
    from lightning_lora.model.state import adapter_state_dict
    from lightning_lora.model.tensor_parallel import parallelize_adapted
    from lightning_lora.model.vocabulary import add_tokens
    from lightning_lora.planning.plan import plan
    from lightning_lora.planning.result import Plan
    from lightning_lora.strategies.ddp import AdapterDDPStrategy
    from lightning_lora.strategies.deepspeed import AdapterDeepSpeedStrategy
    from lightning_lora.strategies.fsdp import AdapterFSDPStrategy
    from lightning_lora.strategies.model_parallel import AdapterModelParallelStrategy
    from lightning_lora.strategies.single_device import AdapterSingleDeviceStrategy
    from lightning_lora.strategies.state import AdapterStateMixin

_HOME = {
    "AdaLoRA": "callbacks.adalora",
    "AdaLoRAConfig": "config",
    "AdapterCheckpoint": "callbacks.adapter_checkpoint",
    "AdapterConfig": "config",
    "AdapterDDPStrategy": "strategies.ddp",
    "AdapterDeepSpeedStrategy": "strategies.deepspeed",
    "AdapterDiagnostics": "callbacks.adapter_diagnostics",
    "AdapterFSDPStrategy": "strategies.fsdp",
    "AdapterModelParallelStrategy": "strategies.model_parallel",
    "AdapterSingleDeviceStrategy": "strategies.single_device",
    "AdapterStateMixin": "strategies.state",
    "AdapterSummary": "callbacks.adapter_summary",
    "ApplyReport": "model.apply",
    "BaseKL": "callbacks.base_kl",
    "Bottleneck": "callbacks.bottleneck",
    "BottleneckConfig": "config",
    "CausalLMModule": "causal_lm.module",
    "ForgettingMonitor": "callbacks.forgetting_monitor",
    "FullTuning": "callbacks.full",
    "FullTuningConfig": "config",
    "IA3": "callbacks.ia3",
    "IA3Config": "config",
    "InstructionDataModule": "causal_lm.datamodule",
    "LoRA": "callbacks.lora",
    "LoRAConfig": "config",
    "MergeOnFitEnd": "callbacks.merge_on_fit_end",
    "NormTuning": "callbacks.norms",
    "NormTuningConfig": "config",
    "Plan": "planning.result",
    "PrefixTuning": "callbacks.prefix",
    "PrefixTuningConfig": "config",
    "PromptTuning": "callbacks.prompt",
    "PromptTuningConfig": "config",
    "ReplayMix": "callbacks.replay_mix",
    "RunReport": "callbacks.run_report",
    "ScaleSweep": "callbacks.scale_sweep",
    "VeRA": "callbacks.vera",
    "VeRAConfig": "config",
    "active_adapter": "model.residents",
    "adapter_state_dict": "model.state",
    "add_tokens": "model.vocabulary",
    "add_weighted_adapter": "model.combine",
    "apply_adapters": "model.apply",
    "apply_lora": "model.apply",
    "delete_adapter": "model.residents",
    "disable_adapters": "model.apply",
    "eva_start": "model.eva",
    "export_experts": "io.expert_files",
    "list_adapters": "model.residents",
    "load_adapter": "io.adapter",
    "load_from_checkpoint": "io.checkpoint",
    "loraplus_param_groups": "model.loraplus",
    "merge_adapters": "io.merge",
    "merge_to_disk": "io.merge_disk",
    "merged_state_dict": "io.merge",
    "mixed_batch": "model.mixed",
    "parallelize_adapted": "model.tensor_parallel",
    "plan": "planning.plan",
    "save_adapter": "io.adapter",
    "set_adapter": "model.residents",
    "set_adapter_scale": "model.apply",
    "use_adapter": "model.residents",
    "validate_adapter": "io.loaders",
}

__all__ = [
    "AdaLoRA",
    "AdaLoRAConfig",
    "AdapterCheckpoint",
    "AdapterConfig",
    "AdapterDDPStrategy",
    "AdapterDeepSpeedStrategy",
    "AdapterDiagnostics",
    "AdapterFSDPStrategy",
    "AdapterModelParallelStrategy",
    "AdapterSingleDeviceStrategy",
    "AdapterStateMixin",
    "AdapterSummary",
    "ApplyReport",
    "BaseKL",
    "Bottleneck",
    "BottleneckConfig",
    "CausalLMModule",
    "ForgettingMonitor",
    "FullTuning",
    "FullTuningConfig",
    "IA3",
    "IA3Config",
    "InstructionDataModule",
    "LoRA",
    "LoRAConfig",
    "MergeOnFitEnd",
    "NormTuning",
    "NormTuningConfig",
    "Plan",
    "PrefixTuning",
    "PrefixTuningConfig",
    "PromptTuning",
    "PromptTuningConfig",
    "ReplayMix",
    "RunReport",
    "ScaleSweep",
    "VeRA",
    "VeRAConfig",
    "active_adapter",
    "adapter_state_dict",
    "add_tokens",
    "add_weighted_adapter",
    "apply_adapters",
    "apply_lora",
    "delete_adapter",
    "disable_adapters",
    "eva_start",
    "export_experts",
    "list_adapters",
    "load_adapter",
    "load_from_checkpoint",
    "loraplus_param_groups",
    "merge_adapters",
    "merge_to_disk",
    "merged_state_dict",
    "mixed_batch",
    "parallelize_adapted",
    "plan",
    "save_adapter",
    "set_adapter",
    "set_adapter_scale",
    "use_adapter",
    "validate_adapter",
]


def _is_command() -> bool:
    """Whether this process is ``lightning-lora`` or ``python -m lightning_lora``, whose help imports no torch."""
    program = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    return program.startswith("lightning-lora") or (program == "-m" and sys.orig_argv[1:3] == ["-m", __name__])


# `Trainer(strategy="lora")` looks names up when it is made: they must be there by then.
if not _is_command():
    from lightning_lora.strategies.registry import register_strategies

    register_strategies()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
