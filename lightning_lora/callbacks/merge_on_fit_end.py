# SPDX-License-Identifier: Apache-2.0
"""`MergeOnFitEnd`: a merged model on disk when ``fit`` returns, checked against the live one."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint, adapter_path
from lightning_lora.config import DTypeName
from lightning_lora.errors import ConfigError, MergeError
from lightning_lora.io.adapter import load_adapter, save_adapter
from lightning_lora.io.checkpoint import load_state
from lightning_lora.io.distributed import read_either
from lightning_lora.io.merge import MergeReport
from lightning_lora.io.merge_disk import merge_to_disk
from lightning_lora.io.merged_folder import check_target, compare_folder, write_merged
from lightning_lora.io.names import adapter_root
from lightning_lora.model.apply import adapter_modules, adapter_state_dict, is_adapted, load_adapter_state
from lightning_lora.model.inner import is_hf_model
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.strategies.registry import whole_module

ROWS = 4  # of a training batch that a transformers model is compared on


class MergeOnFitEnd(Callback):
    """Writes the merged model when ``fit`` returns: a folder for ``from_pretrained``, or a plain state dict.

    The live model is not changed: ``trainer.test(ckpt_path="best")`` goes on with adapters. What was written
    is loaded back and its outputs are compared with the live model's on the first training batch; the
    difference is printed, stored in ``merge_report.json`` and in ``callback.report``, and above the limit of
    its dtype (fp32 1e-4, fp16 1e-2, bf16 5e-2, relative) it is an error and no folder stays. The work is done
    on the CPU by the first process, after the Trainer has moved the model there.

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

    Raises:
        ConfigError: An argument has no such value, the model has no adapters, or (at fit start) the base's folder
            is not known.
        MergeError: The folder holds something else (at fit start), or the merged model differs too much.
    """

    def __init__(
        self,
        dirpath: str | Path,
        weights: Literal["last", "best"] = "last",
        base: Literal["dequantized", "original"] = "dequantized",
        dtype: DTypeName = "auto",
    ) -> None:
        super().__init__()
        if weights not in ("last", "best"):
            raise ConfigError(f'`weights` must be "last" or "best", got {weights!r}')
        if base not in ("dequantized", "original"):
            raise ConfigError(f'`base` must be "dequantized" or "original", got {base!r}')
        if dtype not in ("auto", "fp32", "bf16", "fp16"):
            raise ConfigError(f'`dtype` must be "auto", "fp32", "bf16" or "fp16", got {dtype!r}')
        self.dirpath = Path(os.path.abspath(os.path.expanduser(dirpath)))
        self.weights, self.base, self.dtype = weights, base, dtype
        self.report: MergeReport | None = None
        self._inputs = FirstInputs()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse now what could not be written at the end."""
        if stage == "fit":
            self.report = None
            _on_first_process(trainer, lambda: check_target(self.dirpath))

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """See that there will be something to merge."""
        if not is_adapted(pl_module):
            raise ConfigError("MergeOnFitEnd: the model has no adapters; add the `LoRA` callback")
        if self.weights == "best" and not _checkpoints(trainer):
            raise ConfigError('`weights="best"` needs a checkpoint callback; add AdapterCheckpoint(monitor=...)')
        if self.base == "original":
            _base_folder(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Wait for the first batch."""
        if trainer.is_global_zero:
            compiled = any(_is_compiled(name, module) for name, module in pl_module.named_modules())
            if not compiled:  # a traced hook would stay: compared on other inputs, or not at all
                self._inputs.wait(adapter_root(pl_module)[1])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """From here on the module is called by its training step."""
        self._inputs.armed = True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """What calls the module from here on is no training step: validation, or a monitor's look."""
        self._inputs.armed = False

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write, compare and report."""
        self._inputs.stop()
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("MergeOnFitEnd: no merged model is written with `fast_dev_run`")
            return
        whole = whole_module(trainer, base=True)
        _on_first_process(trainer, lambda: self._write(trainer, whole or pl_module))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say that nothing is written."""
        self._inputs.stop()
        if trainer.state.fn == "fit":
            kind = type(exception).__name__
            rank_zero_info(f"MergeOnFitEnd: fit ended by {kind}, no merged model is written to {self.dirpath}")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the batch."""
        self._inputs.stop()
        self._inputs.seen.clear()

    def _write(self, trainer: pl.Trainer, pl_module: nn.Module) -> None:
        with _best_weights(trainer, pl_module) if self.weights == "best" else _as_it_is() as source:
            notes: dict[str, Any] = {"weights": self.weights, "base": self.base, "checkpoint": source}
            tokenizer = _find_tokenizer(pl_module, trainer)
            if self.base == "original":
                self.report = self._write_original(pl_module, tokenizer, notes)
            else:
                inputs = self._inputs.seen
                self.report = write_merged(pl_module, self.dirpath, self.dtype, inputs, tokenizer, notes)
        rank_zero_info(f"MergeOnFitEnd: {self.dirpath}: {self.report}")

    def _write_original(self, pl_module: nn.Module, tokenizer: Any, notes: dict[str, Any]) -> MergeReport:
        with tempfile.TemporaryDirectory() as folder:
            adapter = Path(folder) / "adapter"
            save_adapter(pl_module, adapter)
            report = merge_to_disk(_base_folder(pl_module), adapter, self.dirpath, base="original", dtype=self.dtype)
        compare_folder(pl_module, self.dirpath, report, self._inputs.seen, tokenizer, notes)
        return report


class FirstInputs:
    """What the modules with adapters are called with in the first training step, copied to the CPU.

    Of a plain module the outermost parts that are called themselves: a container is not, what is in it is. A hook
    a module, removed by its first call or by that of a module around it.
    """

    def __init__(self) -> None:
        self.seen: dict[str, tuple[tuple, dict]] = {}
        self.armed = False
        self._handles: dict[str, RemovableHandle] = {}

    def wait(self, root: nn.Module) -> None:
        """Put the hooks in.

        Args:
            root: The transformers model, or the plain module whose parts are watched.
        """
        hf = is_hf_model(root)
        labels = hf and bool(getattr(root.config, "is_encoder_decoder", False))  # from which it makes decoder inputs
        for name, module in [("", root)] if hf else list(_parts_with_adapters(root)):
            hook = self._hook(name, ROWS if hf else None, labels or not hf)
            self._handles[name] = module.register_forward_pre_hook(hook, with_kwargs=True)

    def stop(self) -> None:
        """Take out the hooks that are left."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self.armed = False

    def _hook(self, name: str, rows: int | None, labels: bool) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self.armed or not torch.is_grad_enabled():  # a monitor's look, not a training step
                return
            for inner in [n for n in self._handles if n == name or n.startswith(f"{name}.")]:
                self._handles.pop(inner).remove()
            self.seen = {n: given for n, given in self.seen.items() if not n.startswith(f"{name}.")}
            self.seen[name] = _kept(args, kwargs, rows, labels)

        return hook


def _kept(args: tuple, kwargs: dict, rows: int | None, labels: bool) -> tuple[tuple, dict]:
    """CPU copies of tensors and plain values; caches and other objects left out, labels where not asked for."""
    tensors = [v for v in [*args, *kwargs.values()] if isinstance(v, Tensor) and v.dim() > 1]
    batch = tensors[0].shape[0] if tensors else None

    def keep(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        cut = rows is not None and value.dim() > 1 and value.shape[0] == batch
        return (value[:rows] if cut else value).detach().to("cpu", copy=True)

    plain = (Tensor, int, float, bool, str, type(None))
    named = {k: keep(v) for k, v in kwargs.items() if (labels or k != "labels") and isinstance(v, plain)}
    return tuple(keep(value) for value in args), named


def _parts_with_adapters(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module below `root` that is or holds adapters, by name, nothing inside an adapter module."""
    inside = ""
    for name, module in root.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, AdapterModule):
            inside = f"{name}."
        if any(isinstance(m, AdapterModule) for m in module.modules()):
            yield name, module


def _is_compiled(name: str, module: nn.Module) -> bool:
    # `module.compile()` leaves no public mark.
    return "_orig_mod" in name.split(".") or getattr(module, "_compiled_call_impl", None) is not None


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
        if os.path.isdir(adapter_path(path)):
            load_adapter(pl_module, adapter_path(path))
        else:
            checkpoint = read_either(path, optimizers=False)
            load_state(pl_module, checkpoint, strict=False, file=path)  # another strategy's file holds the base too
        yield path
    finally:
        load_adapter_state(pl_module, own)
        for module, strength in strengths:
            module.strength = strength


def _base_folder(pl_module: nn.Module) -> Path:
    """The folder that the base was loaded from.

    Raises:
        ConfigError: It is not known, or none.
    """
    _, root = adapter_root(pl_module)
    name = getattr(getattr(root, "config", None), "_name_or_path", None)
    if not name or not is_hf_model(root) or not Path(name).is_dir():
        raise ConfigError(
            '`base="original"` adds the update to the files of the base: load it with `from_pretrained(folder)` from a '
            f"folder of this machine (known is {name!r}), or merge later with `merge_to_disk`"
        )
    return Path(name)


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
