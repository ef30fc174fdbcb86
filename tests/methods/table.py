# SPDX-License-Identifier: Apache-2.0
"""Every method with small settings, and what may be expected of each: who adds a method adds its row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning_lora
from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import AdapterConfig


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        name: Of the row.
        callback: Name of the callback's class in the package.
        settings: Its arguments.
        learns_at: Learning rate at which a few steps move it visibly.
        exact: Whether the frozen part is the base itself, so that off is the base bit for bit.
        tolerance: How far off is from the base where it is not, relative to its logits.
        begins: Whether it begins as the base.
        merges: Whether it has a merged form; else merging is refused by name.
        peft: Whether PEFT has it; else there is no folder and it is refused by name.
        own_folder: Whether we write a folder for it although PEFT has no such method.
        low_rank: Whether its updates are of low rank, so that spectra say something.
        kin: Whether another row goes through the same code: its laws are among the slow tests.
        divisible: Whether there is something between it and the base; else strengths other than 0 and 1 are refused.
        packed: Whether it goes with a packed base; else that is refused by name.
    """

    name: str
    callback: str
    settings: dict[str, Any] = field(default_factory=dict)
    learns_at: float = 1e-2
    exact: bool = True
    tolerance: float = 1e-5
    begins: bool = True
    merges: bool = True
    peft: bool = True
    own_folder: bool = False
    packed: bool = True
    low_rank: bool = True
    kin: bool = False
    divisible: bool = True

    def make(self, **settings: Any) -> AdapterCallback:
        """The callback."""
        made: AdapterCallback = getattr(lightning_lora, self.callback)(**{**self.settings, **settings})
        return made

    def config(self, **settings: Any) -> AdapterConfig:
        """Its configuration."""
        return self.make(**settings).config

    def __str__(self) -> str:
        return self.name


VIRTUAL = {"num_virtual_tokens": 4}
ROWS = (
    Row("lora", "LoRA", {"r": 4}),
    Row("rslora", "LoRA", {"r": 4, "use_rslora": True}, kin=True),
    Row("lora+", "LoRA", {"r": 4, "loraplus_lr_ratio": 4.0}, kin=True),
    Row("lora-fa", "LoRA", {"r": 4, "freeze_lora_A": True}),
    Row("eva", "LoRA", {"r": 4, "init_lora_weights": "eva", "eva_batches": 2}),
    Row("pissa", "LoRA", {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}, exact=False),
    Row("olora", "LoRA", {"r": 4, "lora_alpha": 4, "init_lora_weights": "olora"}, exact=False, kin=True),
    Row(  # what its packed base and its start leave out of the base is there in all that it computes
        "loftq",
        "LoRA",
        {"r": 4, "lora_alpha": 4, "init_lora_weights": "loftq", "loftq_iter": 3, "quantize": "nf4"},
        exact=False,
        tolerance=0.2,
    ),
    Row("dora", "LoRA", {"r": 4, "use_dora": True}),
    Row("embedding", "LoRA", {"r": 4, "target_modules": ["embed_tokens", "wte", "q_proj", "c_attn"]}),
    Row("tokens", "LoRA", {"r": 4, "trainable_token_indices": [3, 5]}),
    Row("ia3", "IA3", learns_at=5e-2, low_rank=False),
    Row("vera", "VeRA", {"r": 8}, learns_at=5e-2),
    Row("adalora", "AdaLoRA", {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1}, learns_at=5e-2),
    Row("vera, drawn", "VeRA", {"r": 16, "save_projection": False}, learns_at=5e-2, kin=True),
    Row("prompt", "PromptTuning", VIRTUAL, begins=False, merges=False, low_rank=False, divisible=False),
    Row("prefix", "PrefixTuning", VIRTUAL, begins=False, merges=False, low_rank=False, divisible=False),
    Row(
        "bottleneck",
        "Bottleneck",
        {"placement": "houlsby", "bottleneck_size": 6},
        merges=False,
        peft=False,
        own_folder=True,
        low_rank=False,
    ),
    Row("norms", "NormTuning", low_rank=False),
    Row("full", "FullTuning", learns_at=1e-3, peft=False, packed=False, low_rank=False),
)
