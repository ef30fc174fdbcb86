# SPDX-License-Identifier: Apache-2.0
"""``lightning-lora COMMAND ...``.

Exit codes: 0 all is well, 1 a command found what it was asked to look for, 2 it could not do its work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from lightning_lora import errors
from lightning_lora.cli import fit, inspect, merge, plan, report

COMMANDS: dict[str, ModuleType] = {"fit": fit, "inspect": inspect, "merge": merge, "plan": plan, "report": report}
FOUND, FAILED = 1, 2


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
        found: bool = (
            fit.run_lines(words[1:])
            if chosen is None
            else COMMANDS[chosen.command].run(**_plain(chosen[chosen.command]))
        )
    except _expected() as error:
        print(f"lightning-lora {words[0]}: error: {error}", file=sys.stderr)  # noqa: T201
        return FAILED
    return FOUND if found else 0


def build_parser() -> Any:
    """The command line: every command with its own arguments.

    Raises:
        ModuleNotFoundError: jsonargparse is not installed.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="lightning-lora", description="Adapters of lightning_lora and PEFT.")
    commands = parser.add_subcommands(dest="command", required=True)
    for name, module in COMMANDS.items():
        own = jsonargparse.ArgumentParser(description=module.__doc__)
        module.add_arguments(own)
        commands.add_subcommand(name, own, help=(module.__doc__ or "").strip().splitlines()[0])
    return parser


def _plain(values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.as_dict().items() if key != "config"}


def _expected() -> tuple[type[Exception], ...]:
    """The package's own errors and the system's (a full disk): their text says what is wrong, a traceback hides it."""
    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*(kind for kind in kinds if not issubclass(kind, Warning)), OSError)
