# SPDX-License-Identifier: Apache-2.0
"""`RunReport`: a page of the run when training ends, and the record that it was made from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_lora.callbacks.adapter_checkpoint import adapter_path
from lightning_lora.callbacks.adapter_diagnostics import AdapterDiagnostics
from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.callbacks.aside import is_of_run
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.place import run_folder
from lightning_lora.callbacks.scale_sweep import ScaleSweep
from lightning_lora.errors import WriteError
from lightning_lora.forgetting.arguments import task_label
from lightning_lora.io.atomic import atomic_write
from lightning_lora.model.summary import Summary, summarize
from lightning_lora.ranks import gather, together
from lightning_lora.reporting.page import render
from lightning_lora.reporting.record import FILE, RunRecord, Watch, plain_settings

PAGE = "report.html"
LOSS = "training loss"

#: Optimizer steps over which a loss is a mean, where the Trainer logs at none.
_EVERY = 50

#: Whose versions make a run what it is.
_PACKAGES = (
    *("lightning-lora", "torch", "lightning", "transformers", "bitsandbytes", "lm-eval", "peft", "datasets"),
    *("safetensors", "numpy"),
)
#: Of the Trainer, what shapes a run.
_TRAINER = (
    *("max_steps", "max_epochs", "accumulate_grad_batches", "gradient_clip_val", "precision", "num_nodes"),
    *("num_devices", "val_check_interval", "check_val_every_n_epoch"),
)
#: Of a `ForgettingMonitor`.
_MONITOR = ("tolerance", "alpha", "on_forgetting", "items_per_eval", "max_time_fraction", "num_fewshot", "seed")


@dataclass
class _Seen:
    """What the callback has seen of a fit: mean losses, values of the validation, counts and time."""

    kept_step: int = 0
    started: float = 0.0
    seconds: float = 0.0
    summary: Summary | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    total: Tensor | None = None
    batches: int = 0

    def add(self, loss: Tensor) -> None:
        """A batch's loss, which stays on its device."""
        value = loss.detach().float()
        self.total = value if self.total is None else self.total + value
        self.batches += 1

    def keep_loss(self, step: int) -> None:
        """Keep the mean loss of the batches since it was last kept."""
        self.kept_step = step
        if self.total is not None:
            self.losses.append((step, float(self.total) / self.batches))
        self.total, self.batches = None, 0


