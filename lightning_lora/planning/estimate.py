# SPDX-License-Identifier: Apache-2.0
r"""What one way of tuning needs: memory row by row, floating-point operations, time and money.

Bytes for P parameters of the base, p of adapters, both trained by Adam with two fp32 moments:

======================  =============================  ==========================================
row                     full                           LoRA, QLoRA
======================  =============================  ==========================================
weights                 fp32 masters, 4 P              the base in its dtype, or packed; buffers too
adapters                0                              fp32 masters, 4 p
gradients               4 P                            4 p
optimizer               8 P                            8 p
activations             counted, see `activations`     counted
logits                  head's output, loss, and the gradients of both
workspace               gradients of the widest activation
dequantized             0                              for QLoRA the largest weight
======================  =============================  ==========================================

Full tuning is planned as Lightning's ``bf16-mixed`` does it, 16 bytes a parameter; ``bf16-true`` keeps weights,
gradients and moments in 16 bit, 8 bytes, and loses small updates to rounding.

Operations of a step over N tokens, with M the parameters that a token is multiplied with, attention's products of S
positions and p of the adapters:

.. math:: F_{full} = 3 f, \qquad F_{LoRA} = 2 f + 6 N p, \qquad f = 2 N M + 2 N S\, hidden \cdot layers

(a frozen weight needs no gradient of its own: forward and the gradient to the input alone). Checkpointing adds one f.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lightning_lora.planning.activations import Activations
from lightning_lora.planning.architecture import Architecture
from lightning_lora.planning.devices import Device

#: Share of a device's memory that is left to its driver, libraries and fragments.
RESERVE = 0.08
#: Share of a device's matrix rate that training reaches, an assumption: 0.3 to 0.5 is what people report.
UTILIZATION = 0.4

METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by what they are for; activations and logits are 0 where they are not known."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    dequantized: int

    @property
    def fixed(self) -> int:
        """What does not depend on the batch [bytes]."""
        return self.weights + self.adapters + self.gradients + self.optimizer + self.dequantized

    @property
    def total(self) -> int:
        """All rows together [bytes]."""
        return self.fixed + self.activations + self.logits + self.workspace


@dataclass(frozen=True)
class MethodPlan:
    """One way of tuning.

    Args:
        method: "full", "lora" or "qlora".
        trainable_params: Parameters that are trained.
        memory: At the peak of a step.
        fits: Whether that goes into the device; None without one.
        largest_batch: Sequences of this length that fit at most, 0 for none; None without a device.
        largest_sequence: Tokens that fit in a sequence at this batch, by proportion, at most the model's context; None
            without a device.
        file_bytes: What a checkpoint's weights take on disk: adapters in fp32, or the model in its dtype [bytes].
        step_flops: Operations of a step.
        tokens_per_second: At `UTILIZATION` of the device's rate; None without a device.
        hours: For all tokens of the run; None without a device or tokens.
        cost: Of these hours [US dollars]; None likewise.
    """

    method: str
    trainable_params: int
    memory: Memory
    fits: bool | None
    largest_batch: int | None
    largest_sequence: int | None
    file_bytes: int
    step_flops: float
    tokens_per_second: float | None
    hours: float | None
    cost: float | None

    def to_dict(self) -> dict[str, Any]:
        """In primitives, with the memory's total."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def estimate(
    method: str,
    model: Architecture,
    saved: Activations | None,
    batch_size: int,
    sequence_length: int,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    device: Device | None,
    tokens: float | None,
    price: float | None,
) -> MethodPlan:
    """Put the rows together.

    Args:
        method: One of `METHODS`.
        model: The architecture, with its adapters.
        saved: What one batch keeps; None where it is not known.
        batch_size: Sequences in a step's forward.
        sequence_length: Tokens in each.
        dtype: Of base and activations.
        gradient_checkpointing: Whether blocks keep their inputs alone.
        device: Where it is to run.
        tokens: Tokens that the run goes through, all epochs together.
        price: Of an hour on the device [US dollars]; the table's if None.
    """
    trained = model.params if method == "full" else model.adapter_params + model.saved_params
    count = batch_size * sequence_length
    memory = Memory(
        weights=_weights(method, model, dtype),
        adapters=0 if method == "full" else 4 * trained,
        gradients=4 * trained,
        optimizer=8 * trained,
        activations=0 if saved is None else saved.total(gradient_checkpointing) - saved.logits,
        logits=0 if saved is None else saved.logits + count * model.vocab * (4 + dtype.itemsize),
        workspace=3 * count * model.widest * dtype.itemsize,
        dequantized=model.largest_weight * dtype.itemsize if method == "qlora" else 0,
    )
    flops = _step_flops(method, model, batch_size, sequence_length, gradient_checkpointing)
    usable = None if device is None else device.memory * (1 - RESERVE)
    room = None if usable is None else max(usable - memory.fixed, 0.0)
    moving = memory.total - memory.fixed
    share = None if room is None or not moving or saved is None else room / moving
    rate = None if device is None else UTILIZATION * device.flops / (flops / count)
    hours = None if rate is None or tokens is None else tokens / rate / 3600
    hourly = price if price is not None or device is None else device.price
    return MethodPlan(
        method=method,
        trainable_params=trained,
        memory=memory,
        fits=None if usable is None or saved is None else memory.total <= usable,
        largest_batch=None if share is None else int(share * batch_size),
        largest_sequence=None if share is None else min(int(share * sequence_length), model.context or sys.maxsize),
        file_bytes=model.params * dtype.itemsize if method == "full" else 4 * trained,
        step_flops=flops,
        tokens_per_second=rate,
        hours=hours,
        cost=None if hours is None or hourly is None else hours * hourly,
    )


def _weights(method: str, model: Architecture, dtype: torch.dtype) -> int:
    if method == "full":
        return model.nbytes + model.params * (4 - dtype.itemsize)
    return model.packed_nbytes if method == "qlora" else model.nbytes


def _step_flops(method: str, model: Architecture, batch: int, length: int, checkpointing: bool) -> float:
    tokens = batch * length
    forward = 2.0 * tokens * model.matmul_params + 2.0 * tokens * length * model.hidden * model.layers
    own = 3 * forward if method == "full" else 2 * forward + 6.0 * tokens * model.adapter_params
    return own + (forward if checkpointing else 0.0)
