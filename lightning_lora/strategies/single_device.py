# SPDX-License-Identifier: Apache-2.0
"""`AdapterSingleDeviceStrategy`: one device."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_lora.errors import ConfigError
from lightning_lora.strategies.state import AdapterStateMixin


class AdapterSingleDeviceStrategy(AdapterStateMixin, SingleDeviceStrategy):
    """One device, adapter-only checkpoints. As ``strategy="lora"`` it takes the device that the Trainer chose."""

    strategy_name = "lora"

    def __init__(self, device: str | torch.device | None = None, **kwargs: Any) -> None:
        super().__init__(device=device or "cpu", **kwargs)
        self._chosen: list[torch.device] | None = [torch.device(device)] if device is not None else None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The one device; None until the Trainer fills it in."""
        return self._chosen

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices is not None and len(devices) > 1:
            raise ConfigError(
                f'`strategy="lora"` runs on one device, got `devices={len(devices)}`; use "lora_ddp" for several'
            )
        self._chosen = devices

    @property
    def root_device(self) -> torch.device:
        """Where the model lives."""
        return self._chosen[0] if self._chosen else torch.device("cpu")
