# SPDX-License-Identifier: Apache-2.0
r"""What a forward keeps for its backward, from a run of the real code on tensors without values.

The model is built with few blocks under torch's `FakeTensorMode`, as though on a CPU, and what autograd saves is
counted, storage by storage. Blocks are alike, so two depths give the rest:

.. math:: saved(L) = outside + L \cdot block

Frozen linears save nothing of the activations' size; each adapted one adds its input, unless that storage is kept
anyway, and :math:`u = x A^T` of width r (see `lightning_lora.nn.functional`). With activation checkpointing a block
keeps its input alone, and one block at a time is there in full.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import Notice, UnsupportedError
from lightning_lora.model.targets import find_targets
from lightning_lora.planning.architecture import build, positions
from lightning_lora.planning.decoders import DecoderConfig

#: Depths that are run; models of no more blocks than the second are run as they are.
SHALLOW, DEEP = 2, 4


@dataclass(frozen=True)
class Activations:
    """Bytes kept between forward and backward for one batch.

    Args:
        blocks: By all blocks [bytes].
        block: By one of them [bytes].
        outside: Before, after and between them, logits and loss left out [bytes].
        logits: By the head's output and the loss [bytes].
        checkpointed: By all blocks when each keeps its input alone [bytes].
    """

    blocks: int
    block: int
    outside: int
    logits: int
    checkpointed: int

    def total(self, gradient_checkpointing: bool = False) -> int:
        """Bytes at the end of the forward, and with checkpointing one block in full, as its backward has it [bytes]."""
        blocks = self.checkpointed + self.block if gradient_checkpointing else self.blocks
        return blocks + self.outside + self.logits


def activations(
    config: Any, lora: LoRAConfig | None, batch_size: int, sequence_length: int, dtype: torch.dtype
) -> Activations:
    """Count what one batch keeps: sequences of one length, without padding.

    Args:
        config: transformers' configuration of a causal language model, or a `DecoderConfig`.
        lora: The adapters; None for full fine-tuning.
        batch_size: Sequences.
        sequence_length: Tokens in each.
        dtype: Of base and activations.

    Raises:
        UnsupportedError: The model takes no tokens or fewer than these, or its code cannot run without values, as with
            a router that sorts tokens by expert.
    """
    name = type(config).__name__
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise UnsupportedError(
            f"activations are counted of sequences of tokens, and the model of {name} takes none: measure one step"
        )
    context, rotary = positions(config)
    if context is not None and not rotary and sequence_length > context:
        raise UnsupportedError(
            f"the activations of {name} cannot be counted for {sequence_length:,} tokens: it has {context:,} positions"
        )
    layers = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
    depths = (SHALLOW, DEEP) if layers > DEEP else (layers - 1, layers) if layers > 1 else (layers, layers)
    shape = (batch_size, sequence_length)
    try:
        shallow, deep = (_saved(with_layers(config, depth), lora, shape, dtype) for depth in depths)
    except Exception as error:  # whatever transformers' own code raises over tensors without values
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnsupportedError(
            f"the activations of {name} cannot be counted, since its code does not run on tensors "
            f"without values ({reason}): measure one step"
        ) from error
    block = (deep.all - shallow.all) // max(depths[1] - depths[0], 1)
    hidden = int(getattr(config.get_text_config(), "hidden_size", 0) or 0)
    return Activations(
        blocks=block * layers,
        block=block,
        outside=shallow.all - block * depths[0] - shallow.loss,
        logits=shallow.loss,
        checkpointed=layers * batch_size * sequence_length * hidden * dtype.itemsize,
    )


def with_layers(config: Any, layers: int) -> Any:
    """A configuration of fewer blocks, the first ones."""
    own = copy.deepcopy(config)
    text = own.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == before:  # `layer_types` and the like, one each
            setattr(text, name, list(value[:layers]))
    text.num_hidden_layers = layers
    return own


@dataclass(frozen=True)
class _Saved:
    all: int
    loss: int  # of it, by logits and loss


def _saved(config: Any, lora: LoRAConfig | None, shape: tuple[int, int], dtype: torch.dtype) -> _Saved:
    with _without_values(config):
        model = build(config, dtype).train()
        model.requires_grad_(lora is None)
        own = {_key(t) for t in [*model.parameters(), *model.buffers()]}
        seen: dict[int, int] = {}
        held: list[Any] = []  # keeps storages, and so their keys, alive

        def keep(tensor: Tensor) -> Tensor:
            if _key(tensor) not in own:
                seen[_key(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        if lora is not None:
            _keep_inputs(model, lora, keep)
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        embedded = embedding(torch.zeros(shape, dtype=torch.long)).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(inputs_embeds=embedded, use_cache=False, **_without_mask(model)).logits
            before = sum(seen.values())
            labels = torch.zeros(shape, dtype=torch.long)
            loss: Any
            if logits.dim() == 2:  # of a classifier: one answer a sequence
                loss = nn.functional.cross_entropy(logits.float(), labels[:, 0])
            else:
                loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])  # type: ignore[operator]
        held.append(loss)
        keep(logits)
        return _Saved(sum(seen.values()), sum(seen.values()) - before)


def _without_values(config: Any) -> Any:
    """Where tensors are made that have no values: as on a CPU, for the code of transformers."""
    if isinstance(config, DecoderConfig):
        return torch.device("meta")  # its attention says what it keeps
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _keep_inputs(model: nn.Module, lora: LoRAConfig, keep: Any) -> None:
    """Count what each adapter saves: its input and u."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        adapted = find_targets(model, lora).adapted

    def hook(r: int) -> Any:
        def save(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            keep(x)
            keep(x.new_empty(*x.shape[:-1], r))

        return save

    for name in adapted:
        model.get_submodule(name).register_forward_pre_hook(hook(lora.rank_for(name)))


def _without_mask(model: nn.Module) -> dict[str, Any]:
    """Arguments with which transformers sees no packed sequences, for which it would ask values of the positions.

    It looks for them where no cache is given; an empty one changes nothing else.
    """
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        return {}
    from transformers import DynamicCache

    return {"past_key_values": DynamicCache()}


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
