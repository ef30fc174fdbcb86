# SPDX-License-Identifier: Apache-2.0
"""What the command line says to a wrong line, and the usage of every command."""

from __future__ import annotations

import pytest

from lightning_lora.cli.main import COMMANDS, main


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("plan", "required: model"),
        ("eval", "required: base, adapter, --tasks"),
        ("plan a --batch_size x", "--batch_size"),
        ("completion fish", "shell"),
        ("export a b", "required: --base"),
        ("inspect a --rank 3", "--rank"),
    ],
)
def test_an_error_names_what_is_typed_and_the_page_of_help(
    args: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = args.split()[0]
    with pytest.raises(SystemExit):
        main(args.split())
    usage, *_, tip, error = capsys.readouterr().err.split("\n", 2)
    assert usage.startswith(f"usage: lightning-lora {command} ")
    assert tip.startswith(f"tip: lightning-lora {command} --help")
    assert said in error
    assert f"{command}." not in error


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_is_one_short_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    line, blank, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith(f"usage: lightning-lora {command} ")
    assert len(line) < 90
    assert not blank
