# SPDX-License-Identifier: Apache-2.0
"""Fine-tune from a configuration file: adapters, checkpoints, forgetting, a merged model."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any

#: What the short page of help shows, which needs no torch: name, default, text. `fit_cli.FitCLI` parses the values.
_PAGE: tuple[tuple[str, Any, str], ...] = (
    ("--config", SUPPRESS, "YAML file of any of these keys; what follows it on the command line goes before it"),
    ("--model.base", SUPPRESS, "folder or name of a causal language model of transformers"),
    ("--model", "lightning_lora.CausalLMModule", "any LightningModule, by its import path"),
    ("--data.train", SUPPRESS, "JSON lines, JSON, text, or a folder of such files or of `datasets`"),
    ("--data", "lightning_lora.InstructionDataModule", "any LightningDataModule, by its import path"),
    ("--lora.r", 16, "rank of the adapters"),
    ("--lora.quantize", "none", "packing of the base: none, nf4, nf4-dq, fp4 or int8"),
    ("--method", SUPPRESS, "callback of another method than LoRA, such as lightning_lora.IA3"),
    ("--checkpoint.dirpath", SUPPRESS, "folder of checkpoints and adapters; the logger's folder without"),
    ("--forgetting.tasks", SUPPRESS, "lm-eval tasks, names or YAML files: what is forgotten is measured on them"),
    ("--merge.dirpath", SUPPRESS, "folder to write the merged model to when training is over"),
    ("--trainer.max_epochs", 2, "how often the data is seen"),
    ("--trainer.accumulate_grad_batches", 8, "batches of data.batch_size (8) a step"),
    ("--optimizer", SUPPRESS, "another optimizer than the module's, by its import path"),
    ("--ckpt_path", SUPPRESS, "checkpoint to go on from"),
)


#: What the page of help begins with.
USAGE = "--config FILE [options]"


def add_arguments(parser: Any) -> None:
    """The options that most runs need; `--help_all` lists every one."""
    for name, default, text in _PAGE:
        parser.add_argument(name, default=default, help=text)
    parser.add_argument(
        "--print_config", default=SUPPRESS, action="store_true", help="print the whole configuration and exit"
    )
    parser.add_argument("--help_all", default=SUPPRESS, action="store_true", help="list every option and exit")


def run_lines(args: Sequence[str]) -> bool:
    """Train as the command line says; there is nothing to find.

    Args:
        args: What stands after ``fit``.
    """
    from lightning_lora.cli import output
    from lightning_lora.cli.fit_cli import FitCLI

    with output.notices():
        cli = FitCLI(["--help" if arg == "--help_all" else arg for arg in args])
        cli.fit()
    return False
