# SPDX-License-Identifier: Apache-2.0
"""LoRA and QLoRA at 8B on one GPU: tokens/s, TFLOP/s, memory, against the frozen model, full tuning and PEFT.

The model has the shape of Llama 3 8B or Qwen2.5 7B and random weights, made on the device; the tokens are random.
The variants share the frozen base's tensors, so that all of them are in memory at once and take turns step by step;
full tuning, which needs a base of its own, comes after them, alone, where it fits. A step is forward, loss, backward
and AdamW; for "frozen" it is forward, loss and the gradient to the embedded input.

    tokens/s      median over the rounds
    TFLOP/s       of the arithmetic that a step needs, recomputation and unpacking not counted:
                  4 P N (full: 6 P N) for P weights of linears and N tokens, 6 r (in + out) N for each adapter,
                  6 S N h for each layer of causal attention over S tokens of width h
    / matrix rate of the device's own, measured here on bf16 matrices of 8192 x 8192
    peak GiB      of the variant alone: what it holds, and what the step allocates above that
    saved MiB     that one decoder layer keeps for backward

    python benchmarks/gpu.py --shape llama3-8b
    python benchmarks/gpu.py --shape llama3-8b --compile
    python benchmarks/gpu.py --tiny            # does it run? on a CPU too
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from memory import saved_by_layer
from torch import Tensor, nn
from variants import TARGETS, Variant, arguments, environment, gradient_norm

from lightning_lora import LoRAConfig, apply_lora

NAMES = (
    "frozen,ours,ours-drop,ours-nf4,ours-nf4-drop,peft,peft-drop,peft-same,peft-same-drop,peft-nf4,peft-nf4-drop,full"
)
RANK = 16
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "max_position_embeddings": 8192, "tie_word_embeddings": False,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "max_position_embeddings": 32768, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256,
}  # fmt: skip


@dataclass
class Runner:
    """A variant with its optimizer and what was measured of it."""

    variant: Variant
    optimizer: torch.optim.Optimizer | None
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    saved: int = 0
    norm: float = 0.0

    def step(self, ids: Tensor) -> None:
        """One step, timed; the gradients are gone afterwards."""
        settle(ids.device)
        before = torch.cuda.memory_allocated(ids.device) if ids.is_cuda else 0
        begin = time.perf_counter()
        forward(self.variant.model, ids, embedded=self.optimizer is None).backward()
        if self.optimizer is not None:
            self.optimizer.step()
        settle(ids.device)
        self.seconds.append(time.perf_counter() - begin)
        if ids.is_cuda:
            held = size_of([*self.variant.model.parameters(), *self.variant.model.buffers(), *self.state()])
            self.peaks.append(torch.cuda.max_memory_allocated(ids.device) - before + held)
            torch.cuda.reset_peak_memory_stats(ids.device)
        if self.optimizer is not None:
            self.norm = gradient_norm(self.variant)
        self.variant.model.zero_grad(set_to_none=True)

    def state(self) -> Iterator[Tensor]:
        """The optimizer's tensors."""
        states = [] if self.optimizer is None else self.optimizer.state.values()
        return (tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor))


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def size_of(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def forward(model: nn.Module, ids: Tensor, embedded: bool) -> Tensor:
    """The loss; from embedded tokens with a gradient where the model itself trains nothing."""
    if not embedded:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    return model(inputs_embeds=inputs, labels=ids, use_cache=False).loss


def make_base(shape: dict[str, Any], device: torch.device, checkpointing: bool) -> nn.Module:
    """A frozen model of random bf16 weights, made where it will run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.requires_grad_(False)


def shared(base: nn.Module) -> nn.Module:
    """The same modules anew over the very same tensors."""
    return copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})


def adapted(name: str, base: nn.Module) -> Variant:
    """The variant of this name, as `variants.build` reads it, over the tensors of ``base``."""
    kind, *options = name.split("-")
    unknown = set(options) - {"peft": {"drop", "nf4", "same"}, "ours": {"drop", "nf4"}}.get(kind, set())
    if kind not in ("frozen", "full", "ours", "peft") or unknown:
        raise ValueError(f"unknown variant {name!r}")
    dropout = 0.05 if "drop" in options else 0.0
    model = copy.deepcopy(base).requires_grad_(True) if kind == "full" else shared(base)
    if kind == "ours":
        quantize: Any = "nf4" if "nf4" in options else "none"
        config = LoRAConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, quantize=quantize)
        apply_lora(model, config)
    elif kind == "peft":
        from peft import LoraConfig, get_peft_model

        if "nf4" in options:
            pack_like_transformers(model)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=dropout, target_modules=TARGETS)
        model = get_peft_model(model, lora, autocast_adapter_dtype="same" not in options)
    return Variant(model.train(), [p for p in model.parameters() if p.requires_grad])


def pack_like_transformers(model: nn.Module) -> None:
    """Put bitsandbytes' 4-bit layers where ``load_in_4bit`` does, from weights that are on the device already."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] not in TARGETS:
            continue
        bias = module.bias is not None
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        layer.bias = module.bias
        model.set_submodule(name, layer.to(module.weight.device))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of one bf16 product of square matrices, median of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for turn in range(13):
        settle(device)
        begin = time.perf_counter()
        a @ b
        settle(device)
        if turn >= 3:
            seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds)


