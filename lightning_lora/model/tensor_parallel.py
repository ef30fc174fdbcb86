# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism over adapted linears: torch's plans, carried over to the layers that adapters stand in.

The adapter is cut as its base is, so that it adds no collective of the activations' width::

    column-wise   W (out/n, in)   A (r, in) on every process   B (out/n, r)
    row-wise      W (out, in/n)   A (r, in/n)                  B (out, r) on every process

Row-wise, ``x A^T`` is summed over processes: r wide. (Megatron-LM, Shoeybi et al. 2019, for the base.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lora.errors import UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.model.unbuilt import refuse_unbuilt
from lightning_lora.nn.adapted import AdaptedLayer
from lightning_lora.nn.adapter import Use
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle


def parallelize_adapted(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> nn.Module:
    """Torch's ``parallelize_module`` for a model with adapters, in place.

    Args:
        model: A converted model, or what is inside a converted LightningModule.
        mesh: The tensor-parallel mesh, of one dimension: ``self.device_mesh["tensor_parallel"]``.
        plan: As `torch.distributed.tensor.parallel.parallelize_module` takes it, with the names that the layers
            had before conversion.

    Raises:
        UnsupportedError: The model's method is not built for it; or the plan cuts an adapted layer whose base is
            packed, or that drops activations, or by a style other than torch's `ColwiseParallel` and
            `RowwiseParallel`.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    def refuse(module: nn.Module) -> None:
        other: dict[Use, str] = {"fsdp2": "spread the model by FSDP 2 (`fsdp_plan`)"}
        refuse_unbuilt(module, "tensor_parallel", "tensor parallelism", other, 'use the strategy "lora_ddp"')

    class Adapted(ParallelStyle):
        """A style of torch's, for whatever the name leads to."""

        def __init__(self, style: ParallelStyle) -> None:
            self.style = style

        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            if isinstance(module, AdaptedLayer):
                refuse(module)
            if not isinstance(module, LoRALinear):
                return self.style._apply(module, device_mesh)
            if not isinstance(self.style, ColwiseParallel | RowwiseParallel):
                raise UnsupportedError(
                    f"an adapted layer is cut by `ColwiseParallel` or `RowwiseParallel`, the plan has "
                    f"`{type(self.style).__name__}`: use one of them, or name the layer in `exclude_modules`"
                )
            return _cut(module, device_mesh, self.style, column=isinstance(self.style, ColwiseParallel))

    for _, module in adapter_modules(model):
        if not isinstance(module, AdaptedLayer):  # what lies inside is not found by the names of the plan
            refuse(module)
    return parallelize_module(model, mesh, {name: Adapted(style) for name, style in plan.items()})


def _cut(layer: LoRALinear, mesh: DeviceMesh, style: Any, column: bool) -> nn.Module:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor

    if isinstance(layer.base_layer, PackedLinear):
        raise UnsupportedError(
            'a packed base cannot be cut by tensor parallelism: its codes are in blocks. Use `quantize="none"`, or '
            "spread it by FSDP 2 (`fsdp_plan`)"
        )
    if layer.lora_dropout > 0.0:
        raise UnsupportedError("`lora_dropout` is not built for tensor parallelism: set it to 0")
    over_out, over_in = (1, 0) if layer.fan_in_fan_out else (0, 1)
    places: dict[int, Any] = {
        id(layer.weight): Shard(over_out if column else over_in),
        id(layer.lora_A): Replicate() if column else Shard(1),
        id(layer.lora_B): Shard(0) if column else Replicate(),
    }
    if layer.bias is not None:
        places[id(layer.bias)] = Shard(0) if column else Replicate()

    def partition(name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            cut = distribute_tensor(parameter.data, device_mesh, [places[id(parameter)]])
            module.register_parameter(own, nn.Parameter(cut, requires_grad=parameter.requires_grad))

    def prepare(module: nn.Module, inputs: Any, device_mesh: DeviceMesh) -> Any:
        x = inputs[0]
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, device_mesh, style.input_layouts, run_check=False)
        return (x.redistribute(placements=[Replicate() if column else Shard(-1)]), *inputs[1:])

    def finish(module: nn.Module, output: Any, device_mesh: DeviceMesh) -> Any:
        output = output.redistribute(placements=style.output_layouts)
        return output.to_local() if style.use_local_output else output

    return distribute_module(layer, mesh, partition, prepare, finish)
