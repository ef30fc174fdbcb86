# SPDX-License-Identifier: Apache-2.0
"""Build the small base again, from text alone: tokenizer, model, tasks.

    python examples/small_base/build.py                # everything, about 10 minutes on an idle core
    python examples/small_base/build.py --only tasks   # the benchmark's items, seconds

Llama architecture, 2.2 M parameters. The embeddings are tied: with 2.4 MB of text the output matrix
would be a fifth of the weights and see too little of each token to be learnt twice. Weights are saved
in bfloat16 (4.3 MB), the precision in which larger bases are published.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from small_base import corpus, data

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 2048
BLOCK = 256
BATCH = 4
STEPS = 2400
PEAK_LR = 2e-3
WARMUP = 150
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer.

    Args:
        texts: the training speeches.

    Returns:
        A tokenizer of `VOCAB` tokens; `<|endoftext|>` begins and ends a text, `<|pad|>` fills.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB,
            special_tokens=[END_OF_TEXT, PAD],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PAD,
        model_max_length=BLOCK, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model; its init is drawn from the seed of `corpus`.

    Args:
        tokenizer: gives the special tokens' ids.

    Returns:
        A Llama of 4 layers, hidden size 192, in float32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(corpus.SEED)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=BLOCK,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Join texts to one stream of token ids, each after `<|endoftext|>`.

    Args:
        tokenizer: the tokenizer.
        texts: the texts.

    Returns:
        Token ids, (tokens,), int64.
    """
    ids: list[int] = []
    for text in texts:
        ids += [tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]]
    return torch.tensor(ids)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to a twentieth of the peak."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean cross entropy over a stream, in nats a token."""
    model.eval()
    rows = data.blocks(stream.tolist(), BLOCK).split(16)
    total = sum(float(model(input_ids=row, labels=row).loss) * len(row) for row in rows)
    model.train()
    return total / sum(len(row) for row in rows)


def train(model: LlamaForCausalLM, stream: torch.Tensor, held_out: torch.Tensor, steps: int) -> None:
    """Train with AdamW on random windows; the held-out loss is shown, nothing is chosen by it.

    Args:
        model: trained in place; matrix products run in bfloat16.
        stream: training token ids, (tokens,).
        held_out: held-out token ids, (tokens,).
        steps: optimizer steps.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(corpus.SEED)
    window = torch.arange(BLOCK)
    model.train()
    begun = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(stream) - BLOCK, (BATCH, 1), generator=draw)
        batch = stream[starts + window]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            held = f"  held-out {mean_loss(model, held_out):.3f}" if (step + 1) % 400 == 0 else ""
            seconds = f"{time.perf_counter() - begun:.0f} s"
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}{held}  {seconds}", flush=True)


def build_model(steps: int, folder: Path) -> None:
    """Train tokenizer and model, and save both.

    Args:
        steps: optimizer steps.
        folder: receives config.json, model.safetensors and the tokenizer's files.
    """
    training, held_out = (list(part.values()) for part in corpus.split_speeches())
    tokenizer = train_tokenizer(training)
    model = make_model(tokenizer)
    stream, held_stream = token_stream(tokenizer, training), token_stream(tokenizer, held_out)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(stream):,} training tokens, {len(held_stream):,} held-out tokens")
    train(model, stream, held_stream, steps)
    print(f"held-out loss {mean_loss(model, held_stream):.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that every release of transformers knows.

    Args:
        tokenizer: the tokenizer; transformers 5 would name its class `TokenizersBackend`.
        folder: receives its files.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    written.pop("backend", None)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Build what the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the small base: tokenizer, model, tasks.")
    parser.add_argument("--only", choices=("model", "tasks"), help="build one of the two")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--model-dir", type=Path, default=data.MODEL_DIR, help="folder of the model")
    parser.add_argument("--tasks-dir", type=Path, default=data.TASKS_DIR, help="folder of the tasks")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.only != "tasks":
        build_model(chosen.steps, chosen.model_dir)
    if chosen.only != "model":
        from small_base import items

        for name, count in items.write_tasks(chosen.tasks_dir).items():
            print(f"{name}: {count} items")


if __name__ == "__main__":
    main()
