# SPDX-License-Identifier: Apache-2.0
"""Bytes handed to collectives by two processes under DDP: at the start of training, and in a step.

Every operation of the process group is a profiler event with the shape and dtype of its tensors, those that
`DistributedDataParallel` starts in C++ among them: these are summed. Beside it stands what the loopback interface
counted for both processes together, whoever else used it: an all-reduce between two moves each byte twice.

    python benchmarks/ddp_bytes.py
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import socket
import tempfile
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM
from variants import arguments, environment

from lightning_lora import LoRA, LoRAConfig, apply_lora

STEPS = 8
VOCAB = 1024
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
#: Who puts the adapters in: `LoRA`, or the module itself, trained by Lightning's plain DDP.
VARIANTS = ("ours", "ours-nf4", "plain", "plain-nf4", "peft")
WIDTHS = {
    "float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "int": 4, "short int": 2,
    "signed char": 1, "unsigned char": 1, "bool": 1,
}  # fmt: skip


class Module(L.LightningModule):
    """A Llama that trains whatever is trainable."""

    def __init__(self, variant: str, shape: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=VOCAB, num_attention_heads=4, tie_word_embeddings=False, **shape)
        self.net: Any = LlamaForCausalLM(config)
        if variant == "peft":
            import peft

            self.net = peft.get_peft_model(self.net, peft.LoraConfig(r=8, target_modules="all-linear"))
        elif variant.startswith("plain"):
            apply_lora(self, LoRAConfig(r=8, quantize="nf4" if variant == "plain-nf4" else "none"))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Next-token loss."""
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class Count(L.Callback):
    """Counts from the building of the model to the first batch, and over all steps but the first."""

    def __init__(self) -> None:
        self.start: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self._profile: Any = None
        self._before = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The model is about to be adapted, sent and wrapped."""
        self._open()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is in place."""
        self.start = self._close()

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """DDP arranges its buckets anew after the first step: that one is not counted."""
        if trainer.global_step == 1:
            self._open()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Before anything that ends an epoch."""
        if trainer.global_step == STEPS + 1:
            self.steps = self._close()

    def _open(self) -> None:
        torch.distributed.barrier()
        self._before = loopback()
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, acc_events=True
        )
        self._profile.__enter__()

    def _close(self) -> dict[str, int]:
        self._profile.__exit__(None, None, None)
        torch.distributed.barrier()
        return {"bytes": collective_bytes(self._profile), "loopback": loopback() - self._before}


def collective_bytes(profile: torch.profiler.profile) -> int:
    """Bytes of the tensors that this process gave to operations of its process group."""
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    total = 0
    for event in events:
        if event.get("name", "").startswith(("gloo:", "nccl:")) and "Input Dims" in event["args"]:  # a barrier has none
            for kind, shape in zip(event["args"]["Input type"], event["args"]["Input Dims"], strict=True):
                total += WIDTHS[kind] * math.prod(shape)
    return total


def loopback() -> int:
    """Bytes that the loopback interface has carried."""
    row = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(row.split(":")[1].split()[0])


def train(variant: str, shape: dict[str, int]) -> dict[str, Any]:
    """Train on this process's share; what was counted."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module, count = Module(variant, shape), Count()
    own = [LoRA(r=8, quantize="nf4" if variant == "ours-nf4" else "none")] if variant.startswith("ours") else []
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS + 1, logger=False, callbacks=[*own, count],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    ids = torch.randint(VOCAB, (2 * 2 * (STEPS + 1), 16), generator=torch.Generator().manual_seed(0))
    trainer.fit(module, DataLoader(TensorDataset(ids), batch_size=2))
    trained = [p for p in module.parameters() if p.requires_grad]
    return {
        "base": sum(t.nbytes for t in (*module.parameters(), *module.buffers())) - sum(p.nbytes for p in trained),
        "gradients": sum(p.nbytes for p in trained),
        "start": count.start["bytes"],
        "step": count.steps["bytes"] / STEPS,
        "loopback_start": count.start["loopback"],
        "loopback_step": count.steps["loopback"] / STEPS,
    }


def measure(variant: str, shape: dict[str, int]) -> dict[str, Any]:
    """`train` in two processes; what the first counted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()

    def rank(number: int) -> None:
        os.environ.update(LOCAL_RANK=str(number), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        found = train(variant, shape)
        if number == 0:
            queue.put(found)

    ranks = [context.Process(target=rank, args=(number,)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(f"{variant}: a process failed")
    return queue.get()


def options(parser: argparse.ArgumentParser) -> None:
    """This script's arguments."""
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated names")
    parser.add_argument("--json", type=Path, help="file for the numbers")


if __name__ == "__main__":
    args = arguments(__doc__ or "", options)
    found = {name: measure(name, TINY if args.tiny else SHAPE) for name in args.variants.split(",")}
    if args.json is not None:
        args.json.write_text(json.dumps(found))
    print(f"{environment('lightning', 'peft')}; gloo, two processes; {date.today()}; bytes")
    print(
        "| variant | frozen base | adapters' gradients | at the start | a step | / gradients | `lo`: start | a step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        print(
            f"| {name} | {row['base']:,} | {row['gradients']:,} | {row['start']:,} | {row['step']:,.0f} | "
            f"{row['step'] / row['gradients']:.3f} | {row['loopback_start']:,} | {row['loopback_step']:,.0f} |"
        )
