# SPDX-License-Identifier: Apache-2.0
"""`AdapterSummary`: the table of what is there and what is trained, as training starts."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_lora.model.summary import Summary, check_depth, summarize
from lightning_lora.reporting.summary import print_summary


class AdapterSummary(Callback):
    """Prints logical and trainable parameters and true bytes when ``fit`` starts, on rank 0.

    Lightning's own ``ModelSummary`` does not see packed weights and estimates sizes from parameters alone; turn it off
    with ``Trainer(enable_model_summary=False)``.

    Example::

        trainer = Trainer(callbacks=[LoRA(quantize="nf4"), AdapterSummary()], enable_model_summary=False)

    Args:
        max_depth: How far down modules get a row of their own: 1 for the module's own attributes, 0 for the totals
            alone, -1 for all.

    Raises:
        ConfigError: ``max_depth`` is no whole number of -1 or more.
    """

    def __init__(self, max_depth: int = 1) -> None:
        super().__init__()
        check_depth(max_depth)
        self.max_depth = max_depth
        #: What was counted; None before the first fit.
        self.summary: Summary | None = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.summary = summarize(pl_module, self.max_depth)
        if trainer.is_global_zero:
            print_summary(self.summary)
