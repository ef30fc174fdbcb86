# SPDX-License-Identifier: Apache-2.0
"""Say before a run what full tuning, LoRA and QLoRA of a model need, what fits, and which to take."""

from __future__ import annotations

from json import dumps
from typing import Any

#: What the page of help begins with.
USAGE = "MODEL [--gpu GPU] [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("model", help="folder of the model, or its config.json; weights are not read")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences in a forward")
    parser.add_argument("--sequence_length", type=int, default=2048, help="tokens in each")
    parser.add_argument("--gpu", default=None, help="h100, a100-80gb, rtx-4090, ... or a memory such as 24GB")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="keep the blocks' inputs alone")
    parser.add_argument("--goal", default="behaviour", help="behaviour, knowledge, narrow or variants")
    parser.add_argument("--examples", type=int, default=None, help="how many, of --sequence_length tokens each")
    parser.add_argument("--epochs", type=float, default=1.0, help="how often each is seen")
    parser.add_argument("--price", type=float, default=None, help="of an hour on the device, in US dollars")
    parser.add_argument("--dtype", default="bf16", help="of base and activations: bf16, fp16 or fp32")
    parser.add_argument("--r", type=int, default=None, help="rank of every adapter; the one that is advised if null")
    parser.add_argument("--target_modules", default="all-linear", help="all-linear, or a regular expression")
    parser.add_argument("--quantize", default="nf4", help="packing of QLoRA's base: nf4, nf4-dq, fp4 or int8")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(r: int | None, target_modules: str, quantize: Any, json: bool, **arguments: Any) -> bool:
    """Print the plan; whether nothing fits."""
    from lightning_lora.config import LoRAConfig
    from lightning_lora.planning.advice import suggested_rank
    from lightning_lora.planning.plan import plan

    rank = suggested_rank(arguments["goal"], arguments["examples"]) if r is None else r
    found = plan(config=LoRAConfig(r=rank, target_modules=target_modules, quantize=quantize), **arguments)
    print(dumps(found.to_dict(), indent=2) if json else found)  # noqa: T201
    return found.advice.method is None
