# SPDX-License-Identifier: Apache-2.0
"""`ForgettingMonitor`: scheduled looks at general tasks, item by item against the base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_lora.callbacks.aside import is_of_run
from lightning_lora.callbacks.ending import (
    check_alone,
    check_remedy,
    held_until,
    renew_checkpoints,
    run_length,
    when_it_stops,
)
from lightning_lora.callbacks.place import run_folder
from lightning_lora.callbacks.trainer_bar import trainer_bar
from lightning_lora.errors import ConfigError, TaskError, WriteError
from lightning_lora.forgetting.arguments import (
    as_fractions,
    as_names,
    as_steps,
    as_tasks,
    check_choice,
    check_counts,
    check_levels,
    check_metric,
    check_seed,
    check_share,
    task_label,
)
from lightning_lora.forgetting.budget import Budget
from lightning_lora.forgetting.encoding import name_tokenizer
from lightning_lora.forgetting.gauges import Gauges, texts_in, texts_of
from lightning_lora.forgetting.loading import load_on_ranks
from lightning_lora.forgetting.monitor import Monitor, Observer, Recorder
from lightning_lora.forgetting.remedies import outcome_text
from lightning_lora.forgetting.report import Report, TaskReport
from lightning_lora.forgetting.response import TRIES, Response
from lightning_lora.forgetting.scales import compare_tasks
from lightning_lora.forgetting.schedule import RunLength, Schedule
from lightning_lora.forgetting.scoring import Scorer
from lightning_lora.forgetting.sizes import Sizes
from lightning_lora.forgetting.tasks import LoadedTask
from lightning_lora.model.slots import is_adapted
from lightning_lora.ranks import notice, together
from lightning_lora.reporting.output import ForgettingOutput

#: Of this callback's state; a checkpoint's of another format is not read.
_FORMAT = 2


@dataclass
class _Parts:
    """What a fit works with."""

    monitor: Monitor
    sizes: Sizes
    response: Response
    scorer: Scorer | None  # it holds the model: None when the fit is over


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
    | ``forgetting/<task>/p_value``, ``p_holm`` | | at the end: is as much lost as gained; corrected by Holm |
    | ``forgetting/e_value`` | | evidence of a drop above the tolerance so far; an alarm from 1/alpha on (see `alpha`) |
    | ``learning/<task>/...`` | | the same numbers for `target_tasks` |
    | ``forgetting/seconds`` | s | how long the look took |

    Example::

        monitor = ForgettingMonitor(["arc_easy", "my_task.yaml"], tokenizer="base/", every_n_steps=200)
        trainer = Trainer(callbacks=[LoRA(r=16), monitor])
        trainer.fit(module, datamodule)
        monitor.report.tasks["arc_easy"].delta

    Args:
        tasks: Names of lm-eval tasks or groups, or of presets ("quick", "lora_learns_less", "smoke"), paths of task
            YAML files, or dicts with lm-eval's task keys.
        target_tasks: Tasks of the field that is being learned, given alike: scored at the same looks by the same
            paired statistics and logged as ``learning/<task>/...``. They raise no alarm. A target loss that falls
            while they stay flat is style learned without knowledge.
        tokenizer: Folder, name or object; None for the LightningModule's own attribute ``tokenizer``.
        forward: What computes logits from token ids: None for the one transformers model inside the module,
            the name of a part of the module, or a function or its import path, ``(input_ids) -> logits`` or
            ``(module, input_ids) -> logits``.
        every_n_steps: Look whenever so many optimizer steps have been taken; None for never.
        every_n_epochs: Look at the end of every so many epochs; None for never.
        at_steps: Further optimizer steps at which to look, from 1.
        at_fractions: Further shares of the run at which to look, such as ``[0.1, 0.5]``; above 0, up to 1.
        max_time_fraction: Share of the run's wall clock that looks, verdict and what an alarm does may take, such as
            0.05; None for no limit. Looks become as large, up to `items_per_eval`, and the verdict as whole as training
            has paid for by then, on the pace measured so far; gauges and looks for which there is no time are left out.
            Without another schedule it also says when to look.
        on_fit_start: Look before the first step.
        on_fit_end: Compare the whole bank of items when training ends: the verdict.
        items_per_eval: Items of one look over all tasks, in proportion to their sizes, at least one of each. Where a
            task's items belong together, whole groups are taken until its share is reached.
        batch_tokens: Tokens in one batch, padding included; lower it when a look runs out of memory.
        num_fewshot: Examples in each prompt; None for what each task says.
        include_path: Folder or folders of task YAML files, searched before lm-eval's own.
        tolerance: A drop of accuracy that is nobody's concern, 0.005 for half a point.
        alpha: Probability of an alarm at any look of the run when no drop of soft accuracy exceeds the tolerance, and
            apart from it of one at the verdict, when no drop of accuracy does. Soft accuracy is blind to confidence
            that changes alike on all items, not to one that grows on some and shrinks on others; so an alarm also needs
            more answers lost than gained over the looks so far.
        on_forgetting: What an alarm does: "warn", or "stop" to end training after this step, or as soon as the
            trainer's min_steps and min_epochs allow. "rollback" and "scale" end it likewise and leave less of the
            adapters: those of the newest look that holds, or the adapters times the largest scale that holds, where
            to hold is to lie below the base by no more than the tolerance over the whole bank. An alarm of the
            verdict does the same, and a second verdict follows. ``outcome`` says what was done.
        seed: Shuffles the bank of items. Two monitors that ask the same need two seeds.
        gauges: Measure at each look what moves whether or not anything is forgotten, each beside the base's: KL to
            the base on the newest training batch and on general text, bits per byte, what the model writes by itself
            (see `Gauges`). Nothing is decided by them.
        general_text: File or files of general text for the gauges, a text a line; None for questions of the tasks
            with their right answers.
        dirpath: Folder for what the looks found: ``forgetting.json``, plots, and every item of every look; None for the
            logger's folder, or the Trainer's ``default_root_dir`` without one. Nothing is written in ``fast_dev_run``.
        target_metric: Name of a metric that validation logs: what was learned, in the plot of learning against
            forgetting, where there are no `target_tasks`.
        apply_chat_template: Ask through the tokenizer's chat template; a name where it has several.
        system_instruction: A text before each prompt; with a chat template, the system's turn.
        fewshot_as_multiturn: With a chat template, whether few-shot examples are turns of their own.
        allow_code: Names of tasks that may execute what the model writes, or code that comes with their data set.
        base_cache: Folder in which the base's answers are kept for later runs over the same base; None for what the
            environment variable LIGHTNING_LORA_BASE_CACHE says, and without it they are not kept. They are never
            used while no adapter has been trained.

    Raises:
        ConfigError: For a value out of range or of another type, and when no look would ever be made; at fit start,
            when another monitor asks the same.
        UnsupportedError: At fit start, for "rollback" under FSDP 1 or DeepSpeed.
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
        max_time_fraction: float | None = None,
        on_fit_start: bool = True,
        on_fit_end: bool = True,
        items_per_eval: int = 250,
        batch_tokens: int = 8192,
        num_fewshot: int | None = None,
        include_path: str | list[str] | None = None,
        tolerance: float = 0.005,
        alpha: float = 0.05,
        on_forgetting: Literal["warn", "stop", "rollback", "scale"] = "warn",
        seed: int = 0,
        target_tasks: str | dict[str, Any] | list[str | dict[str, Any]] | None = None,
        gauges: bool = True,
        general_text: str | list[str] | None = None,
        apply_chat_template: bool | str = False,
        system_instruction: str | None = None,
        fewshot_as_multiturn: bool = True,
        allow_code: str | Sequence[str] = (),
        base_cache: str | None = None,
        dirpath: str | Path | None = None,
        target_metric: str = "val_loss",
    ) -> None:
        super().__init__()
        check_choice("on_forgetting", on_forgetting, TRIES)
        check_levels(tolerance, alpha)
        check_share("max_time_fraction", max_time_fraction)
        check_counts(none_too=True, every_n_steps=every_n_steps, every_n_epochs=every_n_epochs)
        check_counts(items_per_eval=items_per_eval, batch_tokens=batch_tokens)
        check_counts(least=0, none_too=True, num_fewshot=num_fewshot)
        check_seed(seed)
        check_metric("target_metric", target_metric)
        self.tasks = as_tasks("tasks", tasks)
        self.target_tasks = [] if target_tasks is None else as_tasks("target_tasks", target_tasks)
        self.tokenizer = tokenizer
        self.forward = forward
        self.schedule = Schedule(every_n_steps, every_n_epochs, as_steps(at_steps), as_fractions(at_fractions))
        self.max_time_fraction = max_time_fraction
        self.look_at_start = on_fit_start
        self.verdict_at_end = on_fit_end
        self.items_per_eval = items_per_eval
        self.batch_tokens = batch_tokens
        self.num_fewshot = num_fewshot
        self.include_path = include_path
        self.apply_chat_template = apply_chat_template
        self.system_instruction = system_instruction
        self.fewshot_as_multiturn = fewshot_as_multiturn
        self.allow_code = as_names("allow_code", allow_code)
        self.base_cache = base_cache
        self.tolerance = tolerance
        self.alpha = alpha
        self.on_forgetting = on_forgetting
        self.seed = seed
        if not (self.schedule or max_time_fraction or on_fit_start or on_fit_end):
            raise ConfigError(
                "ForgettingMonitor would never look. Set `every_n_steps`, `every_n_epochs`, `at_steps`, "
                "`at_fractions`, `max_time_fraction`, `on_fit_start` or `on_fit_end`."
            )
        self.gauges = gauges
        self.general_text = general_text
        self._gauges: Gauges | None = None
        self.dirpath = dirpath
        self.target_metric = target_metric
        self._output = ForgettingOutput(target_metric)
        #: Measure something else at each look; see `Observer`. To be filled before `fit`.
        self.observers: list[Observer] = []
        #: Take each report with the scores behind it, on every rank. To be filled before `fit`.
        self.recorders: list[Recorder] = []
        self._loaded: tuple[dict[str, LoadedTask], dict[str, LoadedTask]] | None = None
        self._parts: _Parts | None = None
        self._restored: dict[str, Any] | None = None
        self._length = RunLength(None, None)
        self._seen_step = 0
        self._unlogged: dict[str, float] = {}

    @property
    def history(self) -> list[Report]:
        """The report of every look, in order."""
        return [] if self._parts is None else list(self._parts.monitor.history)

    @property
    def report(self) -> Report | None:
        """The verdict; while there is none, the newest look; None before the first."""
        history = self.history
        return next((r for r in reversed(history) if r.kind == "verdict"), history[-1] if history else None)

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What an alarm led to; None without one.

        ``by`` and ``step``, and ``rolled_back_to`` or ``scale`` with ``holds`` and ``items``, on how many it was seen.
        """
        return None if self._parts is None else self._parts.response.outcome

    @property
    @override
    def state_key(self) -> str:
        # Two monitors may stand side by side and ask something else. When they look, and what they do about it, may
        # change on a resume.
        asked = {
            "target_tasks": [task_label(task) for task in self.target_tasks],
            "num_fewshot": self.num_fewshot,
            "apply_chat_template": self.apply_chat_template,
            "system_instruction": self.system_instruction,
        }
        tasks = [task_label(task) for task in self.tasks]
        given = {key: value for key, value in asked.items() if value not in (None, []) and value is not False}
        return self._generate_state_key(tasks=tasks, seed=self.seed, **given)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_adapted(pl_module):
            raise ConfigError(
                f"ForgettingMonitor compares the model with adapters on and off, and {type(pl_module).__name__} has "
                f"none. Add the LoRA callback, or call apply_lora in configure_model."
            )
        check_alone(self, trainer)
        name_tokenizer(self.tokenizer, pl_module)  # what is wrong without a look at the hub is said before tasks load
        check_remedy(self.on_forgetting, trainer, pl_module)
        if self._loaded is None:
            every = [*self.tasks, *self.target_tasks]
            rank_zero_info(f"ForgettingMonitor loads {len(every)} task(s): {', '.join(map(task_label, every))}")
            self._loaded = load_on_ranks(
                self.tasks,
                self.target_tasks,
                self.num_fewshot,
                self.include_path,
                trainer.local_rank,
                self.allow_code,
            )
        with together("make ready to score", TaskError):
            scorer = Scorer(
                pl_module,
                self.tokenizer,
                self.forward,
                self.batch_tokens,
                trainer.precision_plugin.forward_context,
                apply_chat_template=self.apply_chat_template,
                system_instruction=self.system_instruction,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                base_cache=self.base_cache,
                bar=trainer_bar(trainer),
            )
        self._restored = self._restored or self.state_dict() or None
        tasks, targets = self._loaded
        self._gauges = None
        if self.gauges:
            self._gauges = Gauges(texts_of(tasks) if self.general_text is None else texts_in(self.general_text))
        observers = [*self.observers, *([self._gauges] if self._gauges else [])]
        recorders = [*self.recorders, self._output.record]
        monitor = Monitor(
            tasks, self.items_per_eval, self.seed, self.tolerance, self.alpha, targets, observers, recorders
        )
        budget = None if self.max_time_fraction is None else Budget(self.max_time_fraction)
        sizes = Sizes(monitor, budget, self.verdict_at_end, TRIES[self.on_forgetting])
        self._parts = _Parts(monitor, sizes, Response(self.on_forgetting, monitor, sizes), scorer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts, step = self._fit(), trainer.global_step
        self._output.learned = {}
        self._take_up(trainer)
        folder = self._folder(trainer)
        with together("make ready to write", WriteError):
            self._output.begin(folder, len(parts.monitor.history), asked=self.dirpath is not None)
        self._length = run_length(trainer)
        late = self.schedule.check(self._length.steps)
        if late:
            end = self._length.steps
            notice(f"ForgettingMonitor will not look at steps {late} of `at_steps`: the run ends at step {end}.")
        parts.response.begin(pl_module, step)
        if self.look_at_start and not parts.monitor.history:
            # What is logged in this hook is gone before the first batch ends, where others begin to read it.
            self._unlogged = self._look(trainer, *parts.sizes.first()).metrics()
        self._time(trainer)
        if parts.sizes.budget is not None and parts.sizes.budget.next_step is None:
            parts.sizes.plan(step, self._length.steps)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._seen_step = self._seen_step, trainer.global_step
        if self._gauges is not None:
            self._gauges.batch = batch
        metrics, self._unlogged = self._unlogged, {}
        if self._is_due(before, trainer.global_step):
            metrics = self._look_if_time(trainer) or metrics
        pl_module.log_dict(metrics, logger=False, batch_size=1, on_step=True, on_epoch=False)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = self.schedule.is_due_after_epoch(trainer.current_epoch + 1)
        if due and self._fit().monitor.last_step != trainer.global_step:
            metrics = self._look_if_time(trainer)
            pl_module.log_dict(metrics, logger=False, batch_size=1, on_step=False, on_epoch=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_of_run(trainer) and self.target_metric in trainer.callback_metrics:
            self._output.learned[trainer.global_step] = float(trainer.callback_metrics[self.target_metric])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = self._fit()
        if parts.response.is_owed:
            with self._spending(trainer):
                parts.response.settle(self._scorer())
            rank_zero_info(f"ForgettingMonitor, now that training ends: {outcome_text(self.outcome or {})}")
        self.conclude(trainer)

    def compare(self, items: int | None = None) -> tuple[TaskReport, dict[str, TaskReport]]:
        """The model as it stands against its base, while `fit` runs; nothing of it is logged, kept or decided by.

        Every rank takes part.

        Args:
            items: How many items of the bank at most, those first that no look has taken; None for all.

        Returns:
            All items of all tasks together, and each task.
        """
        monitor = self._fit().monitor
        with self._fit().sizes.spending(self._seen_step), together("compare with the base", TaskError):
            return compare_tasks(self._scorer(), monitor.pairs, monitor.bank.sample(items))

    def conclude(self, trainer: Trainer, changed: bool = False) -> None:
        """The verdict, and what it leads to; once more when something has changed the adapters after training.

        Args:
            trainer: While `fit` runs.
            changed: Whether something else than an alarm has changed the adapters since the newest look.
        """
        response = self._fit().response
        if self.verdict_at_end:
            before = response.outcome
            self._verdict(trainer, changed)
            if response.outcome is not before and response.changes_adapters:
                self._verdict(trainer, changed)  # of what is left
        if response.outcome is not None and response.changes_adapters:
            renew_checkpoints(trainer)
        with together("write what the looks found", WriteError):
            self._output.finish(self.history, trainer.loggers)
        if self._output.folder is not None and self.dirpath is None:
            rank_zero_info(f"ForgettingMonitor has written what the looks found to {self._output.folder}")

    def expect_sweep(self, tries: int) -> None:
        """Keep time for a sweep of scales after the verdict, and for the verdict on what it leaves.

        Args:
            tries: How many scales are going to be compared over this monitor's bank.
        """
        self._fit().sizes.sweep = tries

    def begin_sweep(self) -> int | None:
        """How many items the time budget has for each scale; None for the whole bank. Every rank takes part."""
        return self._fit().sizes.swept()

    @contextmanager
    def pausing(self, trainer: Trainer) -> Iterator[None]:
        """Inside, other evaluation goes on: it neither earns nor costs time of the budget.

        Args:
            trainer: While `fit` runs.
        """
        with ExitStack() as stack:
            if self._parts is not None:
                stack.enter_context(self._parts.sizes.pausing(trainer.global_step))
            yield

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._gauges = None  # it holds a batch
        if self._parts is not None:
            self._parts.scorer = None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._parts is None:
            return {}
        budget = self._parts.sizes.budget
        return {
            "format": _FORMAT,
            "monitor": self._parts.monitor.state_dict(),
            "response": self._parts.response.state_dict(),
            "budget": None if budget is None else budget.state_dict(),
            "learned": dict(self._output.learned),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None

    def _take_up(self, trainer: Trainer) -> None:
        """Go on from a checkpoint or from an earlier fit of this run; a run that begins anew begins anew."""
        state, self._restored = self._restored, None
        step, parts = trainer.global_step, self._fit()
        monitor, response, budget = parts.monitor, parts.response, parts.sizes.budget
        self._seen_step = step
        if budget is not None:
            budget.begin(step)
        if state is not None and state.get("format") != _FORMAT:
            notice("Forgetting: the checkpoint's looks are of another version of this package: left out.")
            return
        history = [] if state is None else state["monitor"]["history"]
        if state is None or not history or history[-1]["step"] > step:
            return
        monitor.load_state_dict(state["monitor"])
        response.load_state_dict(state["response"])
        self._output.learned = dict(state.get("learned", {}))
        if budget is not None and state["budget"] is not None:
            budget.load_state_dict(state["budget"], step)
        if response.outcome is None:
            return
        if held_until(trainer):
            trainer.should_stop = True  # the wish is not in the checkpoint
            return
        notice(
            f"Forgetting: this run was ended at step {response.outcome['step']} by `on_forgetting`. "
            f"{outcome_text(response.outcome)} It goes on from these adapters, with the optimizer as it was at the "
            f"end, and the evidence for an alarm begins anew.",
        )
        monitor.begin_anew()
        response.forget()

    def _folder(self, trainer: Trainer) -> Path | None:
        """Where files go: of several monitors that were given no folder, the first has that of the run to itself."""
        folder = run_folder(trainer, self.dirpath)
        beside = [monitor for monitor in monitors_of(trainer) if monitor.dirpath is None]
        number = next((i for i, other in enumerate(beside) if other is self), 0)
        if getattr(trainer, "fast_dev_run", False):
            return None
        return folder / f"monitor_{number + 1}" if number else folder

    def _is_due(self, before: int, now: int) -> bool:
        budget = self._fit().sizes.budget
        if budget is None or self.schedule:
            return self.schedule.is_due(before, now, self._length.steps)
        return budget.next_step is not None and before < budget.next_step <= now

    def _look_if_time(self, trainer: Trainer) -> dict[str, float]:
        """A look as large as the time budget allows, and what it logs; nothing where it allows none."""
        step, end, sizes = trainer.global_step, self._length.steps, self._fit().sizes
        self._time(trainer)
        items, observe = sizes.look(step, end)
        metrics = {} if items == 0 else self._look(trainer, items, observe).metrics()
        if sizes.budget is not None and not self.schedule:
            sizes.plan(step, end)
        return metrics

    def _look(self, trainer: Trainer, items: int | None, observe: bool) -> Report:
        parts, step = self._fit(), trainer.global_step
        after = self.schedule.looks_left(step, self._length) if self.schedule or parts.sizes.budget is None else None
        passes = parts.sizes.look_passes(items)
        with self._spending(trainer, passes), together("look at forgetting", TaskError):
            report = parts.monitor.look(self._scorer(), step, None if after is None else after + 1, items, observe)
        return self._told(trainer, report)

    def _verdict(self, trainer: Trainer, changed: bool) -> None:
        parts, step, outcome = self._fit(), trainer.global_step, self.outcome
        last = outcome is not None or not parts.response.changes_adapters
        self._time(trainer)
        items, observe = parts.sizes.verdict(last)
        if items == 0:
            share = self.max_time_fraction
            text = f"Forgetting: the run was too short for a verdict within `max_time_fraction`={share}."
            newest = self.report
            if newest is not None and (changed or (outcome is not None and "holds" in outcome)):
                text += (
                    f" The adapters have been changed since the {newest.kind} of step {newest.step}: `monitor.report` "
                    f"is that one, of adapters that are no longer there."
                )
            notice(text)
            return
        passes = 0 if parts.sizes.budget is None else parts.sizes.verdict_passes(items)
        with self._spending(trainer, passes), together("look at forgetting", TaskError):
            report = parts.monitor.verdict(self._scorer(), step, items, observe)
        self._told(trainer, report)

    def _told(self, trainer: Trainer, report: Report) -> Report:
        """Log a report and do what it asks for; the report with what was done."""
        parts = self._fit()
        rank_zero_info(report.summary())
        for logger in trainer.loggers:
            logger.log_metrics(report.metrics(), step=report.step)
        with self._spending(trainer):
            at_once = report.kind == "verdict" or not held_until(trainer)
            text, stops = parts.response.hear(self._scorer(), report, at_once)
        if stops:
            text += f" {when_it_stops(trainer)}, as `on_forgetting` says."
            trainer.should_stop = True
        if text:
            notice(text)
        return parts.monitor.history[-1]

    def _time(self, trainer: Trainer) -> None:
        """Know better what items cost, where there is a time budget and time for it."""
        with self._aside(trainer), together("time a pass", TaskError):
            self._fit().sizes.time(self._scorer(), trainer.global_step)

    @contextmanager
    def _spending(self, trainer: Trainer, passes: int = 0) -> Iterator[None]:
        """Inside, this monitor's budget is spent, and the other ones' earn nothing."""
        with self._aside(trainer), self._fit().sizes.spending(trainer.global_step, passes):
            yield

    @contextmanager
    def _aside(self, trainer: Trainer) -> Iterator[None]:
        with ExitStack() as stack:
            for other in monitors_of(trainer):
                if other is not self:
                    stack.enter_context(other.pausing(trainer))
            yield

    def _fit(self) -> _Parts:
        if self._parts is None:
            raise ConfigError("ForgettingMonitor looks only while `fit` runs.")
        return self._parts

    def _scorer(self) -> Scorer:
        scorer = self._fit().scorer
        if scorer is None:
            raise ConfigError("ForgettingMonitor looks only while `fit` runs.")
        return scorer


def monitors_of(trainer: Trainer) -> list[ForgettingMonitor]:
    """The Trainer's monitors, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ForgettingMonitor)]
