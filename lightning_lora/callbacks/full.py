# SPDX-License-Identifier: Apache-2.0
"""`FullTuning`: the callback that trains everything, beside a frozen copy, to compare with adapters."""

from __future__ import annotations

from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.config import FullTuningConfig, QuantizeMode


class FullTuning(AdapterCallback):
    """Trains every parameter of the module, and keeps the weights that it began with.

    The frozen copy costs the model's size once more; it is what "switched off" means, so that forgetting is measured,
    `BaseKL` pulls and strengths are swept as with adapters. Checkpoints hold what is trained: the whole model.

    Example::

        trainer = Trainer(callbacks=[FullTuning(), ForgettingMonitor(...)])
        trainer.fit(model, datamodule)

    Args:
        quantize: "none": packed weights cannot be trained, and any other value is refused by name.
        init_from: A checkpoint of an earlier run to start from: weights only.

    Raises:
        UnsupportedError: Parameters lie in a module that has no forward of its own, or the Trainer's strategy,
            precision plugin or callbacks do not go with it.
    """

    config: FullTuningConfig

    def __init__(self, quantize: QuantizeMode = "none", init_from: str | None = None) -> None:
        super().__init__(FullTuningConfig(quantize=quantize), init_from)
