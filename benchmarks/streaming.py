# SPDX-License-Identifier: Apache-2.0
"""A merge from files to files, ours and PEFT's, each in a process of its own: memory, time, and the same tensors.

Memory is RssAnon of /proc/self/status, read every few milliseconds by a thread: what the process has taken for
itself. Pages of input files that are mapped are the kernel's to drop and do not count.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_lora import merge_to_disk
from lightning_lora.io.tensor_files import Entry, TensorFolder, parse_size, write_shards

# 1.16 G parameters, 2.3 GB in bf16; "tiny" is for a quick look at whether it runs.
SHAPES: dict[str, dict[str, Any]] = {
    "2gb": {
        "hidden_size": 2048, "num_hidden_layers": 20, "intermediate_size": 5632, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 8000, "tie_word_embeddings": False,
    },
}  # fmt: skip
EVERY = 0.002  # seconds between two looks at the memory


def rss_anon() -> int:
    """Anonymous memory of this process [bytes]."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most anonymous memory above that at the start, while the block runs [bytes]."""

    def __enter__(self) -> Peak:
        self.start = rss_anon()
        self.above, self.looks, self._stop = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.above = max(self.above, rss_anon() - self.start)
            self.looks += 1
            if self._stop.wait(EVERY):
                return


def make_folders(scratch: Path, shape: dict[str, Any], shard: str, r: int = 16) -> None:
    """A random bf16 Llama in shards, and an adapter of rank ``r`` for it in PEFT's layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16"))
    (scratch / "base").mkdir(parents=True)
    (scratch / "adapter").mkdir()
    generator = torch.Generator().manual_seed(0)

    def weight(key: str) -> torch.Tensor:
        values = torch.randn(entries[key].shape, generator=generator)
        return (1 + 0.1 * values if values.dim() == 1 else 0.02 * values).bfloat16()

    entries = {key: Entry(torch.bfloat16, tuple(t.shape)) for key, t in model.state_dict().items()}
    write_shards(scratch / "base", entries, weight, parse_size(shard))
    model.config.save_pretrained(scratch / "base")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    factors = {}
    for name, layer in linears.items():
        for x, size in (("A", (r, layer.in_features)), ("B", (layer.out_features, r))):
            values = torch.randn(size, generator=generator) * 0.02
            factors[f"base_model.model.{name}.lora_{x}.weight"] = values
    save_file(factors, scratch / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}), "bias": "none",
        "inference_mode": True,
    }  # fmt: skip
    (scratch / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def merge_ours(scratch: Path, shard: str) -> None:
    """From files to files."""
    merge_to_disk(scratch / "base", scratch / "adapter", scratch / "ours", max_shard_size=shard)


def merge_peft(scratch: Path, shard: str, dtype: torch.dtype = torch.bfloat16, out: str = "peft") -> None:
    """Load, merge and save, as PEFT's documentation says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(scratch / "base", dtype=dtype)
    merged = PeftModel.from_pretrained(model, scratch / "adapter").merge_and_unload()
    merged.save_pretrained(scratch / out, max_shard_size=shard)


def child(kind: str, scratch: Path, shard: str) -> None:
    """One measured merge; prints seconds and bytes."""
    import peft  # noqa: F401  (imports are no part of the merge)
    import transformers  # noqa: F401
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    begin = time.perf_counter()
    with Peak() as peak:
        merge_ours(scratch, shard) if kind == "ours" else merge_peft(scratch, shard)
    seconds = time.perf_counter() - begin
    print(json.dumps({"seconds": seconds, "above": peak.above, "looks": peak.looks}))


def measure(kind: str, scratch: Path, shard: str) -> dict[str, float]:
    """`child` in a fresh process."""
    command = [sys.executable, __file__, kind, str(scratch), shard]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def different(scratch: Path, shard: str) -> tuple[int, int]:
    """Values of ours that are not PEFT's merge in fp32 rounded once, and how many there are."""
    merge_peft(scratch, shard, torch.float32, "fp32")
    wrong = count = 0
    with TensorFolder(scratch / "ours") as ours, TensorFolder(scratch / "fp32") as exact:
        if set(ours.entries) != set(exact.entries):
            raise RuntimeError(f"other tensors: {sorted(set(ours.entries) ^ set(exact.entries))[:3]}")
        for key in ours.entries:
            wrong += int((ours.tensor(key) != exact.tensor(key).bfloat16()).sum())
            count += ours.tensor(key).numel()
    return wrong, count


def compare(shape: str = "2gb", shard: str = "300MB", rounds: int = 3, scratch: str | None = None) -> dict[str, Any]:
    """Make the folders, merge in turns, compare.

    Args:
        shape: A key of `SHAPES`.
        shard: Size of a file, of the base and of the merged model.
        rounds: Merges of each kind.
        scratch: Where to write; needs about seven times the size of the model.
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="merge-bench-") as folder:
        path = Path(folder)
        make_folders(path, SHAPES[shape], shard)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "peft": []}
        for _ in range(rounds):
            for kind, found in runs.items():
                found.append(measure(kind, path, shard))
        wrong, count = different(path, shard)
        files = sorted((path / "base").glob("*.safetensors"))
        largest = max(file.stat().st_size for file in files)
        with safe_open(path / "adapter" / "adapter_model.safetensors", "pt") as file:
            adapted = len(file.keys()) // 2
        return {
            "bytes": sum(file.stat().st_size for file in files),
            "files": len(files),
            "adapted": adapted,
            "shard": parse_size(shard),
            "largest": largest,
            "peak": {kind: max(run["above"] for run in found) for kind, found in runs.items()},
            "seconds": {kind: statistics.median(run["seconds"] for run in found) for kind, found in runs.items()},
            "all_seconds": {kind: [round(run["seconds"], 2) for run in found] for kind, found in runs.items()},
            "different": wrong,
            "values": count,
        }


def described(found: dict[str, Any]) -> str:
    """What `compare` found, as a table."""
    lines = [
        f"base {found['bytes'] / 1e9:.2f} GB in {found['files']} files, {found['adapted']} layers adapted",
        "| merge | peak above start [MB] | in shards | median s | all s |",
        "|---|---|---|---|---|",
    ]
    for kind in ("ours", "peft"):
        peak, times = found["peak"][kind], ", ".join(str(s) for s in found["all_seconds"][kind])
        lines.append(
            f"| {kind} | {peak / 1e6:.0f} | {peak / found['shard']:.2f} | {found['seconds'][kind]:.2f} | {times} |"
        )
    lines.append(f"values that are not PEFT's fp32 merge rounded once: {found['different']} of {found['values']}")
    return "\n".join(lines)


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
