# SPDX-License-Identifier: Apache-2.0
"""`ForgettingMonitor`: scheduled looks at general tasks, item by item against the base model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.errors import ConfigError, Notice, TaskError, UnsupportedError
from lightning_lora.forgetting.encoding import name_tokenizer
from lightning_lora.forgetting.monitor import Monitor, Report, check_levels
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
        _check_action(on_forgetting)
        check_levels(tolerance, alpha)
        _check_counts(none_too=True, every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        _check_counts(items_per_eval=items_per_eval, batch_tokens=batch_tokens)
        _check_counts(least=0, none_too=True, num_fewshot=num_fewshot)
        self.tasks = _as_tasks(tasks)
        self.tokenizer = tokenizer
        self.forward = forward
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.at_steps = _as_steps(at_steps)
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
        if not (every_n_steps or every_n_epochs or self.at_steps or on_fit_start or on_fit_end):
            raise ConfigError(
                "ForgettingMonitor would never look. Set `every_n_steps`, `every_n_epochs`, `at_steps`, `on_fit_start` "
                "or `on_fit_end`."
            )
        self._loaded: dict[str, LoadedTask] | None = None
        self._monitor: Monitor | None = None
        self._scorer: Scorer | None = None
        self._restored: dict[str, Any] | None = None
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
        return self._generate_state_key(tasks=[_name(task) for task in self.tasks], seed=self.seed)

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
        self._monitor = Monitor(self._loaded, self.items_per_eval, self.seed, self.tolerance, self.alpha)
        if self._restored is None and history is not None:
            self._restored = history.state_dict()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_up(trainer.global_step)
        self._warn_of_late_steps(trainer)
        if self.look_at_start and not self._monitor_or_fail().history:
            # What is logged in this hook is gone before the first batch ends, where others begin to read it.
            self._unlogged = self._look(trainer).metrics()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._seen_step = self._seen_step, trainer.global_step
        metrics, self._unlogged = self._unlogged, {}
        if self.is_due(before, trainer.global_step):
            metrics = self._look(trainer).metrics()
        pl_module.log_dict(metrics, logger=False, batch_size=1, on_step=True, on_epoch=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
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

    def is_due(self, before: int, now: int) -> bool:
        """Whether the schedule has a look among the optimizer steps after ``before`` up to ``now``.

        Gradient accumulation repeats a step and several optimizers jump over some, so a look is due when its
        step is passed, not when it is met.

        Args:
            before: optimizer steps taken when this was asked last.
            now: optimizer steps taken.
        """
        n = self.every_n_steps
        return (n is not None and now // n > before // n) or any(before < s <= now for s in self.at_steps)

    def looks_left(self, trainer: Trainer) -> int | None:
        """Looks and the verdict after the present step, or None when the length of the run is not known."""
        end = _last_step(trainer)
        if end is None:
            return None
        due = set(self.at_steps)
        if self.every_n_steps is not None:
            due.update(range(self.every_n_steps, end + 1, self.every_n_steps))
        if self.every_n_epochs is not None:
            if math.isinf(trainer.num_training_batches):
                return None
            epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * self.every_n_epochs
            due.update(range(epoch, end + 1, epoch))
        return sum(trainer.global_step < step <= end for step in due) + self.verdict_at_end

    def _load(self, local_rank: int) -> dict[str, LoadedTask]:
        """Load the tasks, on the first rank of each machine first: it fills the cache that others read."""
        rank_zero_info(f"ForgettingMonitor loads {len(self.tasks)} task(s): {', '.join(map(_name, self.tasks))}")
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

    def _warn_of_late_steps(self, trainer: Trainer) -> None:
        end = _last_step(trainer)
        late = [] if end is None else [step for step in self.at_steps if step > end]
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
        take, left = (monitor.verdict, 0) if verdict else (monitor.look, self.looks_left(trainer))
        with together("look at forgetting", TaskError):
            report = take(self._scorer, trainer.global_step, None if left is None else left + 1)
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


def _check_action(on_forgetting: str) -> None:
    if on_forgetting in _LATER:
        raise UnsupportedError(
            f"`on_forgetting`={on_forgetting!r} is not built in this version; use one of {', '.join(_ACTIONS)}."
        )
    if on_forgetting not in _ACTIONS:
        raise ConfigError(f"`on_forgetting` must be one of {', '.join(_ACTIONS)}: got {on_forgetting!r}.")


def _check_counts(least: int = 1, none_too: bool = False, **counts: Any) -> None:
    for name, value in counts.items():
        if value is None and none_too:
            continue
        if not _is_int(value):
            raise ConfigError(f"`{name}` must be a whole number{' or None' if none_too else ''}: got {value!r}.")
        if value < least:
            raise ConfigError(f"`{name}` must be {least} or more: got {value}.")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_steps(at_steps: Any) -> tuple[int, ...]:
    if isinstance(at_steps, str) or not isinstance(at_steps, Iterable):
        raise ConfigError(f"`at_steps` must be a list of optimizer steps, such as [100]: got {at_steps!r}.")
    steps = tuple(at_steps)
    wrong = [step for step in steps if not _is_int(step) or step < 1]
    if wrong:
        raise ConfigError(
            f"`at_steps` must hold whole numbers of 1 or more: got {wrong}. `on_fit_start` looks before the first step."
        )
    return steps


def _as_tasks(tasks: Any) -> list[Any]:
    kinds = (str, Mapping, Path)
    given = [tasks] if isinstance(tasks, kinds) else list(tasks) if isinstance(tasks, Iterable) else None
    if given is None or not all(isinstance(task, kinds) for task in given):
        raise ConfigError(f"`tasks` must be task names, YAML paths or dicts, one or a list of them: got {tasks!r}.")
    if not given:
        raise ConfigError("`tasks` is empty: give at least one task name, YAML path or dict.")
    return given


def _last_step(trainer: Trainer) -> int | None:
    """Optimizer steps after which the run ends by plan, or None when nobody knows."""
    try:
        end = trainer.estimated_stepping_batches
    except MisconfigurationException:  # accumulation that changes with the epoch
        end = trainer.max_steps
    return int(end) if 0 < end < math.inf else None


def _name(task: Any) -> str:
    return str(task.get("task")) if isinstance(task, Mapping) else str(task)
