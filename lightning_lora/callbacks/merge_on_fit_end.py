# SPDX-License-Identifier: Apache-2.0
"""`MergeOnFitEnd`: a merged model on disk when ``fit`` returns, checked against the live one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_lora.bars import Bar
from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.callbacks.trainer_bar import trainer_bar
from lightning_lora.config import DTypeName
from lightning_lora.errors import BaseMismatchError, CheckpointError, ConfigError, MergeError, UnsupportedError
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.atomic import atomic_folder
from lightning_lora.io.checkpoint import load_state
from lightning_lora.io.distributed import read_either
from lightning_lora.io.merge import MergeReport, refuse_unmergeable
from lightning_lora.io.merge_disk import merge_to_disk
from lightning_lora.io.merged_folder import Inputs, check_target, compare_folder, write_merged
from lightning_lora.io.names import adapter_root
from lightning_lora.io.tensor_files import TensorFolder
from lightning_lora.model.fingerprint import digest
from lightning_lora.model.first_inputs import FirstInputs
from lightning_lora.model.inner import is_hf_model
from lightning_lora.model.slots import adapter_modules, is_adapted
from lightning_lora.model.state import adapter_state_dict, load_adapter_state
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.nn.residual import ResidualLoRALinear
from lightning_lora.strategies.ddp import frozen_base
from lightning_lora.strategies.registry import whole_module

BATCHES = 3  # of validation, on which live and merged model are compared


class MergeOnFitEnd(Callback):
    """Writes the merged model when ``fit`` returns: a folder for ``from_pretrained``, or a plain state dict.

    The live model is not changed: ``trainer.test(ckpt_path="best")`` goes on with adapters. What was written
    is loaded back and its outputs are compared with the live model's on the first batches of validation (of
    training, in a run without); the difference is printed, stored in ``merge_report.json`` and in
    ``callback.report``, and above the limit of its dtype (fp32 1e-4, fp16 1e-2, bf16 5e-2, relative) it is an
    error and no folder stays. The work is done on the CPU by the first process, after the Trainer has moved the
    model there. A base that was loaded from a local folder is merged from that folder's files, tensor by tensor.

    After a fit that raised or was interrupted nothing is written.

    Example::

        trainer = Trainer(callbacks=[LoRA(quantize="nf4"), MergeOnFitEnd("merged/")])

    Args:
        dirpath: The folder to write; it must be missing, empty, or an earlier merged model.
        weights: "last", what training left, or "best", the best checkpoint of `AdapterCheckpoint` (or of
            another `ModelCheckpoint`), loaded for the merge and put back.
        base: "dequantized": a packed base is merged from the weights that the adapters were trained over.
            "original": they are added to the files of the folder that the base was loaded from, as they lie there
            (see `merge_to_disk`). With a packed base that is another model than the one that was trained: the
            difference is reported, and no limit is set.
        dtype: Of the written weights: "auto" (the base's own), "fp32", "bf16" or "fp16".
        max_shard_size: Bytes of a file of a transformers model, or a text such as "5GB".

    Raises:
        ConfigError: An argument has no such value, the model has no adapters, or (at fit start) the base's folder
            is not known, or is `dirpath`.
        MergeError: The folder holds something else (at fit start), or the merged model differs too much.
    """

    def __init__(
        self,
        dirpath: str | Path,
        weights: Literal["last", "best"] = "last",
        base: Literal["dequantized", "original"] = "dequantized",
        dtype: DTypeName = "auto",
        max_shard_size: int | str = "5GB",
    ) -> None:
        super().__init__()
        if weights not in ("last", "best"):
            raise ConfigError(f'`weights` must be "last" or "best", got {weights!r}')
        if base not in ("dequantized", "original"):
            raise ConfigError(f'`base` must be "dequantized" or "original", got {base!r}')
        if dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f'`dtype` must be "auto", "fp32", "bf16" or "fp16", got {dtype!r}')
        self.dirpath = Path(os.path.abspath(os.path.expanduser(dirpath)))
        self.weights, self.base, self.dtype, self.max_shard_size = weights, base, dtype, max_shard_size
        self._base_at_start, self._base_unchanged = "", True
        self.report: MergeReport | None = None
        self._training = FirstInputs(training=True)
        self._validation: list[FirstInputs] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse now what could not be written at the end."""
        if stage == "fit":
            self.report = None
            _on_first_process(trainer, lambda: check_target(self.dirpath))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that there will be something to merge."""
        if not is_adapted(pl_module):
            raise ConfigError("MergeOnFitEnd: the model has no adapters; add the `LoRA` callback")
        refuse_unmergeable(pl_module)
        if self.weights == "best" and not _checkpoints(trainer):
            raise ConfigError('`weights="best"` needs a checkpoint callback; add AdapterCheckpoint(monitor=...)')
        folder = _base_folder(pl_module)
        if folder is None and self.base == "original":
            raise ConfigError(
                '`base="original"` adds the update to the files of the base: load it with `from_pretrained(folder)` '
                f"from a folder of this machine (known is {_base_name(pl_module)!r}), or merge later with "
                "`merge_to_disk`"
            )
        if folder is not None and folder.resolve() == self.dirpath.resolve():
            raise ConfigError(
                f"`dirpath` {str(self.dirpath)!r} is the folder that the base was loaded from, and every checkpoint of "
                "this run needs that base: choose another folder"
            )
        self._base_at_start = _state_of_base(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first batch."""
        if trainer.is_global_zero:
            self._training.wait(adapter_root(pl_module)[1], pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """From here on the module is called by its training step."""
        self._training.armed = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """What calls the module from here on is no training step: validation, or a monitor's look."""
        self._training.armed = False

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Keep what the first validation batches are."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and len(self._validation) < BATCHES:
            self._validation.append(FirstInputs(training=False))
            self._validation[-1].wait(adapter_root(pl_module)[1], pl_module)
            self._validation[-1].armed = True

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """What calls the module from here on is no validation step."""
        if self._validation:
            self._validation[-1].stop()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, compare and report."""
        self._training.stop()
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("MergeOnFitEnd: no merged model is written with `fast_dev_run`")
            return
        self._base_unchanged = _state_of_base(pl_module) == self._base_at_start
        whole = whole_module(trainer, base=True)
        _on_first_process(trainer, lambda: self._write(trainer, whole or pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say that nothing is written."""
        self._let_go()
        if trainer.state.fn == "fit":
            kind = type(exception).__name__
            rank_zero_info(f"MergeOnFitEnd: fit ended by {kind}, no merged model is written to {self.dirpath}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the batches."""
        self._let_go()

    def _write(self, trainer: pl.Trainer, pl_module: nn.Module) -> None:
        with _best_weights(trainer, pl_module) if self.weights == "best" else _as_it_is() as source:
            notes: dict[str, Any] = {"weights": self.weights, "base": self.base, "checkpoint": source}
            tokenizer = _find_tokenizer(pl_module, trainer)
            bar = trainer_bar(trainer)
            self.report = self._write_streamed(pl_module, tokenizer, notes, bar)
            if self.report is None:
                self.report = write_merged(
                    pl_module, self.dirpath, self.dtype, self._inputs(), tokenizer, notes, self.max_shard_size, bar
                )
        rank_zero_info(f"MergeOnFitEnd: {self.dirpath}: {self.report}")

    def _write_streamed(
        self, pl_module: nn.Module, tokenizer: Any, notes: dict[str, Any], bar: Bar
    ) -> MergeReport | None:
        """Tensor by tensor over the files of the base; None where these are not what was trained over."""
        original = self.base == "original"
        folder = _base_folder(pl_module)
        if not original and _is_residual(pl_module) and any(isinstance(m, PackedWeight) for m in pl_module.modules()):
            return None  # what is packed is no weight of the files
        if folder is None or not (original or (self._base_unchanged and _is_of_one_dtype(pl_module, folder))):
            return None
        try:
            with tempfile.TemporaryDirectory() as scratch, atomic_folder(self.dirpath) as part:
                adapter = Path(scratch) / "adapter"
                save_adapter(pl_module, adapter)
                report = merge_to_disk(folder, adapter, part, self.base, self.dtype, self.max_shard_size, bar)
                compare_folder(pl_module, part, report, self._inputs(), tokenizer, notes, limited=not original)
        except (BaseMismatchError, CheckpointError, ConfigError, MergeError, UnsupportedError) as error:
            if original:
                raise
            rank_zero_info(f"MergeOnFitEnd: merging from the live model, not from the base's files: {error}")
            return None
        return report

    def _inputs(self) -> dict[str, Sequence[Inputs]]:
        """What to compare on, by what it is called, the best first."""
        validation = [watch.seen for watch in self._validation if watch.seen]
        name = "a validation batch" if len(validation) == 1 else f"{len(validation)} validation batches"
        return {name: validation, "a training batch": [self._training.seen] if self._training.seen else []}

    def _let_go(self) -> None:
        self._training.stop()
        self._training.seen.clear()
        for watch in self._validation:
            watch.stop()
        self._validation.clear()


def _checkpoints(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    """Checkpoint callbacks that know a best path: ours and monitoring ones first."""
    found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return sorted(found, key=lambda c: (not isinstance(c, AdapterCheckpoint), c.monitor is None))


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield None


@contextmanager
def _best_weights(trainer: pl.Trainer, pl_module: nn.Module) -> Iterator[str]:
    """Inside, the module has the best checkpoint's adapters; its own are put back, on exceptions too."""
    path = next((c.best_model_path for c in _checkpoints(trainer) if c.best_model_path), "")
    if not path:
        raise MergeError('`weights="best"`: no checkpoint was written in this fit; use weights="last"')
    own = {name: tensor.clone() for name, tensor in adapter_state_dict(pl_module).items()}
    strengths = [(module, module.strength) for _, module in adapter_modules(pl_module)]
    try:
        if os.path.isdir(adapter_path(path)) and not _is_residual(pl_module):  # whose folder is for the whole base
            load_adapter(pl_module, adapter_path(path))
        else:
            checkpoint = read_either(path, optimizers=False)
            load_state(pl_module, checkpoint, strict=False, file=path)  # another strategy's file holds the base too
        yield path
    finally:
        load_adapter_state(pl_module, own)
        for module, strength in strengths:
            module.strength = strength


def _is_residual(pl_module: nn.Module) -> bool:
    """Whether the adapters began with a part of the base."""
    return any(isinstance(module, ResidualLoRALinear) for _, module in adapter_modules(pl_module))


def _base_name(pl_module: nn.Module) -> str | None:
    """What transformers loaded the base by."""
    _, root = adapter_root(pl_module)
    return getattr(root.config, "_name_or_path", None) if is_hf_model(root) else None


def _base_folder(pl_module: nn.Module) -> Path | None:
    """The folder that the base was loaded from, where it is known and on this machine."""
    name = _base_name(pl_module)
    return Path(name) if name and Path(name).is_dir() else None


def _is_of_one_dtype(pl_module: nn.Module, folder: Path) -> bool:
    """Whether the live base's tensors have the dtype of the files: a cast one is merged as it is."""
    _, root = adapter_root(pl_module)
    packed = [m for m in root.modules() if isinstance(m, PackedWeight)]
    inside = {id(p) for m in packed for p in m.parameters()}
    frozen = [p for p in root.parameters() if not p.requires_grad and id(p) not in inside]
    live = {m.source_dtype for m in packed} | {p.dtype for p in frozen if p.is_floating_point()}
    try:
        with TensorFolder(folder) as files:
            return live == {entry.dtype for entry in files.entries.values() if entry.dtype.is_floating_point}
    except CheckpointError:  # no safetensors
        return False


def _state_of_base(pl_module: nn.Module) -> str:
    """A digest of sampled values of what is frozen, of this process's shards where it is sharded."""
    return digest(getattr(t, "to_local", lambda t=t: t)() for t in frozen_base(pl_module).values())


def _find_tokenizer(pl_module: nn.Module, trainer: pl.Trainer) -> Any:
    """The tokenizer or processor that the module or the datamodule holds, if there is one."""
    tokenizers, processors = (
        sys.modules.get(f"transformers.{name}") for name in ("tokenization_utils_base", "processing_utils")
    )
    kinds = tuple(
        getattr(module, name)
        for module, name in ((tokenizers, "PreTrainedTokenizerBase"), (processors, "ProcessorMixin"))
        if module is not None
    )
    holders = [holder for holder in (pl_module, getattr(trainer, "datamodule", None)) if holder is not None]
    held = (value for holder in holders for value in vars(holder).values())
    return next((value for value in held if isinstance(value, kinds)), None)


def _on_first_process(trainer: pl.Trainer, work: Callable[[], Any]) -> None:
    """Run `work` on the first process; every process waits for it, and raises when it failed."""
    failure: Exception | None = None
    if trainer.is_global_zero:
        try:
            work()
        except Exception as error:
            failure = error
    said = trainer.strategy.broadcast(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if said is not None:
        raise MergeError(f"the first process could not write the merged model: {said}")
