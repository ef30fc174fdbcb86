# SPDX-License-Identifier: Apache-2.0
"""Try shares of an adapter without a run: what each has learned, what it has forgotten, and which one to keep.

What is learned is the loss on a file of examples (--data), or the accuracy on tasks (--target_tasks); what is
forgotten is measured on --tasks, against the base. Of the scales at which the model holds the best is kept, as
`ScaleSweep` does at the end of a run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.cli import asking, output
from lightning_lora.cli.model_arguments import add_model_arguments

SCALES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]


#: What the page of help begins with.
USAGE = "BASE ADAPTER --tasks TASK ... [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    add_model_arguments(parser)
    asking.add_task_arguments(parser)
    parser.add_argument("--data", default=None, help="examples of what was learned, in a format of `fit`")
    parser.add_argument("--target_tasks", nargs="+", default=[], help="tasks of what was learned")
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES, help="shares of the adapter, in [0, 1]")
    parser.add_argument("--shape", default="uniform", help="uniform, or linear: the last block keeps all of it")
    parser.add_argument("--max_length", type=int, default=None, help="tokens of an example of --data")
    parser.add_argument("--batch_size", type=int, default=8, help="examples of --data in a batch")
    parser.add_argument("--plot", default=None, help="file for the curve, as PNG")
    parser.add_argument("--write", default=None, help="folder for the adapter at the scale that is kept")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(plot: str | None, write: str | None, quiet: bool, json: bool, **arguments: Any) -> bool:
    """Print the curve, write what is asked for; whether the model holds at no scale above 0."""
    with output.work(json or quiet):
        module, found, learning = sweep(quiet=quiet or json, writes=write is not None, **arguments)
        kept = found.chosen
        if plot is not None:
            draw(found, plot)
        if write is not None and found.holds:
            from lightning_lora.forgetting.scales import multiply_scale
            from lightning_lora.io.adapter import save_adapter

            multiply_scale(module, found.scale, found.shape)
            save_adapter(module, write)
    text = f"{found.summary()}\n\n{_verdict(found)}"
    if found.holds and write is not None:
        text += f" Written to {write}."
    values = {**found.to_dict(), "learning": learning, "written": write if found.holds else None}
    output.show(text, {**values, "target": kept.target}, json)
    return not found.holds


def sweep(
    base: str,
    adapter: str,
    tasks: list[str],
    data: str | None,
    target_tasks: list[str],
    scales: list[float],
    shape: str,
    limit: int | None,
    max_length: int | None,
    batch_size: int,
    quiet: bool,
    writes: bool = False,
    **arguments: Any,
) -> tuple[Any, Any, dict[str, dict[str, float]]]:
    """The module, the `Sweep`, and at each scale the accuracies of the target tasks.

    Raises:
        ConfigError: A value out of range, neither data nor target tasks, or a whole model in place of an adapter.
        TaskError, DataError: Tasks or data cannot be read.
        CheckpointError, AdapterMismatchError, BaseMismatchError: Base and adapter cannot be read, or do not fit.
        UnsupportedError: Of this method there is no part, or, where it is to be written, no folder.
    """
    from lightning_lora.bars import no_bar, terminal_bar
    from lightning_lora.cli.models import is_whole_model, read_models
    from lightning_lora.errors import ConfigError
    from lightning_lora.forgetting.arguments import check_choice, check_counts, check_levels
    from lightning_lora.forgetting.monitor import Monitor
    from lightning_lora.forgetting.remedies import holds
    from lightning_lora.forgetting.scales import SHAPES, at_scale, check_divisible, compare_tasks
    from lightning_lora.forgetting.sweep import ScalePoint, Sweep, check_scales, choose_scale
    from lightning_lora.io.peft_config import peft_config

    tolerance, seed = arguments.pop("tolerance"), arguments.pop("seed")
    check_levels(tolerance, 0.05)
    check_choice("shape", shape, SHAPES)
    check_counts(none_too=True, limit=limit, max_length=max_length)
    check_counts(batch_size=batch_size)
    wanted = check_scales(scales)
    if data is None and not target_tasks:
        raise ConfigError("what was learned is unknown: give `--data`, a file of examples, or `--target_tasks`")
    if is_whole_model(adapter):
        raise ConfigError(f"{adapter} is a whole model, and only an adapter has a scale: name one, or a checkpoint")
    bar = no_bar if quiet else terminal_bar
    loaded, targets = asking.load(tasks, arguments), asking.load(target_tasks, arguments)
    options = asking.scoring_options(arguments)
    models = read_models(base, adapter, **{k: arguments[k] for k in ("dtype", "quantize", "device")}, bar=bar)
    module, scorer = models.tuned, models.scorer(bar=bar, **options)
    check_divisible(module, "`sweep`", "`lightning-lora eval` says what it costs")
    if writes:
        peft_config(module)  # refuses now, and not after all scales, what no folder can hold
    loss = None if data is None else Loss.of(module, data, max_length, batch_size)
    monitor = Monitor(loaded, seed=seed, tolerance=tolerance, targets=targets)
    asked = (monitor.pairs, monitor.bank.sample(limit))
    learned = (monitor.target_pairs, monitor.target_bank.sample(limit))
    points, learning = [], {}
    for scale in wanted:
        with at_scale(module, scale, shape):
            pooled, found = compare_tasks(scorer, *asked)
            target = math.nan if loss is None else loss.measure(module, bar)
            if targets:
                every, each = compare_tasks(scorer, *learned)
                learning[f"{scale:g}"] = {name: task.acc for name, task in each.items()}
                target = every.acc if loss is None else target
        points.append(ScalePoint(scale, target, pooled, found, holds(pooled, found, tolerance)))
    target_name, mode = ("target_acc", "max") if loss is None else ("loss", "min")
    scale, held = choose_scale(points, mode)
    return module, Sweep(points, scale, held, shape, target_name, mode, tolerance, step=0), learning


@dataclass(frozen=True)
class Loss:
    """The mean loss over a file of examples.

    Args:
        batches: Of every example, the same at each scale.
    """

    batches: list[Any]

    @classmethod
    def of(cls, module: Any, data: str, max_length: int | None, batch_size: int) -> Loss:
        """Read and encode a file as `fit` does.

        Raises:
            DataError: It cannot be read, or has no example.
        """
        from lightning_lora.causal_lm.datamodule import InstructionDataModule
        from lightning_lora.errors import Notice

        read = InstructionDataModule(
            data, validation_share=0.0, tokenizer=module.tokenizer, max_length=max_length, batch_size=batch_size
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* examples are few", Notice)  # nothing is trained
            read.setup("validate")
        return cls(list(read.train_dataloader()))

    def measure(self, module: Any, bar: Callable[..., Any]) -> float:
        """Mean loss over all learned tokens [nats a token].

        Args:
            module: A `CausalLMModule`.
            bar: Shows how many batches are done.
        """
        import torch

        from lightning_lora.causal_lm.loss import count
        from lightning_lora.model.inner import evaluating

        total, tokens = 0.0, 0
        with torch.no_grad(), evaluating(module), bar("loss", len(self.batches)) as advance:
            for batch in self.batches:
                moved = {name: tensor.to(module.device) for name, tensor in batch.items()}
                learned = int(count(moved["labels"]))
                total += float(module.loss_of(moved)) * learned
                tokens += learned
                advance(1)
        return total / max(tokens, 1)


def draw(found: Any, path: str) -> None:
    """Write the curve, learning against forgetting.

    Args:
        found: The `Sweep`.
        path: The PNG file.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    from lightning_lora.io.atomic import atomic_write
    from lightning_lora.reporting.learning import plot_learning

    losses = found.mode == "min"
    at = [(p.target if losses else 100 * (1.0 - p.target), 100 * p.pooled.delta) for p in found.points]
    kept = at[found.points.index(found.chosen)]
    base = next((x for point, (x, _) in zip(found.points, at, strict=True) if point.scale == 0.0), None)
    label = "loss [nats a token]" if losses else "errors on the target tasks [%]"
    figure, _ = plot_learning({f"scale {found.scale:g}": [kept]}, {"scales": at}, base, label)
    with atomic_write(Path(path).expanduser()) as part:
        figure.savefig(part, format="png", dpi=120, bbox_inches="tight")


def _verdict(found: Any) -> str:
    points = f"{100 * found.tolerance:g} points"
    if not found.holds:
        return f"At no scale above 0 does the model hold (a drop of at most {points}): nothing is kept."
    if found.scale == 1.0:
        return f"Kept: all of the adapter, which holds (a drop of at most {points})."
    return f"Kept: {found.scale:g} of the adapter, the best scale at which it holds (a drop of at most {points})."