def flops(name: str, base: nn.Module, batch: int, length: int) -> float:
    """What a step has to compute."""
    linears = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    weights = sum(m.in_features * m.out_features for m in linears.values())
    targets = [m for n, m in linears.items() if n.rpartition(".")[2] in TARGETS]
    adapters = sum(6 * RANK * (m.in_features + m.out_features) for m in targets)
    attention = 6 * length * base.config.hidden_size * base.config.num_hidden_layers  # type: ignore[union-attr]
    own = 0 if name in ("frozen", "full") else adapters
    return batch * length * ((6 if name == "full" else 4) * weights + own + attention)


def measure(names: list[str], base: nn.Module, ids: Tensor, rounds: int, compiled: bool) -> dict[str, Runner | str]:
    """Make the variants, let them take turns; a variant that does not fit becomes the reason."""
    found: dict[str, Runner | str] = {}
    torch._dynamo.config.recompile_limit = 8 * len(names)  # the variants have their forwards' code in common
    for name in names:
        try:
            variant = adapted(name, base)
            fused = {"fused": True} if ids.is_cuda else {}
            runner = Runner(variant, torch.optim.AdamW(variant.trained, lr=1e-4, **fused) if variant.trained else None)
            inner = variant.model.get_base_model() if hasattr(variant.model, "get_base_model") else variant.model
            layer = inner.get_submodule("model.layers.1")
            runner.saved = saved_by_layer(variant.model, layer, lambda m=variant.model: forward(m, ids, embedded=True))
            if compiled:
                variant.model.compile()
            found[name] = runner
        except torch.OutOfMemoryError:
            found[name] = "does not fit"
    for turn in range(rounds + 2):
        for name, runner in found.items():
            if isinstance(runner, str):
                continue
            try:
                runner.step(ids)
            except torch.OutOfMemoryError:
                found[name] = "does not fit"
            if turn < 2:
                runner.seconds.clear()
                runner.peaks.clear()  # the optimizer's state was made in it
    return found


