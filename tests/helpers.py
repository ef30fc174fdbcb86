# SPDX-License-Identifier: Apache-2.0
"""Tiny models and modules that tests share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def tiny_llama(seed: int = 0, vocab: int = 64, **config: Any) -> nn.Module:
    """A random two-layer Llama of hidden size 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {
        "vocab_size": vocab, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**values, **config}))


def tiny_gpt2(seed: int = 0, vocab: int = 64) -> nn.Module:
    """A random two-layer GPT-2 (Conv1D layers, tied head) of hidden size 64, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab, n_embd=64, n_layer=2, n_head=2, n_positions=128,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class TinyNet(nn.Module):
    """A plain network without transformers: embedding, two linears, dropout between, a head."""

    def __init__(self, vocab: int = 64, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``(batch, time, vocab)`` of ids ``(batch, time)``."""
        x = self.embed(ids)
        return self.head(x + self.second(self.dropout(F.gelu(self.first(x)))))


class Tokens(Dataset):
    """Seeded random sequences ``(length,)`` with some structure to learn."""

    def __init__(self, size: int = 64, length: int = 16, vocab: int = 64, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(vocab, (size, 1), generator=generator)
        steps = torch.randint(1, 4, (size, 1), generator=generator)
        self.data = (starts + steps * torch.arange(length)) % vocab

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]


class LM(L.LightningModule):
    """An ordinary LightningModule around any net that gives logits; knows nothing of adapters."""

    def __init__(self, net: nn.Module | None = None, lr: float = 1e-2, build_late: bool = False) -> None:
        super().__init__()
        self.lr = lr
        self.build_late = build_late
        self.net: Any = None if build_late else (net if net is not None else tiny_llama())

    def configure_model(self) -> None:
        """Builds the net here when asked to, as sharded runs do."""
        if self.build_late and self.net is None:
            self.net = tiny_llama()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits."""
        out = self.net(ids)
        return out.logits if hasattr(out, "logits") else out

    def loss(self, ids: Tensor) -> Tensor:
        """Next-token cross entropy."""
        logits = self(ids)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One step."""
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``val_loss``."""
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Logs ``test_loss``."""
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """AdamW over everything, as most people write it."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loader(size: int = 64, batch_size: int = 4, shuffle: bool = False, **kwargs: Any) -> DataLoader:
    """A plain loader over `Tokens`."""
    return DataLoader(Tokens(size, **kwargs), batch_size=batch_size, shuffle=shuffle)


def make_trainer(tmp_path: Any, callbacks: list[L.Callback] | None = None, **kwargs: Any) -> L.Trainer:
    """A quiet CPU Trainer."""
    values: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_steps": 4, "default_root_dir": tmp_path,
    }  # fmt: skip
    if not any(type(c).__name__.endswith("Checkpoint") for c in callbacks or []):
        values["enable_checkpointing"] = False
    return L.Trainer(**{**values, **kwargs}, callbacks=callbacks or [])


def random_adapters(model: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Give every trained tensor of the adapters a random, non-zero value."""
    from lightning_lora.model.state import adapter_state_dict

    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state_dict(model).values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * std)
    return model


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
