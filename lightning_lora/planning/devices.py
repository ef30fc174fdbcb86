# SPDX-License-Identifier: Apache-2.0
"""Accelerators by name: memory, and what they multiply in 16 bit.

Memory and dense 16-bit matrix rates are those of the makers' data sheets (rates without structured sparsity, which
sheets often double). A price is no property of a device and changes by the month; those here are round figures of
what an hour cost on demand in 2025 and stand for no more than an order of magnitude: give `price` where it matters.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lightning_lora.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """An accelerator.

    Args:
        name: What it is called.
        memory: Its memory [bytes].
        flops: Dense matrix rate in bf16, in fp16 where it has no bf16 [floating-point operations a second].
        price: Of an hour [US dollars].
    """

    name: str
    memory: float
    flops: float
    price: float


_GB = 1e9
_TERA = 1e12

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("b200", 192 * _GB, 2250 * _TERA, 6.0),
        Device("h200", 141 * _GB, 989 * _TERA, 4.0),
        Device("h100", 80 * _GB, 989 * _TERA, 3.5),
        Device("a100-80gb", 80 * _GB, 312 * _TERA, 3.0),
        Device("a100-40gb", 40 * _GB, 312 * _TERA, 2.5),
        Device("l40s", 48 * _GB, 362 * _TERA, 1.8),
        Device("a6000", 48 * _GB, 155 * _TERA, 0.8),
        Device("rtx-5090", 32 * _GB, 209 * _TERA, 0.7),
        Device("v100-32gb", 32 * _GB, 125 * _TERA, 2.5),
        Device("rtx-4090", 24 * _GB, 165 * _TERA, 0.5),
        Device("rtx-3090", 24 * _GB, 71 * _TERA, 0.3),
        Device("a10g", 24 * _GB, 70 * _TERA, 1.0),
        Device("l4", 24 * _GB, 121 * _TERA, 0.8),
        Device("t4", 16 * _GB, 65 * _TERA, 0.5),
        Device("mi300x", 192 * _GB, 1307 * _TERA, 4.0),
    )
}


def find_device(name: str) -> Device:
    """The device called `name`, in any spelling: ``"H100"``, ``"A100 80GB"``; ``"24GB"`` is any of that memory.

    Raises:
        ConfigError: There is none; the nearest names are given.
    """
    plain = "".join(letter for letter in str(name).lower() if letter.isalnum())
    short = {"".join(c for c in key if c.isalnum()): device for key, device in DEVICES.items()}
    if plain in short:
        return short[plain]
    if plain.endswith("gb") and plain[:-2].isdecimal():
        memory = float(plain[:-2]) * _GB
        alike = min(DEVICES.values(), key=lambda device: (abs(device.memory - memory), -device.flops))
        return Device(f"{plain[:-2]} GB", memory, alike.flops, alike.price)
    near = difflib.get_close_matches(plain, short, n=2)
    hint = f" (nearest: {', '.join(short[n].name for n in near)})" if near else ""
    raise ConfigError(
        f"`gpu`={name!r} is not in the table{hint}; it has {', '.join(DEVICES)}. A memory such as '24GB' does too"
    )
