# SPDX-License-Identifier: Apache-2.0
"""What is left of a QLoRA run after each kind of merge, on the built-in base; and merges of large folders.

    python benchmarks/merge.py            runs of several lengths over an nf4 base, merged in three ways
    python benchmarks/merge.py --stream   2 GB in files of 300 MB: memory and time against PEFT

A run trains ``f(W4 + dW)`` with ``W4`` what the packed base unpacks to, ``q = W - W4``. The merges:

    dequantized    W4 + dW in bf16      `merge_to_disk`, and its default
    original       W + dW in bf16       `merge_to_disk(base="original")`
    re-quantized   pack(W4 + dW)        PEFT's `merge_and_unload()` of a model that bitsandbytes packed
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from streaming import compare, described
from torch import Tensor, nn
from variants import environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # the examples are not a package
from lightning_lora import LoRAConfig, apply_lora, disable_adapters, merge_to_disk, save_adapter
from small_base.data import MODEL_DIR, load_model, load_tokenizer, shakespeare_blocks

#: (learning rate, steps): from an update far smaller than the rounding to 4 bit to one that is larger.
RUNS = ((1e-4, 10), (3e-4, 20), (5e-4, 60), (1e-3, 150), (3e-3, 300))
MERGES = ("dequantized", "original", "re-quantized")


@dataclass
class Row:
    """One run.

    Args:
        lr: Learning rate.
        steps: Optimizer steps.
        ratio: ``||q|| / ||dW||``, the median over layers.
        base: Loss of the packed base without adapters [nats/token].
        live: Loss of the trained model.
        losses: Loss of each merge.
        errors: ``||logits - live logits|| / ||live logits||`` of each merge.
    """

    lr: float
    steps: int
    ratio: float
    base: float
    live: float
    losses: dict[str, float]
    errors: dict[str, float]

    def lost(self, merge: str) -> float:
        """The share of what was learned that a merge gives back."""
        return (self.losses[merge] - self.live) / (self.base - self.live)


@torch.no_grad()
def loss_and_logits(model: nn.Module, rows: Tensor) -> tuple[float, Tensor]:
    """Mean loss [nats/token] on held-out text, and the logits of the first rows."""
    model.eval()
    losses, first = [], None
    for batch in rows.split(8):
        out = model(input_ids=batch, labels=batch)
        losses.append(float(out.loss))
        first = out.logits if first is None else first
    return sum(losses) / len(losses), first


def train(model: nn.Module, rows: Tensor, lr: float, steps: int) -> None:
    """AdamW on Shakespeare, eight rows a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def requantized_by_peft(folder: Path) -> nn.Module:
    """PEFT's merge into the packed base, unpacked into a plain model so that it can be run anywhere."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, quantization_config=config, dtype=torch.float32, device_map={"": "cpu"}
    )
    merged = PeftModel.from_pretrained(packed, folder).merge_and_unload()
    plain = load_model()
    for name, module in merged.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def one_run(lr: float, steps: int, train_rows: Tensor, held_out: Tensor) -> Row:
    """Train, merge in each way, and measure."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = load_model()
    apply_lora(model, LoRAConfig(r=16, lora_alpha=32, quantize="nf4"))
    train(model, train_rows, lr, steps)
    live, expected = loss_and_logits(model, held_out)
    with disable_adapters(model):
        base, _ = loss_and_logits(model, held_out)
    losses, errors, ratio = {}, {}, 0.0
    with tempfile.TemporaryDirectory(prefix="merge-bench-") as folder:
        adapter = Path(folder) / "adapter"
        save_adapter(model, adapter)
        for merge in MERGES:
            if merge == "re-quantized":
                merged: Any = requantized_by_peft(adapter)
            else:
                report = merge_to_disk(MODEL_DIR, adapter, Path(folder) / merge, base=merge)
                ratio = statistics.median(report.q_over_dw.values())
                merged = AutoModelForCausalLM.from_pretrained(Path(folder) / merge, dtype=torch.float32)
            losses[merge], logits = loss_and_logits(merged, held_out)
            errors[merge] = float((logits - expected).norm() / expected.norm())
    return Row(lr, steps, ratio, base, live, losses, errors)


def table(rows: list[Row]) -> str:
    """One row for each run."""
    lines = [
        "| lr, steps | \\|q\\|/\\|dW\\| | base | live | " + " | ".join(MERGES) + " | lost by re-quantizing |",
        "|---|---|---|---|" + "---|" * (len(MERGES) + 1),
    ]
    for row in rows:
        cells = " | ".join(f"{row.losses[m]:.4f} ({row.errors[m]:.1e})" for m in MERGES)
        lines.append(
            f"| {row.lr:.0e}, {row.steps} | {row.ratio:.2f} | {row.base:.4f} | {row.live:.4f} | {cells} "
            f"| {row.lost('re-quantized'):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run one of the two modes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", action="store_true", help="merge folders of files and compare with PEFT")
    parser.add_argument("--tiny", action="store_true", help="small and short: does the script run?")
    parser.add_argument("--rounds", type=int, default=3, help="with --stream: merges of each kind")
    parser.add_argument("--scratch", default=None, help="with --stream: a folder with 20 GB of room")
    parser.add_argument("--threads", type=int, default=1, help="torch's CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(environment("peft", "bitsandbytes"))
    if args.stream:
        shape, shard = ("tiny", "30MB") if args.tiny else ("2gb", "300MB")
        print(described(compare(shape, shard, 1 if args.tiny else args.rounds, args.scratch)))
        return
    tokenizer = load_tokenizer()
    train_rows, held_out = (shakespeare_blocks(tokenizer, 128, split) for split in ("train", "validation"))
    runs = RUNS[1:2] if args.tiny else RUNS
    print("held-out loss [nats/token] (relative difference of logits to the live model)")
    print(table([one_run(lr, steps, train_rows, held_out[:64]) for lr, steps in runs]))


if __name__ == "__main__":
    main()
