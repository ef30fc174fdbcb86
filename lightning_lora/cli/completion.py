# SPDX-License-Identifier: Apache-2.0
"""Print what makes a shell complete this command's words."""

from __future__ import annotations

from typing import Any

SHELLS = ("bash", "zsh", "tcsh")


#: What the page of help begins with.
USAGE = "SHELL"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("shell", choices=SHELLS, help="for bash: lightning-lora completion bash >> ~/.bashrc")


def run(shell: str, parser: Any) -> bool:
    """Print the script; there is nothing to find.

    Args:
        shell: Which one.
        parser: The whole command line.

    Raises:
        MissingDependencyError: shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        from lightning_lora.errors import MissingDependencyError

        raise MissingDependencyError(
            "shell completion needs `shtab`, which is not installed: pip install 'lightning-lora[cli]'"
        ) from error
    print(shtab.complete(parser, shell))  # noqa: T201
    return False