class RunReport(Callback):
    """Writes an HTML page of the run when ``fit`` ends: one file, to be opened anywhere and sent to anyone.

    It shows what was forgotten, with intervals and the verdict in words, the curves of training and validation, the
    sweep of scales, the adapters' spectra, sizes in parameters and bytes, the configuration, and the versions of what
    ran. What was not measured is said, with the callback that measures it. Beside the page stands ``run.json``, from
    which ``lightning-lora report`` makes it again. Values of settings whose names end in ``token``, ``password`` and
    the like are hidden. Training is the same with and without it, bit for bit.

    Example::

        trainer = Trainer(callbacks=[LoRA(r=16), ForgettingMonitor(tasks, "base/"), AdapterDiagnostics(), RunReport()])

    Args:
        dirpath: Folder for ``report.html`` and ``run.json``; null for the logger's folder, or the Trainer's
            ``default_root_dir`` without one. Nothing is written in ``fast_dev_run``.
        title: Of the page; null for the module's class and the date.
    """

    def __init__(self, dirpath: str | Path | None = None, title: str | None = None) -> None:
        super().__init__()
        self.dirpath, self.title = dirpath, title
        #: What the page shows; None before the end of training.
        self.record: RunRecord | None = None
        self._seen = _Seen()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record, self._seen = None, _Seen(kept_step=trainer.global_step, started=time.perf_counter())
        self._seen.summary = summarize(pl_module, max_depth=1)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._seen.add(loss * trainer.accumulate_grad_batches)  # by which Lightning has divided it
        n = getattr(trainer, "log_every_n_steps", 0) or _EVERY
        if trainer.global_step // n > self._seen.kept_step // n:
            self._seen.keep_loss(trainer.global_step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen.before = dict(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before, self._seen.before = self._seen.before, {}
        if is_of_run(trainer):
            for name, value in trainer.callback_metrics.items():
                if value is not before.get(name):  # what this validation has logged
                    self._seen.validation.setdefault(name, []).append((trainer.global_step, float(value)))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen.seconds = time.perf_counter() - self._seen.started
        self._seen.keep_loss(trainer.global_step)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return
        folder = run_folder(trainer, self.dirpath)
        losses = gather(self._seen.losses)  # each rank has seen its own batches
        with together(f"write {folder / PAGE}", WriteError):
            if trainer.is_global_zero:
                self.record = self._gathered(trainer, pl_module, _mean_over_ranks(losses), folder)
                with atomic_write(folder / FILE) as part:
                    part.write_text(self.record.to_json(), encoding="utf-8")
                with atomic_write(folder / PAGE) as part:
                    part.write_text(render(self.record), encoding="utf-8")
        rank_zero_info(f"RunReport: {folder / PAGE}")

    def _gathered(
        self, trainer: Trainer, pl_module: LightningModule, losses: list[tuple[int, float]], folder: Path
    ) -> RunRecord:
        callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
        monitors = [c for c in callbacks if isinstance(c, ForgettingMonitor) and c.history]
        sweep = next((c.result for c in callbacks if isinstance(c, ScaleSweep) and c.result is not None), None)
        looks = next((c.report for c in callbacks if isinstance(c, AdapterDiagnostics) and c.report is not None), None)
        now = datetime.now(UTC)
        return RunRecord(
            title=self.title or f"{type(pl_module).__name__}, {now:%Y-%m-%d %H:%M} UTC",
            facts=_facts(trainer, self._seen.seconds),
            configuration=_configuration(trainer, pl_module, callbacks),
            sizes={} if self._seen.summary is None else _sizes(self._seen.summary),
            files=_files(trainer, folder),
            curves={**({LOSS: losses} if losses else {}), **self._seen.validation},
            watches=[_watch(monitor) for monitor in monitors],
            sweep=None if sweep is None else sweep.to_dict(),
            diagnosis=None if looks is None else looks.to_dict(),
            environment=_environment(),
        )


def _mean_over_ranks(losses: list[list[tuple[int, float]]]) -> list[tuple[int, float]]:
    columns = [dict(own) for own in losses]
    steps = [step for step, _ in losses[0] if all(step in column for column in columns)]
    return [(step, sum(column[step] for column in columns) / len(columns)) for step in steps]


def _watch(monitor: ForgettingMonitor) -> Watch:
    history = [report.to_dict() for report in monitor.history]
    return Watch(history, monitor.tolerance, monitor.alpha, monitor.outcome, monitor.target_metric)


def _facts(trainer: Trainer, seconds: float) -> dict[str, str]:
    epochs = trainer.current_epoch + (0 if trainer.fit_loop.done else 1)
    return {
        "optimizer steps": f"{trainer.global_step:,}",
        f"epoch{'' if epochs == 1 else 's'} begun": str(epochs),
        "of training, looks included": str(timedelta(seconds=round(seconds))),
        f"process{'' if trainer.world_size == 1 else 'es'}": str(trainer.world_size),
        "is the strategy": type(trainer.strategy).__name__,
    }


def _configuration(trainer: Trainer, module: LightningModule, callbacks: list[Callback]) -> dict[str, dict[str, Any]]:
    """Settings by group: adapters, Trainer, optimizers, monitors, and what module and data saved as hyperparameters."""
    groups: dict[str, Mapping[str, Any]] = {}
    for callback in callbacks:
        if isinstance(callback, AdapterCallback):
            groups[callback.config.title] = {key: x for key, x in callback.config.to_dict().items() if x is not None}
        if isinstance(callback, ForgettingMonitor):
            own = {name: getattr(callback, name) for name in _MONITOR if getattr(callback, name) is not None}
            asked = {"tasks": callback.tasks, "target_tasks": callback.target_tasks}
            labels = {name: [task_label(task) for task in tasks] for name, tasks in asked.items() if tasks}
            groups[_free("ForgettingMonitor", groups)] = {**labels, **own}
    groups["Trainer"] = {name: x for name in _TRAINER if (x := getattr(trainer, name, None)) is not None}
    for optimizer in trainer.optimizers:
        defaults = {key: x for key, x in optimizer.defaults.items() if x is not None}
        groups[_free(type(optimizer).__name__, groups)] = defaults
    data = getattr(trainer, "datamodule", None)
    for owner in (module, data):
        if owner is not None and getattr(owner, "hparams", None):
            groups[_free(type(owner).__name__, groups)] = dict(owner.hparams)
    groups["other callbacks"] = {
        type(callback).__name__: "yes"
        for callback in callbacks
        if not isinstance(callback, AdapterCallback | ForgettingMonitor)
    }
    return {name: plain_settings(values) for name, values in groups.items() if values}


def _free(name: str, taken: Mapping[str, Any]) -> str:
    number = 1 + sum(other.partition(" ")[0] == name for other in taken)
    return name if number == 1 else f"{name} {number}"


def _sizes(summary: Summary) -> dict[str, Any]:
    total = summary.total
    return {
        "base_params": summary.base_params,
        "base_bytes": total.nbytes - summary.adapter_nbytes,
        "trainable_params": total.trainable_params,
        "adapter_params": summary.adapter_params,
        "adapter_bytes": summary.adapter_nbytes,
        "rows": [(r.name, r.kind, r.logical_params, r.trainable_params, r.nbytes) for r in summary.rows],
    }


def _files(trainer: Trainer, folder: Path) -> dict[str, int]:
    """Bytes of the newest and the best checkpoints and of the adapter folders beside them."""
    found: dict[str, int] = {}
    for callback in trainer.checkpoint_callbacks:
        if not isinstance(callback, Checkpoint):
            continue
        for name in ("best_model_path", "last_model_path"):
            checkpoint = str(getattr(callback, name, "") or "")
            for path in (Path(checkpoint), Path(adapter_path(checkpoint))) if checkpoint else ():
                if path.exists():
                    shown = os.path.relpath(path, folder) if path.is_relative_to(folder) else str(path)
                    found[shown] = _nbytes(path)
    return found


def _nbytes(path: Path) -> int:
    inside = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in inside)


def _environment() -> dict[str, str]:
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        found["CUDA"] = str(torch.version.cuda)
        found["most memory held by tensors"] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB on one device"
    else:
        found["device"] = f"CPU, {torch.get_num_threads()} threads"
    return found
