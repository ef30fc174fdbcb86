# SPDX-License-Identifier: Apache-2.0
"""The command line's parser: its errors name what a person types, and the page of help of the command at hand."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


class CommandParser(ArgumentParser):
    """A parser of commands; jsonargparse's own errors name keys such as ``eval.tasks``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.commands: dict[str, ArgumentParser] = {}
        self._words: list[str] = []

    def add_command(self, to: Any, name: str, own: ArgumentParser, help: str) -> None:
        """Take a command in.

        Args:
            to: What `add_subcommands` gave.
            name: Of the command.
            own: Its parser.
            help: Its line on the page of help.
        """
        to.add_subcommand(name, own, help=help)
        own.prog = f"{self.prog} {name}"
        self.commands[name] = own

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **more: Any) -> Any:
        """As jsonargparse's; an error says the command's usage."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *rest, **more)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print usage and what is wrong, and exit with 2."""
        name = self._words[0] if self._words else ""
        own = self.commands.get(name, self)
        own.print_usage(sys.stderr)
        sys.stderr.write(f"tip: {own.prog} --help lists what it takes\nerror: {_typed(message, name, own)}\n")
        self.exit(2)
        raise AssertionError("exit has ended the process")


def _typed(message: str, command: str, parser: ArgumentParser) -> str:
    """A message with options and arguments as they are typed."""
    typed: dict[str, str] = {action.dest: [*action.option_strings, action.dest][0] for action in parser._actions}
    before = rf"{re.escape(command)}\." if command else ""
    quoted, bare = rf'Parser key "(?:{before})?(\w+)"', rf"\b{before}(\w+)\b"
    message = re.sub(quoted, lambda found: typed.get(found[1], str(found[1])), message)
    return re.sub(bare, lambda found: typed.get(found[1], str(found[0])), message) if command else message
