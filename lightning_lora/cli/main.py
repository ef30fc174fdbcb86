# SPDX-License-Identifier: Apache-2.0
"""``lightning-lora COMMAND ...``.

Exit codes: 0 all is well, 1 a command found what it was asked to look for, 2 it could not do its work, 130 it was
interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lightning_lora import errors
from lightning_lora.cli import completion, export, fit, inspect, merge, plan, report, sweep
from lightning_lora.cli import eval as eval_
from lightning_lora.version import __version__

COMMANDS: dict[str, ModuleType] = {
    "fit": fit,
    "plan": plan,
    "eval": eval_,
    "sweep": sweep,
    "inspect": inspect,
    "merge": merge,
    "export": export,
    "report": report,
    "completion": completion,
}
FOUND, FAILED, INTERRUPTED = 1, 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    Args:
        args: What stands after the program's name; the process's own if null.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        parser = build_parser()
    except ModuleNotFoundError as error:
        print(f"lightning-lora: error: {error.name} is missing: pip install 'lightning-lora[cli]'", file=sys.stderr)  # noqa: T201
        return FAILED
    lines = words[:1] == ["fit"] and not {"-h", "--help"} & set(words)  # it has a parser of its own, and needs torch
    chosen = None if lines else parser.parse_args(words)
    try:
        found: bool = fit.run_lines(words[1:]) if chosen is None else _run(parser, chosen)
    except _expected() as error:
        print(f"lightning-lora {words[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return FAILED
    except KeyboardInterrupt:
        print(f"\nlightning-lora {words[0]}: interrupted", file=sys.stderr)  # noqa: T201
        return INTERRUPTED
    return FOUND if found else 0


def build_parser() -> Any:
    """The command line: every command with its own arguments.

    Raises:
        ModuleNotFoundError: jsonargparse is not installed.
    """
    from lightning_lora.cli.parser import CommandParser

    parser = CommandParser(
        prog="lightning-lora", description="Adapters of lightning_lora and PEFT.", version=__version__
    )
    commands = parser.add_subcommands(dest="command", required=True)
    for name, module in COMMANDS.items():
        own = CommandParser(description=module.__doc__, usage=f"lightning-lora {name} {module.USAGE}")
        module.add_arguments(own)
        parser.add_command(commands, name, own, help=(module.__doc__ or "").strip().splitlines()[0])
    return parser


def _run(parser: Any, chosen: Any) -> bool:
    arguments = {key: value for key, value in chosen[chosen.command].as_dict().items() if key != "config"}
    if chosen.command == "completion":
        arguments["parser"] = parser
    found: bool = COMMANDS[chosen.command].run(**arguments)
    return found


def _expected() -> tuple[type[Exception], ...]:
    """The package's own errors and the system's (a full disk): their text says what is wrong, a traceback hides it."""
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*(kind for kind in kinds if not issubclass(kind, Warning)), OSError)
