# SPDX-License-Identifier: Apache-2.0
"""Say which programs load an adapter folder as it was trained, and where not, why and what to do."""

from __future__ import annotations

from json import dumps
from typing import Any


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("dir", help="adapter folder, of this package or of PEFT")
    parser.add_argument("--target", default="all", help="peft, vllm, sglang, tgi, llama.cpp or all")
    parser.add_argument("--max_rank", type=int, default=None, help="the server's --max-lora-rank, if not its default")
    parser.add_argument("--base", default=None, help="folder of the base model: layers and tied embeddings count then")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(dir: str, target: str, max_rank: int | None, base: str | None, json: bool) -> bool:
    """Print the report; whether a program has a problem with the folder."""
    from lightning_lora.io.loaders import validate_adapter

    report = validate_adapter(dir, target, max_rank, base)
    print(dumps(report.to_dict(), indent=2) if json else report)  # noqa: T201
    return not report.ok
