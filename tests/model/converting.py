# SPDX-License-Identifier: Apache-2.0
"""How much memory a conversion takes, in a process of its own.

``python tests/model/converting.py folder quantize mapped|resident``: loads the model, converts it, prints a row of
JSON in bytes. Counted is anonymous memory (RssAnon, looked at every millisecond): weights that transformers maps from
their file are none, what is made of them is; "resident" copies them first, as a model has them that was built or cast.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn


class Anonymous(threading.Thread):
    """The largest RssAnon since `begin`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)


def main(folder: str, quantize: str, where: str) -> None:
    from transformers import AutoModelForCausalLM

    from lightning_lora import LoRAConfig, apply_lora

    torch.set_num_threads(1)
    apply_lora(nn.Sequential(nn.Linear(64, 64)), LoRAConfig(quantize=quantize))  # whatever is imported late
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if where == "resident":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    watch = Anonymous()
    start, watch.peak = watch.now(), 0
    begin = time.process_time()
    report = apply_lora(model, LoRAConfig(r=8, quantize=quantize))
    seconds = time.process_time() - begin
    time.sleep(0.01)
    row = {"start": start, "peak": watch.peak, "end": watch.now(), "largest": largest, "seconds": seconds}
    print(json.dumps({**row, "dense": report.base_bytes, "packed": report.packed_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
