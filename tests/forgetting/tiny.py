# SPDX-License-Identifier: Apache-2.0
"""Tiny real parts: a byte-level tokenizer, models that know it, and tasks written as JSON lines."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_lora.config import LoRAConfig
from lightning_lora.model.apply import apply_lora
from lightning_lora.model.slots import adapter_modules

WORDS = """the a cat dog bird sun moon river stone house old new red blue runs sleeps sings falls of and in""".split()  # noqa: SIM905 - readable as it is


def tokenizer(bos: bool = False) -> Any:
    """Byte-level BPE over `WORDS`, 300 tokens, of which the first two are <s> and </s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    raw.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def items(n: int, seed: int = 0, choices: int = 4, words_each: tuple[int, int] = (1, 4)) -> list[dict[str, Any]]:
    """Made-up questions: a context, choices of so many words, the index of the right one."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [
        {
            "context": words(2, 9),
            "choices": [words(*words_each) for _ in range(choices)],
            "gold": rng.randrange(choices),
        }
        for _ in range(n)
    ]


def write_task(folder: Path, name: str, docs: list[dict[str, Any]], **changes: Any) -> Path:
    """A task's JSON lines and its YAML beside them, which names them by a relative path."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def llama(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, attention_dropout=dropout,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2(seed: int = 0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def adapted(size: float = 0.0) -> nn.Module:
    """A tiny Llama with adapters whose B is random of this size."""
    model = llama()
    apply_lora(model, LoRAConfig(r=4))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, module in adapter_modules(model):
            module.lora_B.add_(size * torch.randn(module.lora_B.shape, generator=generator))
    return model


def known_items(model: nn.Module, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions that ``model`` answers right, every one: the labels are its own answers."""
    docs, encode = items(n, seed, words_each=(2, 2)), tokenizer().encode
    with torch.no_grad():
        for doc in docs:
            start = len(encode(doc["context"]))
            scores = []
            for choice in doc["choices"]:
                ids = torch.tensor([encode(f"{doc['context']} {choice}")])
                found = model.eval()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                scores.append(float(found[start - 1 :].sum()))
            doc["gold"] = max(range(len(scores)), key=scores.__getitem__)
    return docs


class Sequences(Dataset):
    """Random token rows."""

    def __init__(self, n: int = 64, length: int = 12) -> None:
        self.rows = torch.randint(2, 300, (n, length), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index]


class Student(L.LightningModule):
    """An ordinary LightningModule around a small language model, with dropout of its own."""

    def __init__(self, net: nn.Module | None = None, dropout: float = 0.1, lr: float = 5e-3) -> None:
        super().__init__()
        self.net = net if net is not None else llama(dropout=dropout)
        self.drop = nn.Dropout(dropout)
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.drop(self.net(input_ids=batch).logits)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def loader(n: int = 64, **kwargs: Any) -> DataLoader:
    return DataLoader(Sequences(n), batch_size=4, shuffle=True, **kwargs)
