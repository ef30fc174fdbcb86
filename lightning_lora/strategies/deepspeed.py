# SPDX-License-Identifier: Apache-2.0
"""`AdapterDeepSpeedStrategy`: ZeRO stages 1 to 3, checkpoints of adapters and of each process's optimizer shard.

::

    x.ckpt/adapters.ckpt           a checkpoint of one file as any other strategy writes it, without optimizers
    x.ckpt/checkpoint/*.pt         DeepSpeed's own: optimizer shards, fp32 masters of what is trained among them
    x.ckpt/latest, zero_to_fp32.py DeepSpeed's own

The first is all that is read but for resuming training. DeepSpeed's files are pickles: they are given to it only
after their digests were compared and torch's safe unpickler has read them.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import CheckpointError, ConfigError, MissingDependencyError, Notice, UnsupportedError
from lightning_lora.io.checkpoint import KEY, check_metadata, naming
from lightning_lora.io.checkpoint_file import read_checkpoint, write_checkpoint
from lightning_lora.io.distributed import check_files, file_digests
from lightning_lora.io.zero_files import check_pickles
from lightning_lora.model.fingerprint import digest
from lightning_lora.model.inner import clean_name
from lightning_lora.model.sharding import is_sharded_model
from lightning_lora.model.slots import adapter_record
from lightning_lora.model.state import adapter_state_dict
from lightning_lora.nn.sharded import whole
from lightning_lora.strategies.ddp import compare_ranks, frozen_base
from lightning_lora.strategies.sharded import ShardedStateMixin
from lightning_lora.strategies.state import AdapterStateMixin
from lightning_lora.strategies.zero_options import refuse_adapters, refuse_options

ADAPTERS = "adapters.ckpt"
ENGINE = "checkpoint"  # the tag that Lightning gives DeepSpeed, which makes a folder of it
_ZERO = "zero"  # in the entry of this package: under which stage and precision, and digests of DeepSpeed's files


class DeepSpeedStateMixin(ShardedStateMixin):
    """What `attach` gives a user's own `DeepSpeedStrategy`."""

    # Lightning's strategy has these.
    config: Any
    load_full_weights: bool
    remote_device: str | None
    exclude_frozen_parameters: bool
    deepspeed_engine: Any

    @property
    def writes_shards(self) -> bool:
        """Adapters are written whole; DeepSpeed itself writes the shards of optimizers."""
        return False

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Modules are built whole, since conversion reads them; ZeRO 3 spreads them when its engine is made."""
        yield

    def setup(self, trainer: Trainer) -> None:
        """Make the engine of a module whose base is the same on every rank.

        Raises:
            UnsupportedError: An option does not go with adapters.
            BaseMismatchError: Some ranks hold another base than rank 0; every rank raises.
        """
        module = self._converted_module()
        record = adapter_record(module)
        packed = record is not None and record.config.quantize != "none"
        refuse_adapters(module)
        refuse_options(self.config, self.load_full_weights, self.remote_device, packed)
        self.exclude_frozen_parameters = True
        if self.world_size > 1 and record is not None and not is_sharded_model(module):
            compare_ranks([(record.fingerprint or {}).get("digest"), digest(frozen_base(module).values())])
        super().setup(trainer)

    @property
    def steps_now(self) -> bool:
        """Whether enough batches were accumulated."""
        return bool(self.deepspeed_engine.is_gradient_accumulation_boundary())

    def held_by(self, optimizer: Optimizer) -> set[int]:
        """ZeRO puts flat buffers in the place of parameters and keeps these aside."""
        groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)
        return super().held_by(optimizer) if groups is None else {id(p) for group in groups for p in group}

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Collected from the processes."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The adapters, in fp32 where ZeRO trains fp32 masters of them; nothing on other processes than the first."""
        module = self._converted_module()
        tensors = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))  # type: ignore[arg-type]
        live = {clean_name(name): tensor for name, tensor in tensors.items()}
        state = {name: self._trained_value(live[name]) for name in adapter_state_dict(module)}
        return {name: tensor.detach().cpu() for name, tensor in state.items()} if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load adapters; those that ZeRO 3 has spread are gathered and spread again."""
        import deepspeed

        trained = [p for p in self._converted_module().parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(trained, modifier_rank=0):
            super().load_model_state_dict(checkpoint, strict)

    def whole_module(self, base: bool = False) -> nn.Module | None:
        """As under every sharding strategy; not the base that ZeRO 3 has spread over several processes."""
        if base and self.world_size > 1 and is_sharded_model(self._converted_module()):
            raise UnsupportedError(
                "under ZeRO 3 a base is not gathered from several processes: merge afterwards, on one process, with "
                "`load_from_checkpoint` and `merge_adapters`"
            )
        return super().whole_module(base)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Nothing: DeepSpeed writes it."""
        return {}

    def _write(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None) -> None:
        if "optimizer_states" not in checkpoint:  # weights alone are one file, as under every strategy
            super()._write(checkpoint, filepath, storage_options)
            return
        if storage_options is not None:
            raise UnsupportedError("`storage_options` has no meaning for DeepSpeed's folders: leave it out")
        path = Path(self.broadcast(filepath))

        def write(folder: Path) -> None:
            with self._errors_later(), adapters_only(self._converted_module()):
                AdapterStateMixin._write(self, {}, folder, None)  # Lightning's, which calls the engine
            if self.is_global_zero:
                rest = {key: value for key, value in checkpoint.items() if key != "optimizer_states"}
                rest[KEY] = {**rest[KEY], _ZERO: {**self._kind(), "files": dict(file_digests(folder / ENGINE))}}
                write_checkpoint(rest, folder / ADAPTERS)

        self._write_folder(path, write)

    def _read(self, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
        """The adapters' file; training is resumed from DeepSpeed's own files beside it."""
        folder = Path(path)
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        if folder.is_file():
            checkpoint = read_checkpoint(folder)
            if fitting and "optimizer_states" in checkpoint:
                raise CheckpointError(
                    f"{folder} was not written under DeepSpeed, which cannot take over its optimizer: resume it with "
                    "the strategy that wrote it, or start from its adapters (`init_from`)"
                )
            return checkpoint
        if folder.is_dir() and not (folder / ADAPTERS).is_file():
            raise CheckpointError(
                f"{folder} holds no {ADAPTERS!r}: it was written by DeepSpeed without LoRA, or is not whole. Name the "
                "folder that a checkpoint was saved to, not one inside it"
            )
        checkpoint = read_checkpoint(folder / ADAPTERS)
        if fitting and "loops" in checkpoint:
            self._load_engine(folder, checkpoint[KEY])
            checkpoint["optimizer_states"] = []  # loaded; Lightning asks for the entry
        return checkpoint

    def _load_engine(self, folder: Path, entry: Mapping[str, Any]) -> None:
        """Give the engine its optimizer shards, once everything is known to fit."""
        with naming(folder):
            check_metadata(self._converted_module(), entry)
        told, kind = entry[_ZERO], self._kind()
        differing = [f"{k}: checkpoint {told.get(k)!r}, this run {v!r}" for k, v in kind.items() if told.get(k) != v]
        if differing:
            raise CheckpointError(
                f"{folder} holds ZeRO's optimizer shards of another setting ({'; '.join(differing)}), which DeepSpeed "
                f"cannot take over: resume under the same, or start from the weights in {ADAPTERS!r}"
            )
        check_files(told["files"], folder / ENGINE)
        check_pickles(folder / ENGINE)
        self.deepspeed_engine.load_checkpoint(
            os.fspath(folder),
            tag=ENGINE,
            load_module_strict=False,
            load_optimizer_states=True,
            load_lr_scheduler_states=False,
            custom_load_fn=_load_nothing,  # adapters are loaded, and checked one by one, in `load_model_state_dict`
        )

    def _load_optimizers(self, checkpoint: Mapping[str, Any]) -> None:
        """Done by the engine already."""

    def _kind(self) -> dict[str, Any]:
        """What DeepSpeed cannot change in its shards."""
        stage = self.config["zero_optimization"]["stage"]
        kind = {"stage": stage, "processes": self.world_size, "precision": self.precision_plugin.precision}
        record = adapter_record(self._converted_module())
        config = None if record is None else record.config
        ratio = config.loraplus_lr_ratio if isinstance(config, LoRAConfig) else None
        return {**kind, "loraplus_lr_ratio": ratio}  # None in checkpoints that were written before there was one

    def _trained_value(self, tensor: Tensor) -> Tensor:
        """A whole tensor, of full precision in training; every process calls it."""
        from deepspeed.utils import safe_get_full_fp32_param

        training = self._trainer.state.fn == TrainerFn.FITTING and tensor.requires_grad
        master = safe_get_full_fp32_param(tensor) if training else None
        return whole(tensor) if master is None else master

    @contextmanager
    def _errors_later(self) -> Iterator[None]:
        """A write that fails raises when all processes are through: DeepSpeed lets them wait for one another."""
        from deepspeed import comm

        engine = self.deepspeed_engine
        patient = engine.checkpoint_engine = _Patient(engine.checkpoint_engine)
        try:
            yield
        except Exception as error:
            patient.error = patient.error or error
            comm.barrier()  # where the others wait, at the end of the engine's save
        finally:
            engine.checkpoint_engine = patient.writer
        if patient.error is not None:
            raise patient.error


class AdapterDeepSpeedStrategy(DeepSpeedStateMixin, DeepSpeedStrategy):
    """Lightning's `DeepSpeedStrategy` with adapter-only checkpoints; ``strategy="lora_deepspeed"``.

    Stage 3 spreads a dense base over the devices. A packed one stays whole on each, in 4 bits: ZeRO spreads
    parameters alone, of one dtype.

    Args:
        stage: Of ZeRO: 1 spreads the optimizer, 2 gradients too, 3 parameters too.
        exclude_frozen_parameters: True, whatever is given.
        kwargs: Every other argument of Lightning's strategy.

    Raises:
        MissingDependencyError: DeepSpeed is not installed.
        ConfigError: The stage is none.
        UnsupportedError: An option does not go with adapters.
    """

    strategy_name = "lora_deepspeed"

    def __init__(self, stage: int = 2, exclude_frozen_parameters: bool = True, **kwargs: Any) -> None:
        if stage not in (1, 2, 3):
            raise ConfigError(f'`stage` must be 1, 2 or 3, got {stage!r}; without ZeRO use `strategy="lora_ddp"`')
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingDependencyError('`strategy="lora_deepspeed"` needs DeepSpeed: `pip install deepspeed`')
        if not exclude_frozen_parameters:
            warnings.warn(
                "`exclude_frozen_parameters=False` is not followed: checkpoints hold adapters only. Save the whole "
                "model with `MergeOnFitEnd`",
                Notice,
                stacklevel=2,
            )
        super().__init__(stage=stage, exclude_frozen_parameters=True, **kwargs)
        refuse_options(self.config, self.load_full_weights, self.remote_device)


class _Patient:
    """DeepSpeed's writer of files, keeping the first error."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write, or say later why not."""
        try:
            self.writer.save(state_dict, path)
        except Exception as error:
            self.error = self.error or error


@contextmanager
def adapters_only(module: nn.Module) -> Iterator[None]:
    """Inside, ``module.state_dict()`` is that of its adapters: DeepSpeed leaves out frozen parameters, not buffers."""
    own = set(adapter_state_dict(module))

    def keep(module: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
        for name in [n for n in state if clean_name(n.removeprefix(prefix)) not in own]:
            del state[name]

    handle = module.register_state_dict_post_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def _load_nothing(src: Any, dst: nn.Module) -> None:
    """In place of the engine's own loading of the module."""
