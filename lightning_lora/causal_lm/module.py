# SPDX-License-Identifier: Apache-2.0
"""`CausalLMModule`: any causal language model of transformers, and how it is fine-tuned."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_lora.causal_lm.datamodule import load_tokenizer, shows_bars
from lightning_lora.causal_lm.encoding import IGNORED
from lightning_lora.causal_lm.loss import CHUNK, check_head, chunked_loss, count, head_of, next_token_loss
from lightning_lora.causal_lm.packing import check_packing
from lightning_lora.causal_lm.throughput import Throughput
from lightning_lora.config import DTypeName
from lightning_lora.errors import ConfigError, MissingDependencyError, UnsupportedError

Loss = Literal["plain", "chunked", "liger"]
Schedule = Literal["cosine", "linear", "constant"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class CausalLMModule(pl.LightningModule):
    """A causal language model with its loss, its optimizer and its schedule; knows nothing of adapters.

    `LoRA(quantize="nf4")` packs the base as soon as it is loaded; it is loaded to the CPU, and the packed layers go
    to the device one by one. Batches are those of `InstructionDataModule`: dicts with ``input_ids``, ``labels`` and
    ``attention_mask`` or ``position_ids``.

    The defaults are what practitioners' guides start from (2024-2026), for adapters on models of 1 to 70 billion
    parameters: a learning rate of 2e-4 (1e-4 to 3e-4 is seen; a tenth of it when all weights are trained), AdamW, a
    cosine down to 0 after 3 % of warm-up. Their steps are of 64 to 128 examples: give the Trainer
    ``accumulate_grad_batches``. Weight decay is 0: guides name none, and B A is pulled to the base by it.

    Logged:

    | key | unit | meaning |
    |---|---|---|
    | ``train_loss`` | nats a token | mean over the learned tokens of a batch |
    | ``val_loss`` | nats a token | mean over the learned tokens of the validation |
    | ``tokens_per_second`` | 1/s | of all processes, padding not counted, validations and checkpoints left out |

    Example::

        module = CausalLMModule("base/", gradient_checkpointing=True)
        trainer = Trainer(callbacks=[LoRA(quantize="nf4")])
        trainer.fit(module, InstructionDataModule("train.jsonl"))

    Args:
        base: Folder or name of the model, as `AutoModelForCausalLM.from_pretrained` takes it.
        lr: Highest learning rate of AdamW.
        schedule: How it goes down after the warm-up: "cosine", "linear", or "constant".
        warmup: Share of all steps in which it rises from 0, in [0, 1].
        weight_decay: Of AdamW.
        dtype: Of the base's weights: "auto" for the stored one, "fp32", "bf16" or "fp16".
        gradient_checkpointing: Whether activations are computed again in the backward, non-reentrant: much less
            memory, 20 to 40 % more time by the guides.
        loss: "plain"; "chunked", the same without ever holding all logits, for large vocabularies and long rows; or
            "liger", Liger's fused kernel, on GPUs.
        chunk: Tokens whose logits the chunked loss holds at a time.
        attention: Which of transformers' attentions; the best that there is if null.

    Raises:
        ConfigError: An argument has no such value.
        MissingDependencyError: transformers, or what `loss="liger"` needs, is not installed.
        UnsupportedError: The model does not keep packed examples apart, or the chunked loss does not know its logits.
    """

    def __init__(
        self,
        base: str,
        lr: float = 2e-4,
        schedule: Schedule = "cosine",
        warmup: float = 0.03,
        weight_decay: float = 0.0,
        dtype: DTypeName = "auto",
        gradient_checkpointing: bool = False,
        loss: Loss = "plain",
        chunk: int = CHUNK,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        if lr <= 0.0:
            raise ConfigError(f"`lr` must be above 0, got {lr!r}")
        if not 0.0 <= warmup <= 1.0:
            raise ConfigError(f"`warmup` is a share of all steps, in [0, 1], got {warmup!r}")
        if chunk < 1:
            raise ConfigError(f"`chunk` must be at least 1, got {chunk!r}")
        for name, value, known in (
            ("schedule", schedule, get_args(Schedule)),
            ("dtype", dtype, get_args(DTypeName)),
            ("loss", loss, get_args(Loss)),
            ("attention", attention, (None, *get_args(Attention))),
        ):
            if value not in known:
                raise ConfigError(f"`{name}` must be one of {', '.join(map(str, known))}, got {value!r}")
        if loss == "liger" and importlib.util.find_spec("liger_kernel") is None:
            raise MissingDependencyError(
                '`loss="liger"` needs `liger-kernel`, which is not installed: pip install liger-kernel, or use '
                '`loss="chunked"`'
            )
        self.save_hyperparameters()
        self.base, self.lr, self.schedule, self.warmup, self.weight_decay = base, lr, schedule, warmup, weight_decay
        self.dtype_name, self.gradient_checkpointing, self.attention = dtype, gradient_checkpointing, attention
        self.loss, self.chunk = loss, chunk
        self.model: Any = None
        self._tokenizer: Any = None
        self._throughput = Throughput()
        self._packs: set[bool] = set()  # whether it was asked with one row, with several
        self._head_known = False

    @property
    def tokenizer(self) -> Any:
        """The base's own, loaded when it is first asked for: `InstructionDataModule` and `ForgettingMonitor` do."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.base)
        return self._tokenizer

    def configure_model(self) -> None:
        """Load the base, once; `LoRA` packs it right after."""
        if self.model is not None:
            return
        try:
            from transformers import AutoModelForCausalLM
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "CausalLMModule needs `transformers`, which is not installed: pip install 'lightning-lora[hf]'"
            ) from error
        given = {} if self.attention is None else {"attn_implementation": self.attention}
        dtype: Any = _DTYPES.get(self.dtype_name, "auto")
        # Not on Lightning's device: packed layers go there one by one.
        with torch.device("cpu"), _bars(shown=shows_bars(self)):
            self.model = AutoModelForCausalLM.from_pretrained(self.base, dtype=dtype, **given)
        self.model.train()
        if self.gradient_checkpointing:
            recompute_activations(self.model)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits (rows, tokens, words)."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, **kwargs).logits
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mean loss over the learned tokens of a batch."""
        loss = self.loss_of(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=int(count(batch["labels"])))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log the loss; batches weigh by their learned tokens."""
        self.log("val_loss", self.loss_of(batch), prog_bar=True, sync_dist=True, batch_size=int(count(batch["labels"])))

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross entropy [nats a token] over the learned tokens of a batch.

        Raises:
            UnsupportedError: See the class.
        """
        given = {name: value for name, value in batch.items() if name != "labels"}
        if "position_ids" in given:
            self._see_that_it_packs(len(batch["labels"]))
        if self.loss == "plain":
            return next_token_loss(self(**given), batch["labels"])
        head = head_of(self.model)
        hidden, last = _last_hidden(self.model, given)
        if not self._head_known:
            check_head(self.model, head, hidden, last)
            self._head_known = True
        layer = self.model.get_output_embeddings()
        if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            raise UnsupportedError(f'`loss="{self.loss}"` does not go with a sharded output head: use `loss="plain"`')
        if self.loss == "liger":
            return _liger_loss(self.model, hidden, batch["labels"])
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        return chunked_loss(hidden, batch["labels"], head, trained, self.chunk)

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, and the schedule, a step an optimizer step.

        Raises:
            ConfigError: The schedule goes down to the end of the run, and the run has none.
        """
        from transformers import get_scheduler

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps) and (self.schedule != "constant" or self.warmup > 0.0):
            raise ConfigError(
                f'`schedule="{self.schedule}"` with `warmup={self.warmup}` is a share of the run, which has no end: '
                'give the Trainer `max_steps` or `max_epochs`, or use `schedule="constant"` and `warmup=0`'
            )
        total = int(steps) if math.isfinite(steps) else 0
        scheduler = get_scheduler(
            _SCHEDULES[self.schedule],
            optimizer,
            num_warmup_steps=math.ceil(self.warmup * total),
            num_training_steps=total,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._throughput.begin()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Count the batch; now and then log tokens a second."""
        self._throughput.end(_tokens(batch))
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            self.log("tokens_per_second", self._throughput.read(), sync_dist=True, reduce_fx="sum", batch_size=1)

    def on_validation_start(self) -> None:
        """What is not training does not count."""
        self._throughput.pause()

    def on_train_epoch_end(self) -> None:
        """What is not training does not count."""
        self._throughput.pause()

    def _see_that_it_packs(self, rows: int) -> None:
        if (rows > 1) not in self._packs:
            check_packing(self.model, min(rows, 2))
            self._packs.add(rows > 1)


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Keeps transformers' progress bars away where none are to be shown."""
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def recompute_activations(model: Any) -> None:
    """Turn activation checkpointing on, the non-reentrant one: the other gives no gradient over a frozen embedding."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _tokens(batch: dict[str, Tensor]) -> int:
    """Tokens of a batch without padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    labels = batch["labels"] != IGNORED  # a packed row ends with a learned token, and its padding after it
    reach = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return int((labels * reach).amax(dim=1).sum())


def _last_hidden(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the model's head would be given, (rows, tokens, width), and the logits (rows, 1, words) of the last token.

    The model itself is called, so that hooks of others are: it makes the logits of one token only.
    """
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0])

    handle = model.base_model.register_forward_hook(keep)
    try:
        logits = model(**given, use_cache=False, logits_to_keep=1).logits
    except TypeError as error:
        raise UnsupportedError(
            f'{type(model).__name__} cannot leave out logits ({error}): use `loss="plain"`'
        ) from error
    finally:
        handle.remove()
    if len(kept) != 1 or logits.shape[1] != 1:
        raise UnsupportedError(f'{type(model).__name__} does not show its last hidden state: use `loss="plain"`')
    return kept[0], logits


def _liger_loss(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    config = model.config.get_text_config()
    if getattr(config, "logit_scale", None) or getattr(config, "logits_scaling", None):
        raise UnsupportedError(f'Liger\'s loss does not scale logits as {type(model).__name__} does: use "chunked"')
    cap = getattr(config, "final_logit_softcapping", None)
    fused = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, reduction="sum", softcap=cap)
    layer = model.get_output_embeddings()
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    total: Tensor = fused(layer.weight, flat, labels[:, 1:].reshape(-1), getattr(layer, "bias", None))
    return total / count(labels)
