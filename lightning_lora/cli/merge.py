# SPDX-License-Identifier: Apache-2.0
"""Merge an adapter folder into a model folder, tensor by tensor, without loading the model."""

from __future__ import annotations

from json import dumps
from typing import Any

#: What the page of help begins with.
USAGE = "BASE_DIR ADAPTER_DIR OUT_DIR [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("base_dir", help="folder of the base model (safetensors)")
    parser.add_argument("adapter_dir", help="adapter folder, of this package or of PEFT")
    parser.add_argument("out_dir", help="folder to write; an earlier merged one is replaced")
    parser.add_argument("--base", default="dequantized", help="dequantized, what was trained, or original")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--max_shard_size", default="5GB", help="size of a file")
    parser.add_argument("--check_base", type=bool, default=True, help="whether the base must be that of the training")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(base_dir: str, adapter_dir: str, out_dir: str, quiet: bool, json: bool, **arguments: Any) -> bool:
    """Merge and print the report; there is nothing to find."""
    from lightning_lora.io.merge_disk import merge_to_disk

    report = merge_to_disk(base_dir, adapter_dir, out_dir, progress=not (quiet or json), **arguments)
    print(dumps(report.to_dict(), indent=2) if json else f"{out_dir}: {report}")  # noqa: T201
    return False
