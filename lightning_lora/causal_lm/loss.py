# SPDX-License-Identifier: Apache-2.0
"""Next-token cross entropy, whole or in chunks.

With hidden states ``h`` (tokens, width), a head ``f`` and labels ``y``, both give

    loss = 1/n  sum_t  logsumexp(f(h_t)) - f(h_t)[y_t]

over the n tokens that have a label. Logits are as wide as the vocabulary, and the whole loss holds all of them and
their gradient at once: 2 x 8192 tokens x 128 k words are 8 GB in fp32. `chunked_loss` holds those of a chunk only. It
takes the gradient to ``h`` while the chunk's logits are there, so nothing is computed twice, and keeps that instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.causal_lm.encoding import IGNORED
from lightning_lora.errors import UnsupportedError

Head = Callable[[Tensor], Tensor]

#: Tokens of a chunk: with 128 k words 0.5 GB of fp32 logits.
CHUNK = 1024


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross entropy of logits (rows, tokens, words) over the labels (rows, tokens) that follow."""
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=IGNORED, reduction="sum") / count(labels)


def chunked_loss(
    hidden: Tensor, labels: Tensor, head: Head, parameters: Sequence[Tensor] = (), chunk: int = CHUNK
) -> Tensor:
    """The same of hidden states (rows, tokens, width), without ever holding all logits.

    Args:
        hidden: What the head is given.
        labels: (rows, tokens).
        head: From (n, width) to logits (n, words), whatever it does to them included.
        parameters: What of the head is trained and gets a gradient too.
        chunk: Tokens whose logits are held at a time.

    Returns:
        A scalar that can be differentiated once.
    """
    wanted = labels[:, 1:].reshape(-1)
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    learned = wanted != IGNORED  # others are not even given to the head
    total: Tensor = _Chunked.apply(flat[learned], wanted[learned], head, chunk, *parameters)
    return total / count(labels)


def count(labels: Tensor) -> Tensor:
    """How many tokens are learned; 1 where none is, for a loss of 0."""
    return (labels[:, 1:] != IGNORED).sum().clamp_min(1)


class _Chunked(torch.autograd.Function):
    """Sum of the cross entropies; forward leaves the gradients, backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head: Head, chunk: int, *parameters: Tensor) -> Tensor:
        needs = ctx.needs_input_grad[0] or any(ctx.needs_input_grad[4:])
        leaves = [hidden, *parameters] if needs else []
        asked = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        grads = [torch.zeros_like(t) if a else None for t, a in zip(leaves, asked, strict=False)]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(labels), chunk):
            part = hidden[start : start + chunk].detach().requires_grad_(asked[0])
            with torch.set_grad_enabled(needs):
                loss = F.cross_entropy(head(part).float(), labels[start : start + chunk], reduction="sum")
            total += loss.detach()
            if not needs:
                continue
            inputs = [t for t, a in zip([part, *parameters], asked, strict=True) if a]
            got = iter(torch.autograd.grad(loss, inputs))
            for number, grad in enumerate(grads):
                if grad is not None:
                    where = grad[start : start + chunk] if number == 0 else grad
                    where += next(got)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors]
        return scaled[0], None, None, None, *scaled[1:]


def head_of(model: nn.Module) -> Head:
    """What a causal model of transformers makes logits with: its head, and what its family does to them then.

    Gemma bends them, ``c tanh(z / c)``; Cohere multiplies and Granite divides them by a number.

    Raises:
        UnsupportedError: The model has no head.
    """
    layer = model.get_output_embeddings()  # type: ignore[operator]
    if layer is None:
        raise UnsupportedError(f'{type(model).__name__} names no output embeddings: use `loss="plain"`')
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits = layer(hidden)
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return head


def check_head(model: nn.Module, head: Head, hidden: Tensor, logits: Tensor) -> None:
    """See that ``head`` of the last hidden state gives the logits that the model itself gives for it.

    Args:
        model: The model, for its name.
        head: As `head_of` made it.
        hidden: (rows, tokens, width), what the model's own head was given.
        logits: (rows, 1, words), of the last token.

    Raises:
        UnsupportedError: They differ: the family does something to its logits that is not known here.
    """
    with torch.no_grad():
        own, ours = logits[:, -1].detach().float(), head(hidden[:, -1]).float()
    spread = own.std().clamp_min(1e-9)
    if not float((own - ours).abs().max() / spread) <= (1e-3 if logits.dtype == torch.float32 else 0.05):
        raise UnsupportedError(
            f"{type(model).__name__} does something to its logits that the chunked loss does not know: "
            'use `loss="plain"`'
        )
