# SPDX-License-Identifier: Apache-2.0
"""`AdapterModelParallelStrategy`: FSDP 2 and tensor parallelism, with a plan of names instead of hand-written code."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_lora.errors import ConfigError
from lightning_lora.model.sharding import check_plan, is_fully_sharded, is_sharded_model, shard_model
from lightning_lora.strategies.ddp import compare_bases
from lightning_lora.strategies.sharded import ShardedStateMixin


class ModelParallelStateMixin(ShardedStateMixin):
    """What `attach` gives a user's own `ModelParallelStrategy`; the module shards itself in ``configure_model``."""

    @property
    def writes_shards(self) -> bool:
        """``save_distributed_checkpoint``."""
        return bool(self._save_distributed_checkpoint)  # type: ignore[attr-defined]  # Lightning has no public name


class AdapterModelParallelStrategy(ModelParallelStateMixin, ModelParallelStrategy):
    """Lightning's `ModelParallelStrategy` with adapter-only checkpoints and sharding by names.

    ``strategy="lora_model_parallel"`` spreads an ordinary module over all devices by FSDP 2: nothing need be
    written in ``configure_model``. The base may be packed (QLoRA); its codes are spread as they are. A module
    that shards itself in ``configure_model``, after ``apply_lora(self, config)``, is left as it is.

    Args:
        fsdp_plan: Which modules become FSDP units: "auto" for transformer blocks, or a list of module names,
            each a suffix of dotted names or a regular expression that matches one. Adapters are always units
            of their own.
        data_parallel_size: Number of devices that share the model out; "auto" is all that
            `tensor_parallel_size` leaves.
        tensor_parallel_size: Number of devices in a tensor-parallel group.
        save_distributed_checkpoint: Whether a checkpoint is a folder to which each process writes its shards;
            false (unlike Lightning's default) is one small file that any strategy resumes.
        kwargs: Every other argument of Lightning's strategy: ``process_group_backend``, ``timeout``.

    Raises:
        ConfigError: The plan is no plan, or the sizes do not divide the devices.
        TargetError: A name of the plan matches no module.
        BaseMismatchError: The processes built different bases.
    """

    strategy_name = "lora_model_parallel"

    def __init__(
        self,
        fsdp_plan: Literal["auto"] | list[str] = "auto",
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = False,
        **kwargs: Any,
    ) -> None:
        check_plan(fsdp_plan)
        if not isinstance(tensor_parallel_size, int) or tensor_parallel_size < 1:
            raise ConfigError(f"`tensor_parallel_size` must be an integer of at least 1, got {tensor_parallel_size!r}")
        super().__init__(
            data_parallel_size=data_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self.fsdp_plan = fsdp_plan
        self.tensor_parallel_size = tensor_parallel_size

    def setup_environment(self) -> None:
        """Make the process group and the mesh; ``data_parallel_size="auto"`` becomes a number."""
        if self._data_parallel_size == "auto":  # Lightning's "auto" is the number of nodes
            devices = self.num_nodes * self.num_processes
            if devices % self.tensor_parallel_size:
                raise ConfigError(
                    f"`tensor_parallel_size={self.tensor_parallel_size}` does not divide the {devices} devices"
                )
            self._data_parallel_size = devices // self.tensor_parallel_size
        super().setup_environment()

    def shard(self, module: torch.nn.Module) -> None:
        """Spread the converted ``module`` over the data-parallel mesh as the plan says; once."""
        mesh = self.device_mesh["data_parallel"]
        if mesh.size() > 1 and not is_fully_sharded(module):
            if not is_sharded_model(module):  # a plan of tensor parallelism has sent the first process's weights
                compare_bases(module, self.world_size)
            shard_model(module, mesh, self.fsdp_plan)
