# SPDX-License-Identifier: Apache-2.0
"""`AdapterDDPStrategy`: the whole model on every process."""

from __future__ import annotations

from lightning.pytorch.strategies import DDPStrategy

from lightning_lora.strategies.state import AdapterStateMixin


class AdapterDDPStrategy(AdapterStateMixin, DDPStrategy):
    """`DDPStrategy` with adapter-only checkpoints; ``strategy="lora_ddp"``."""

    strategy_name = "lora_ddp"