def table(found: dict[str, Runner | str], medians: dict[str, float], base: nn.Module, ids: Tensor, rate: float) -> str:
    """Medians and ratios: round by round to what took turns with them, else of medians; "-" where not measured."""
    head = ["variant", "median s", "tokens/s", "TFLOP/s", "/ matrix rate", *(f"/ {name}" for name in medians)]
    head += ["peak GiB", "saved MiB", "gradient norm"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, runner in found.items():
        if isinstance(runner, str):
            rows.append(f"| {name} | {runner} |" + " |" * (len(head) - 2))
            continue
        median = statistics.median(runner.seconds)
        arithmetic = flops(name, base, *ids.shape) / median
        cells = [
            f"{median:.4f}",
            f"{ids.numel() / median:,.0f}",
            f"{arithmetic / 1e12:.4g}",
            f"{arithmetic / rate:.0%}",
        ]
        for reference, theirs in medians.items():
            other = found.get(reference)
            turns = zip(runner.seconds, other.seconds, strict=True) if isinstance(other, Runner) else [(median, theirs)]
            cells.append(f"{statistics.median(a / b for a, b in turns):.2f}")
        cells += [f"{max(runner.peaks) / 2**30:.1f}" if runner.peaks else "-", f"{runner.saved / 2**20:.2f}"]
        rows.append(f"| {name} | {' | '.join(cells)} | {f'{runner.norm:.3g}' if runner.optimizer else '-'} |")
    return "\n".join(rows)


def main() -> None:
    """Build, measure, print."""
    args = arguments(__doc__ or "", options)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda" and not args.tiny:
        sys.exit("there is no CUDA device: `--tiny` shows on a CPU whether the script runs")
    torch.set_num_threads(args.threads)
    shape = {**SHAPES[args.shape], **(TINY if args.tiny else {})}
    if args.liger:
        use_liger(shape["model_type"])
    length, batch, rounds = (64, 2, 2) if args.tiny else (args.length, args.batch, args.rounds)
    ids = torch.randint(shape["vocab_size"], (batch, length), device=device)
    rate = matrix_rate(device, 512 if args.tiny else 8192)
    begin = time.perf_counter()
    base = make_base(shape, device, args.checkpointing)
    names = args.variants.split(",")
    together = [name for name in names if name != "full"]
    found = measure(together, base, ids, rounds, args.compile)
    timed = {name: runner for name in ("frozen", "peft") if isinstance(runner := found.get(name), Runner)}
    medians = {name: statistics.median(runner.seconds) for name, runner in timed.items()}
    body = table(found, medians, base, ids, rate)
    if "full" in names:
        timed.clear()
        found.clear()
        gc.collect()
        torch.cuda.empty_cache()
        alone = measure(["full"], base, ids, rounds, args.compile)
        body += f"\n\nAlone, after the others:\n\n{table(alone, medians, base, ids, rate)}"
    chosen = [f"--{name}" for name in ("compile", "checkpointing", "liger") if getattr(args, name)]
    print(f"{datetime.date.today()}; {environment('peft', 'bitsandbytes')}; CUDA {torch.version.cuda or '-'}")
    print(
        f"{args.shape}{' (tiny)' if args.tiny else ''}, bf16, r={RANK}, {batch} x {length} tokens, {rounds} rounds, "
        f"{' '.join(chosen) or 'eager'}; bf16 matrix rate {rate / 1e12:.4g} TFLOP/s; "
        f"{time.perf_counter() - begin:.0f} s in all\n"
    )
    print(body)


def use_liger(model_type: str) -> None:
    """Liger's kernels for the rest of the model: norms, rotations, SwiGLU, cross entropy without whole logits."""
    try:
        from liger_kernel import transformers as liger
    except ModuleNotFoundError:
        sys.exit("`--liger` needs Liger-Kernel: `pip install liger-kernel`")
    getattr(liger, f"apply_liger_kernel_to_{model_type}")()


def options(parser: argparse.ArgumentParser) -> None:
    """This script's arguments."""
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8b", help="of which model")
    parser.add_argument("--variants", default=NAMES, help="comma-separated names")
    parser.add_argument("--rounds", type=int, default=10, help="counted turns of each variant")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step")
    parser.add_argument("--length", type=int, default=4096, help="tokens a sequence")
    parser.add_argument("--device", default=None, help="such as cuda:1; the first GPU, else the CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer in backward")
    parser.add_argument("--liger", action="store_true", help="Liger-Kernel's norms, SwiGLU and cross entropy")


if __name__ == "__main__":
    main()
