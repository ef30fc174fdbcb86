# SPDX-License-Identifier: Apache-2.0
"""`ScaleSweep`: after training, how much of the adapter to keep, by what each share of it learns and forgets."""

from __future__ import annotations

import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.callbacks.aside import is_of_run, validate_aside
from lightning_lora.callbacks.ending import renew_checkpoints
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor, monitors_of
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.callbacks.place import run_folder
from lightning_lora.errors import ConfigError, Notice, WriteError
from lightning_lora.forgetting.arguments import check_choice, check_counts, check_levels, check_metric
from lightning_lora.forgetting.remedies import holds
from lightning_lora.forgetting.scales import SHAPES, at_scale, check_divisible, multiply_scale
from lightning_lora.forgetting.sweep import ScalePoint, Sweep, check_scales, choose_scale
from lightning_lora.io.atomic import atomic_write
from lightning_lora.ranks import from_rank_zero, gather, notice, together
from lightning_lora.reporting.learning import plot_run
from lightning_lora.reporting.output import hand_out_figure, save_figure

FILE = "scale_sweep.json"


class ScaleSweep(Callback):
    """When training ends, tries shares of the adapter and keeps the one that has learned most of those that hold.

    Each scale is measured twice: by the run's own validation loop (the target), and against the base over the bank of
    a `ForgettingMonitor` (the cost). To hold is to lie below the base by no more than the tolerance, in accuracy and
    soft accuracy. The adapters are multiplied by the scale that is kept, and so is all that comes after: the merge of
    `MergeOnFitEnd`, ``trainer.test``, `save_adapter`. ``last.ckpt`` and the folders of `AdapterCheckpoint` that hold
    the end of training are written again; checkpoints that were chosen by a metric stay. At a scale of 1 nothing
    changes. Every rank takes part.

    Logged once, at the end:

    | key | unit | meaning |
    |---|---|---|
    | ``scale_sweep/scale`` | share of the adapter | what is kept |
    | ``scale_sweep/target`` | of the metric | the target metric at it |
    | ``scale_sweep/delta``, ``soft_delta`` | share of items | accuracy and soft accuracy less the base's at it |

    Example::

        sweep = ScaleSweep(monitor="val_loss")
        trainer = Trainer(callbacks=[LoRA(r=16), ForgettingMonitor(tasks, "base/"), sweep, MergeOnFitEnd("merged/")])
        trainer.fit(module, datamodule)
        sweep.result.scale

    Args:
        scales: Shares of the adapter to try, each in [0, 1] and at least one between; 1 is always among them,
            0 is the base and never kept.
        monitor: Name of the target metric, as validation logs it.
        mode: "min" or "max", which of its values are better.
        shape: "uniform" multiplies all layers alike; "linear" in depth keeps all of the last block's adapter and the
            scale of the first one's (LiNeS).
        tolerance: A drop of accuracy that is nobody's concern; None for that of the `ForgettingMonitor`.
        items: How many items to compare at each scale; None for the whole bank, or for as many as there is time for
            within the `ForgettingMonitor`'s ``max_time_fraction``.
        dirpath: Folder for ``scale_sweep.json``, the whole curve, and its plot (with matplotlib); None for the logger's
            folder, or the Trainer's ``default_root_dir`` without one.
        tasks: Tasks of its own, given as to `ForgettingMonitor`; None for those of the one in the Trainer.
        tokenizer: With ``tasks``: folder, name or object; see `ForgettingMonitor`.
        forward: With ``tasks``: what computes logits; see `ForgettingMonitor`.
        batch_tokens: With ``tasks``: tokens in one batch.
        num_fewshot: With ``tasks``: examples in each prompt.
        include_path: With ``tasks``: folders of task YAML files.

    Raises:
        ConfigError: For a value out of range; at fit start, without a validation loop, without tasks, or when the
            callback stands before the `ForgettingMonitor`; at the end, when validation logs no such metric.
    """

    def __init__(
        self,
        scales: Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        shape: Literal["uniform", "linear"] = "uniform",
        tolerance: float | None = None,
        items: int | None = None,
        dirpath: str | Path | None = None,
        tasks: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
        tokenizer: Any = None,
        forward: str | Callable[..., Any] | None = None,
        batch_tokens: int = 8192,
        num_fewshot: int | None = None,
        include_path: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, ("min", "max"))
        check_choice("shape", shape, SHAPES)
        check_levels(0.0 if tolerance is None else tolerance, 0.05)
        check_counts(none_too=True, items=items)
        check_metric("monitor", monitor)
        self.scales = check_scales(scales, between=True)
        self.monitor, self.mode, self.shape = monitor, mode, shape
        self.tolerance, self.items, self.dirpath = tolerance, items, dirpath
        #: The curve and what was kept; None before the end of training. A checkpoint of what was kept holds it.
        self.result: Sweep | None = None
        self._learned: dict[int, float] = {}  # the metric by optimizer steps, while training went on
        self._own: ForgettingMonitor | None = None
        if tasks is not None:
            self._own = ForgettingMonitor(
                tasks,
                tokenizer,
                forward,
                batch_tokens=batch_tokens,
                num_fewshot=num_fewshot,
                include_path=include_path,
            )

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(scales=self.scales, monitor=self.monitor, shape=self.shape)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.result, self._learned = None, {}  # before a checkpoint's are loaded

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise ConfigError(
                f"ScaleSweep takes the target metric `{self.monitor}` from validation, and this run has none: give the "
                f"module a `validation_step` and the Trainer validation data, and leave `limit_val_batches` above 0."
            )
        check_divisible(pl_module, "ScaleSweep", 'Use `ForgettingMonitor(on_forgetting="rollback")`')
        self._check_company(trainer)
        for monitor in monitors_of(trainer):
            monitor.expect_sweep(len(self.scales) if self._own is None else 0)
        if self._own is not None:
            self._own.on_fit_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_of_run(trainer) and self.monitor in trainer.callback_metrics:
            self._learned[trainer.global_step] = float(trainer.callback_metrics[self.monitor])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = self.result
        if found is not None and found.scale != 1.0 and found.step <= trainer.global_step:
            notice(
                f"ScaleSweep: the adapters of this checkpoint are at the scale of {found.scale:g} that was kept at "
                f"step {found.step}. Training goes on from these adapters, and at its end shares of what they are "
                f"then are tried."
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            rank_zero_info("ScaleSweep: no scale is tried with `fast_dev_run`")
            return
        if self.result is not None and self.result.step == trainer.global_step:
            rank_zero_info(f"ScaleSweep: the scale of {self.result.scale:g} was kept at this very step before")
            return
        bank = self._bank(trainer)
        tolerance = bank.tolerance if self.tolerance is None else self.tolerance
        monitors = monitors_of(trainer)
        within = [monitor.begin_sweep() for monitor in monitors]
        items = within[0] if self._own is None and self.items is None else self.items
        with ExitStack() as stack:
            for monitor in monitors:
                stack.enter_context(monitor.pausing(trainer))
            points = [self._measure(trainer, bank, scale, tolerance, items) for scale in self.scales]
        scale, held = from_rank_zero(choose_scale(points, self.mode))
        self.result = Sweep(
            points, scale, held, self.shape, self.monitor, self.mode, tolerance, step=trainer.global_step
        )
        multiply_scale(pl_module, scale, self.shape)
        self._tell(trainer, self.result)
        if scale != 1.0:
            for monitor in monitors:
                monitor.conclude(trainer, changed=True)  # its verdict was on all of the adapter
            renew_checkpoints(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.result is None and not getattr(trainer, "fast_dev_run", False):
            # Lightning calls no hook of training for a run that has nothing left to train.
            notice(
                f"ScaleSweep: this run was over when it was resumed at step {trainer.global_step}, from a checkpoint "
                f"of before its sweep: no scale is tried now, and all of the adapter stands. Resume from an earlier "
                f"checkpoint, or train a step more."
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"result": None if self.result is None else self.result.to_dict(), "learned": dict(self._learned)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        found = state_dict["result"]
        self.result = None if found is None else Sweep.from_dict(found)
        self._learned = {int(step): value for step, value in state_dict["learned"].items()}

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._own is not None:
            self._own.teardown(trainer, pl_module, stage)

    def _measure(
        self, trainer: Trainer, bank: ForgettingMonitor, scale: float, tolerance: float, items: int | None
    ) -> ScalePoint:
        with at_scale(trainer.lightning_module, scale, self.shape):
            metrics = validate_aside(trainer)
            if self.monitor not in metrics:
                logged = ", ".join(sorted(metrics)) or "nothing"
                raise ConfigError(
                    f"ScaleSweep: validation logs no `{self.monitor}`; it logs {logged}. Name one of them in `monitor`."
                )
            pooled, tasks = bank.compare(items)
        return ScalePoint(scale, _over_ranks(metrics[self.monitor]), pooled, tasks, holds(pooled, tasks, tolerance))

    def _bank(self, trainer: Trainer) -> ForgettingMonitor:
        """Whose tasks are asked: the own ones, or those of the Trainer's monitor."""
        return self._own or monitors_of(trainer)[0]

    def _check_company(self, trainer: Trainer) -> None:
        """Refuse what would go wrong with other callbacks only after hours of training."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = monitors_of(trainer)
        if self._own is None and len(monitors) != 1:
            raise ConfigError(
                f"ScaleSweep asks the tasks of the Trainer's one ForgettingMonitor, and there are {len(monitors)}: add "
                f"one, or give `tasks` and `tokenizer` here."
            )
        if any(callbacks.index(monitor) > callbacks.index(self) for monitor in monitors):
            raise ConfigError(
                "ScaleSweep stands before ForgettingMonitor in the Trainer's callbacks; put it after: it starts from "
                "what the monitor's `on_forgetting` leaves."
            )
        if any(isinstance(c, MergeOnFitEnd) and c.weights == "best" for c in callbacks) and trainer.is_global_zero:
            warnings.warn(
                'MergeOnFitEnd(weights="best") merges the best checkpoint as it was trained; the scale that ScaleSweep '
                'keeps is that of the end of training, merged with weights="last".',
                Notice,
                stacklevel=2,
            )

    def _tell(self, trainer: Trainer, found: Sweep) -> None:
        """On the screen, to the loggers and in the file."""
        rank_zero_info(f"ScaleSweep at step {found.step}, {found.shape}:\n{found.summary()}")
        if not found.holds and trainer.is_global_zero:
            warnings.warn(
                f"ScaleSweep: at no scale above 0 does the model hold (a drop of at most {100 * found.tolerance:g} "
                f"points). The adapters were multiplied by the smallest one tried, {found.scale:g}.",
                Notice,
                stacklevel=2,
            )
        chosen = found.chosen
        metrics = {
            "scale_sweep/scale": found.scale,
            "scale_sweep/target": chosen.target,
            "scale_sweep/delta": chosen.pooled.delta,
            "scale_sweep/soft_delta": chosen.pooled.soft_delta,
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        folder = run_folder(trainer, self.dirpath)
        with together(f"write {folder / FILE}", WriteError):
            if trainer.is_global_zero:
                with atomic_write(folder / FILE) as part:
                    part.write_text(json.dumps(found.to_dict(), indent=1))
                self._draw(trainer, found, folder)

    def _draw(self, trainer: Trainer, found: Sweep, folder: Path) -> None:
        """The curve, with the looks of the monitor whose tasks were asked; where matplotlib is installed."""
        if importlib.util.find_spec("matplotlib") is None:
            return
        history = [] if self._own is not None else self._bank(trainer).history
        figure, _ = plot_run(history, self._learned, self.monitor, found, self.mode)
        save_figure(figure, folder / "scale_sweep.png")
        for logger in trainer.loggers:
            hand_out_figure(logger, "scale_sweep", figure, found.step)


def _over_ranks(value: float) -> float:
    """A metric as every rank knows it; where each has its own part's (logged without ``sync_dist``), their mean."""
    values = gather(value)
    return value if len(set(values)) == 1 else math.fsum(values) / len(values)
