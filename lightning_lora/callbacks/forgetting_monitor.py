# SPDX-License-Identifier: Apache-2.0
"""`ForgettingMonitor`: scheduled looks at general tasks, item by item against the base model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.errors import ConfigError, Notice, TaskError, UnsupportedError
from lightning_lora.forgetting.arguments import (
    as_fractions,
    as_steps,
    as_tasks,
    check_choice,
    check_counts,
    check_levels,
    task_label,
)
from lightning_lora.forgetting.encoding import name_tokenizer
from lightning_lora.forgetting.monitor import Monitor, Observer, Recorder
from lightning_lora.forgetting.report import Report
from lightning_lora.forgetting.schedule import RunLength, Schedule
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.tasks import LoadedTask, load_tasks
from lightning_lora.model.apply import is_adapted
from lightning_lora.ranks import from_rank_zero, rank_and_world, together

_ACTIONS = ("warn", "stop")
_LATER = ("rollback", "scale")


class ForgettingMonitor(Callback):
    """Looks, during training, at what the model forgets: lm-eval tasks, each item against the base model.

    The base is the same weights with the adapters switched off, so it costs no second model. The trained
    weights are the same bits with and without the monitor. Every rank takes part in every look.

    Logged for each task, and as ``pooled`` for all items together:

    | key | unit | meaning |
    |---|---|---|
    | ``forgetting/<task>/acc``, ``acc_base`` | share of items | accuracy of the model and of its base |
    | ``forgetting/<task>/delta`` | share of items | acc less acc_base; below 0 is forgetting |
    | ``forgetting/<task>/delta_se`` | share of items | standard error of the paired difference |
    | ``forgetting/<task>/flips_lost`` | items | right with the base, wrong now |
    | ``forgetting/<task>/flips_gained`` | items | wrong with the base, right now |
    | ``forgetting/<task>/soft_delta`` | share of items | paired difference of soft accuracy |
    | ``forgetting/<task>/n_items`` | items | how many were compared |
    | ``forgetting/<task>/p_value`` | | at the end: exact McNemar test of the flips |
    | ``forgetting/seconds`` | s | how long the look took |

    Example::

        monitor = ForgettingMonitor(["arc_easy", "my_task.yaml"], tokenizer="base/", every_n_steps=200)
        trainer = Trainer(callbacks=[LoRA(r=16), monitor])
        trainer.fit(module, datamodule)
        monitor.report.tasks["arc_easy"].delta

    Args:
        tasks: Names of lm-eval tasks or groups, paths of task YAML files, or dicts with lm-eval's task keys.
        tokenizer: Folder, name or object; None for the LightningModule's own attribute ``tokenizer``.
        forward: What computes logits from token ids: None for the one transformers model inside the module,
            the name of a part of the module, or a function or its import path, ``(input_ids) -> logits`` or
            ``(module, input_ids) -> logits``.
        every_n_steps: Look whenever so many optimizer steps have been taken; None for never.
        every_n_epochs: Look at the end of every so many epochs; None for never.
        at_steps: Further optimizer steps at which to look, from 1.
        at_fractions: Further shares of the run at which to look, such as ``[0.1, 0.5]``; above 0, up to 1.
        on_fit_start: Look before the first step.
        on_fit_end: Compare the whole bank of items when training ends: the verdict.
        items_per_eval: Items of one look over all tasks, in proportion to their sizes, at least one of each.
        batch_tokens: Tokens in one batch, padding included; lower it when a look runs out of memory.
        num_fewshot: Examples in each prompt; None for what each task says.
        include_path: Folder or folders of task YAML files, searched before lm-eval's own.
        tolerance: A drop of accuracy that is nobody's concern, 0.005 for half a point.
        alpha: Probability of an alarm in the whole run when no drop exceeds the tolerance.
        on_forgetting: What an alarm does: "warn", or "stop" to end training after this step, or as soon as the
            trainer's min_steps and min_epochs allow.
        seed: Shuffles the bank of items.

    Raises:
        ConfigError: For a value out of range or of another type, and when no look would ever be made.
        UnsupportedError: For an ``on_forgetting`` that this version does not build.
        TaskError: At fit start, for a task that cannot be loaded.
    """

    def __init__(
        self,
        tasks: str | dict[str, Any] | list[str | dict[str, Any]],
        tokenizer: Any = None,
        forward: str | Callable[..., Any] | None = None,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at_steps: Sequence[int] = (),
        at_fractions: Sequence[float] = (),
        on_fit_start: bool = True,
        on_fit_end: bool = True,
        items_per_eval: int = 250,
        batch_tokens: int = 8192,
        num_fewshot: int | None = None,
        include_path: str | list[str] | None = None,
        tolerance: float = 0.005,
        alpha: float = 0.05,
        on_forgetting: Literal["warn", "stop"] = "warn",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if on_forgetting in _LATER:
            raise UnsupportedError(
                f"`on_forgetting`={on_forgetting!r} is not built in this version; use one of {', '.join(_ACTIONS)}."
            )
        check_choice("on_forgetting", on_forgetting, _ACTIONS)
        check_levels(tolerance, alpha)
        check_counts(none_too=True, every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        check_counts(items_per_eval=items_per_eval, batch_tokens=batch_tokens)
        check_counts(least=0, none_too=True, num_fewshot=num_fewshot)
        self.tasks = as_tasks("tasks", tasks)
        self.tokenizer = tokenizer
        self.forward = forward
        self.schedule = Schedule(every_n_steps, every_n_epochs, as_steps(at_steps), as_fractions(at_fractions))
        self.look_at_start = on_fit_start
        self.verdict_at_end = on_fit_end
        self.items_per_eval = items_per_eval
        self.batch_tokens = batch_tokens
        self.num_fewshot = num_fewshot
        self.include_path = include_path
        self.tolerance = tolerance
        self.alpha = alpha
        self.on_forgetting = on_forgetting
        self.seed = seed
        if not (self.schedule or on_fit_start or on_fit_end):
            raise ConfigError(
                "ForgettingMonitor would never look. Set `every_n_steps`, `every_n_epochs`, `at_steps`, "
                "`at_fractions`, `on_fit_start` or `on_fit_end`."
            )
        #: Measure something else at each look; see `Observer`. To be filled before `fit`.
        self.observers: list[Observer] = []
        #: Take each report with the scores behind it, on every rank. To be filled before `fit`.
        self.recorders: list[Recorder] = []
        self._loaded: dict[str, LoadedTask] | None = None
        self._monitor: Monitor | None = None
        self._scorer: Scorer | None = None
        self._restored: dict[str, Any] | None = None
        self._length = RunLength(None, None)
        self._seen_step = 0
        self._unlogged: dict[str, float] = {}
        self._stopping = False

    @property
    def history(self) -> list[Report]:
        """The report of every look, in order."""
        return [] if self._monitor is None else list(self._monitor.history)

    @property
    def report(self) -> Report | None:
        """The verdict; while there is none, the newest look; None before the first."""
        history = self.history
        return next((r for r in reversed(history) if r.kind == "verdict"), history[-1] if history else None)

    @property
    @override
    def state_key(self) -> str:
        # Two monitors may stand side by side, with other tasks or another schedule.
        return self._generate_state_key(tasks=[task_label(task) for task in self.tasks], seed=self.seed)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            raise ConfigError(
                f"ForgettingMonitor compares the model with adapters on and off, and {type(pl_module).__name__} has "
                f"none. Add the LoRA callback, or call apply_lora in configure_model."
            )
        name_tokenizer(self.tokenizer, pl_module)  # what is wrong without a look at the hub is said before tasks load
        if self._loaded is None:
            self._loaded = self._load(trainer.local_rank)
        with together("make ready to score", TaskError):
            self._scorer = Scorer(
                pl_module, self.tokenizer, self.forward, self.batch_tokens, trainer.precision_plugin.forward_context
            )
        history = self._monitor
        self._monitor = Monitor(
            self._loaded,
            self.items_per_eval,
            self.seed,
            self.tolerance,
            self.alpha,
            self.observers,
            self.recorders,
        )
        if self._restored is None and history is not None:
            self._restored = history.state_dict()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_up(trainer.global_step)
        self._length = _length(trainer)
        self._check_steps(trainer)
        if self.look_at_start and not self._monitor_or_fail().history:
            # What is logged in this hook is gone before the first batch ends, where others begin to read it.
            self._unlogged = self._look(trainer).metrics()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._seen_step = self._seen_step, trainer.global_step
        metrics, self._unlogged = self._unlogged, {}
        if self.schedule.is_due(before, trainer.global_step, self._length.steps):
            metrics = self._look(trainer).metrics()
        pl_module.log_dict(metrics, logger=False, batch_size=1, on_step=True, on_epoch=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.schedule.is_due_after_epoch(trainer.current_epoch + 1)
        if due and self._monitor_or_fail().last_step != trainer.global_step:
            metrics = self._look(trainer).metrics()
            pl_module.log_dict(metrics, logger=False, batch_size=1, on_step=False, on_epoch=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.verdict_at_end:
            self._look(trainer, verdict=True)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._scorer = None  # it holds the model

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._monitor is None else self._monitor.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _load(self, local_rank: int) -> dict[str, LoadedTask]:
        """Load the tasks, on the first rank of each machine first: it fills the cache that others read."""
        rank_zero_info(f"ForgettingMonitor loads {len(self.tasks)} task(s): {', '.join(map(task_label, self.tasks))}")
        loaded: dict[str, LoadedTask] | None = None
        if rank_and_world()[1] > 1:
            with together("load tasks", TaskError):
                if local_rank == 0:
                    loaded = load_tasks(self.tasks, self.num_fewshot, self.include_path)
        with together("load tasks", TaskError):
            loaded = loaded or load_tasks(self.tasks, self.num_fewshot, self.include_path)
        return loaded

    def _take_up(self, step: int) -> None:
        """Go on from a checkpoint or from an earlier fit of this run; a run that begins anew begins anew."""
        monitor = self._monitor_or_fail()
        if self._restored is not None and self._restored["history"]:
            last = self._restored["history"][-1]["step"]
            if last <= step:
                monitor.load_state_dict(self._restored)
        self._restored = None
        self._seen_step = step
        self._stopping = False

    def _check_steps(self, trainer: Trainer) -> None:
        end = self._length.steps
        if end is None and self.schedule.at_fractions:
            raise ConfigError(
                "`at_fractions` are shares of the run, and its length is not known. Set the Trainer's `max_steps`, or "
                "use `every_n_steps` or `at_steps`."
            )
        late = self.schedule.late(end)
        if late and trainer.is_global_zero:
            warnings.warn(
                f"ForgettingMonitor will not look at steps {late} of `at_steps`: the run ends at step {end}.",
                Notice,
                stacklevel=2,
            )

    def _look(self, trainer: Trainer, verdict: bool = False) -> Report:
        monitor = self._monitor_or_fail()
        if self._scorer is None:
            raise ConfigError("ForgettingMonitor looks only while `fit` runs.")
        step = trainer.global_step
        after = 0 if verdict else self.schedule.looks_left(step, self._length)
        left = None if after is None else after + 1 + (self.verdict_at_end and not verdict)
        with together("look at forgetting", TaskError):
            report = (monitor.verdict if verdict else monitor.look)(self._scorer, step, left)
        rank_zero_info(report.summary())
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=trainer.global_step)
        self._act(trainer, report)
        return report

    def _act(self, trainer: Trainer, report: Report) -> None:
        alarms = from_rank_zero(report.alarms)
        if not alarms:
            return
        stops = self.on_forgetting == "stop" and report.kind == "look"
        found = "; ".join(f"{n} by at least {100 * report.drop_bounds[n]:.1f} points" for n in alarms)
        if trainer.is_global_zero:
            warnings.warn(
                f"Forgetting at step {report.step}: below the base {found}, at an error probability of {self.alpha:g} "
                f"over the run (tolerance {100 * self.tolerance:g} points)."
                + (f" {_when_it_stops(trainer)}, as `on_forgetting` says." if stops and not self._stopping else ""),
                Notice,
                stacklevel=2,
            )
        if stops:
            trainer.should_stop = self._stopping = True

    def _monitor_or_fail(self) -> Monitor:
        if self._monitor is None:
            raise ConfigError("ForgettingMonitor looks only while `fit` runs.")
        return self._monitor


def _when_it_stops(trainer: Trainer) -> str:
    """The Trainer heeds no wish to stop before its ``min_steps`` and ``min_epochs`` are done."""
    held = []
    epochs: Any = trainer.fit_loop.epoch_progress.current
    if trainer.min_steps and trainer.global_step < trainer.min_steps:
        held.append(f"step {trainer.min_steps} (`min_steps`)")
    if trainer.min_epochs and epochs.processed < trainer.min_epochs:
        held.append(f"epoch {trainer.min_epochs} (`min_epochs`)")
    return (
        f"Training stops only when the trainer has done {' and '.join(held)}"
        if held
        else "Training stops after this step"
    )


def _length(trainer: Trainer) -> RunLength:
    """How long the run is by plan."""
    try:
        end = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes with the epoch
        end = trainer.max_steps
    batches = trainer.num_training_batches
    return RunLength(
        steps=int(end) if 0 < end < math.inf else None,
        epoch=None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches),
    )
