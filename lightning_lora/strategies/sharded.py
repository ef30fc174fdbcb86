# SPDX-License-Identifier: Apache-2.0
"""`ShardedStateMixin`: adapter-only checkpoints of a model that is spread over processes.

Only adapters and their optimizer state are ever gathered, one tensor at a time; the frozen base stays where it
is. A checkpoint is one file like any other strategy's, which any other strategy resumes, or a folder of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_lora.errors import UnsupportedError, WriteError
from lightning_lora.io.atomic import atomic_folder
from lightning_lora.io.distributed import write_distributed
from lightning_lora.model.optimizers import fitting_state
from lightning_lora.model.sharding import gathered, is_sharded_model
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.nn.sharded import is_sharded, piece, whole
from lightning_lora.ranks import together
from lightning_lora.strategies.state import AdapterStateMixin


class ShardedStateMixin(AdapterStateMixin):
    """Put before a sharding strategy's class, after nothing else of this package."""

    whole_gradients = False

    @property
    def writes_shards(self) -> bool:
        """Whether checkpoints are folders of shards instead of one file."""
        raise NotImplementedError

    def shard(self, module: Module) -> None:
        """Spread a module that has just got its adapters; nothing where that is done elsewhere."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning's own loading of optimizers is used: it comes after the model's, with the same checkpoint."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The adapters: this process's shards, or whole tensors on the first process and nothing on the others."""
        state = adapter_state_dict(self._converted_module())
        if self.writes_shards:
            return dict(state)
        return {name: kept for name, tensor in state.items() if (kept := self._gathered(tensor)) is not None}

    def whole_module(self, base: bool = False) -> Module | None:
        """A copy with plain tensors on the first process; the adapters' alone, or the base's too."""
        module = self._converted_module()
        return gathered(module, self.is_global_zero, base) if is_sharded_model(module) else super().whole_module(base)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As torch's own ``state_dict``, with tensors gathered as those of the adapters are."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = optimizer.state_dict()
        if self.writes_shards:
            return state
        gathered: dict[Any, dict[str, Any]] = {}
        for parameter, values in state["state"].items():
            each = {k: self._gathered(v) if isinstance(v, Tensor) else v for k, v in values.items()}
            gathered[parameter] = {k: v for k, v in each.items() if v is not None}
        return {**state, "state": gathered}

    def _write(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None) -> None:
        path = Path(self.broadcast(filepath))
        if not self.writes_shards:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise UnsupportedError("`storage_options` has no meaning for a checkpoint of shards: leave it out")
        self._write_folder(path, lambda part: write_distributed(checkpoint, part, path))

    def _write_folder(self, path: Path, write: Callable[[Path], None]) -> None:
        """Let every process write into a folder that takes its name when all are done."""
        what = f"save {path}"
        with ExitStack() as stack:
            part = path
            with together(what, WriteError):
                if self.is_global_zero:
                    part = stack.enter_context(atomic_folder(path, over_file=True))
            part = self.broadcast(part)
            with together(what, WriteError):
                write(part)
            with together(what, WriteError):
                stack.close()  # the first process's folder takes its name

    def _load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its share of every optimizer's state."""
        for optimizer, stored in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = fitting_state(stored, optimizer)
            owners = _parameters(optimizer)
            shares = {
                i: {k: _share(v, owners.get(int(i))) for k, v in values.items()} for i, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})

    def _shard_like(self, name: str) -> Tensor | None:
        """What a tensor of a distributed checkpoint will be copied into."""
        place, _, own = name.partition(".")
        if place == "state_dict":
            return adapter_state_dict(self._converted_module()).get(own)
        index, parameter = int(place.removeprefix("optimizer_")), int(own.partition(".")[0])
        return _parameters(self.optimizers[index]).get(parameter) if index < len(self.optimizers) else None

    def _gathered(self, tensor: Tensor) -> Tensor | None:
        full = whole(tensor)
        return full.detach().cpu() if self.is_global_zero else None


def _parameters(optimizer: Optimizer) -> dict[int, Tensor]:
    """An optimizer's parameters under the numbers that its ``state_dict`` gives them."""
    numbered: dict[int, Tensor] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            numbered[len(numbered)] = parameter
    return numbered


def _share(value: Any, owner: Tensor | None) -> Any:
    if not isinstance(value, Tensor) or owner is None or not is_sharded(owner) or value.shape != owner.shape:
        return value
    return piece(value, owner).clone()  # no view of the file
