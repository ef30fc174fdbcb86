# SPDX-License-Identifier: Apache-2.0
"""`VirtualTokens`: a decoder that sees trained tokens before those of its input; base of prompt and prefix tuning.

It stands where the decoder of a causal model stood (``LlamaForCausalLM.model``), so that whatever calls the decoder,
its head, a loss, ``generate``, goes on in lengths of its own::

    seen by the decoder     v v v x x x x        v: n virtual tokens, at the positions 0 .. n - 1
    mask                    1 1 1 m m m m        x: the input, its positions and masks moved by n
    given back                    h h h h
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.adapter import AdapterModule, Held, KeepsDType

# Attention that takes a mask (batch, 1, queries, keys), and what that is made of.
_TAKE_MASKS = ("sdpa", "eager")
_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")


class VirtualTokens(AdapterModule):
    """Runs ``decoder`` behind virtual tokens; switched off, as it is.

    Args:
        decoder: The user's; frozen by the caller.
        record: Shared by all modules of one conversion.
        adapter: What is trained.
    """

    unmergeable = "virtual tokens are no weights of the base"
    indivisible = "virtual tokens are there or not, nothing lies between"
    #: The child in whose place this module stands.
    inner = "decoder"

    def __init__(self, decoder: nn.Module, record: AdapterRecord, adapter: KeepsDType) -> None:
        super().__init__(record)
        self.training = decoder.training
        self.decoder = decoder
        self.adapter = adapter

    @property
    def count(self) -> int:
        """How many virtual tokens there are."""
        raise NotImplementedError

    @property
    def replaced(self) -> nn.Module:
        """See `AdapterModule.replaced`: the decoder."""
        return self.decoder

    @property
    def added(self) -> nn.Module:
        """See `AdapterModule.added`."""
        return self.adapter

    def own_names(self) -> list[str]:
        """The adapter's parameters."""
        return [f"adapter.{name}" for name, _ in self.adapter.named_parameters()]

    def watched(self) -> list[nn.Parameter]:
        """See `AdapterModule.watched`: all that is trained."""
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """See `AdapterModule.successors`: all that is trained, in place of the embedding of the real tokens."""
        embedding = self.decoder.get_input_embeddings()  # type: ignore[operator]
        name = next(name for name, module in self.decoder.named_modules() if module is embedding)
        return {f"{name}.weight": list(self.adapter.parameters())}

    def untrained(self) -> bool:
        """Never: virtual tokens change what is computed from the start."""
        return False

    @property
    def strength(self) -> float:
        """1, or 0 for the base: there is nothing between."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        if value not in (0.0, 1.0):
            raise UnsupportedError(
                f"{self.title} has no strength of {value}: {self.indivisible}. Use 0 (the base) or 1 (what was trained)"
            )
        self._strength = value

    def _nothing(self) -> dict[str, Tensor]:
        return {name: tensor.detach().new_empty(0, *tensor.shape[1:]) for name, tensor in self.objects().items()}

    def hold(self, held: Held | None, in_place: bool = True) -> None:
        """See `AdapterModule.hold`; the number of virtual tokens may be another one."""
        super().hold(held, in_place)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the decoder takes and gives."""
        if not self.enabled or self.vacant or self.strength == 0.0:
            return self.decoder(*args, **kwargs)
        given = self._named(args, kwargs)
        past: Any = given.get("past_key_values")
        self._check_cache(past)
        seen = 0 if past is None else int(past.get_seq_length())
        wanted = given.get("return_dict")
        if wanted is not None:
            given["return_dict"] = True
        given["attention_mask"] = self._mask(given, seen)
        output = self._later(given) if seen else self._first(given)
        return output.to_tuple() if wanted is False else output

    def _first(self, given: dict[str, Any]) -> Any:
        """The pass that begins a text."""
        raise NotImplementedError

    def _later(self, given: dict[str, Any]) -> Any:
        """A pass that goes on from a cache, in which the virtual tokens are."""
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.count
        if given["attention_mask"] is not None:
            given["attention_mask"] = _more_columns(given["attention_mask"], self.count)
        return self.decoder(**given)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Every argument by its name."""
        given = dict(zip(_positional(type(self.decoder).forward), args, strict=False)) if args else {}
        return {**given, **kwargs}

    def _embedded(self, given: dict[str, Any]) -> Tensor:
        """The embeddings of the input, (batch, tokens, width); taken out of ``given``."""
        ids, embeds = given.pop("input_ids", None), given.pop("inputs_embeds", None)
        return self.decoder.get_input_embeddings()(ids) if embeds is None else embeds  # type: ignore[operator]

    def _mask(self, given: dict[str, Any], seen: int) -> Tensor | None:
        """The user's mask, checked; the one that packed texts need, where their positions alone tell them apart.

        Raises:
            UnsupportedError: It cannot be made longer.
        """
        mask = given.get("attention_mask")
        if mask is None:
            return self._packed_mask(given) if seen == 0 else None
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            shape = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise UnsupportedError(
                f"{self.title} cannot make an `attention_mask` longer that is {shape}: give one of (batch, tokens) or "
                "(batch, 1, queries, keys)"
            )
        source = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
        length = seen - self.count * (seen > 0) + source.shape[1]  # type: ignore[union-attr]
        if mask.shape[-1] != length:
            raise UnsupportedError(
                f"the cache and the input hold {length} tokens besides the virtual ones of {self.title}, the "
                f"`attention_mask` speaks of {mask.shape[-1]}: a cache that was begun without them, or cut by assisted "
                "decoding, cannot be gone on with"
            )
        return mask

    def _packed_mask(self, given: dict[str, Any]) -> Tensor | None:
        """Rows in which positions begin anew hold several texts: each sees itself (and the virtual tokens) alone."""
        positions = given.get("position_ids")
        if positions is None or positions.dim() != 2 or positions.shape[-1] < 2:
            return None
        starts = positions.diff(dim=-1) != 1
        if not bool(starts.any()):
            return None
        kind = getattr(self.decoder.config, "_attn_implementation", None)
        if kind not in _TAKE_MASKS:
            raise UnsupportedError(
                f"{self.title} over packed rows needs attention that takes a mask, this model's is {kind!r}: load it "
                'with attn_implementation="sdpa", or do not pack'
            )
        texts = nn.functional.pad(starts.long().cumsum(-1), (1, 0))
        length = texts.shape[-1]
        causal = torch.ones(length, length, dtype=torch.bool, device=texts.device).tril()
        mask = ((texts[:, :, None] == texts[:, None, :]) & causal)[:, None]
        if kind == "sdpa":
            return mask
        embedding = self.decoder.get_input_embeddings().weight  # type: ignore[operator]
        return torch.zeros(mask.shape, dtype=embedding.dtype, device=mask.device).masked_fill_(
            ~mask, torch.finfo(embedding.dtype).min
        )

    def _check_cache(self, past: Any) -> None:
        if past is not None and getattr(past, "is_compileable", False):
            raise UnsupportedError(
                f"{self.title} does not go with a {type(past).__name__}, whose length is fixed without the virtual "
                "tokens: leave `cache_implementation` alone"
            )

    def __getattr__(self, name: str) -> Any:
        # Code around the decoder reads its attributes: `embed_tokens`, `layers`, `config`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "decoder" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.decoder, name)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"num_virtual_tokens={self.count}"


def refuse_unknown(method: str, given: dict[str, Any]) -> None:
    """See that no argument has a value a token that the virtual ones would need too.

    Raises:
        UnsupportedError: One has.
    """
    for name, value in given.items():
        if name not in _KNOWN and isinstance(value, Tensor) and value.dim() > 1:
            raise UnsupportedError(
                f"{method} does not know what `{name}` is to be for the virtual tokens: call the model without it"
            )


def lengthened(mask: Tensor, count: int) -> Tensor:
    """A mask with ``count`` tokens before its own, which see one another causally and are seen by all.

    Args:
        mask: (batch, keys), 1 for tokens; or (batch, 1, queries, keys), true for what is seen, or 0 and added.
        count: How many.
    """
    mask = _more_columns(mask, count)
    if mask.dim() == 2:
        return mask
    kind = mask.dtype
    rows = torch.ones(count, mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
    if kind != torch.bool:
        rows = torch.zeros(rows.shape, dtype=kind, device=mask.device).masked_fill_(~rows, torch.finfo(kind).min)
    return torch.cat([rows.expand(*mask.shape[:2], *rows.shape), mask], dim=2)


def shortened(output: Any, batch: int, count: int) -> Any:
    """A decoder's output without its first ``count`` positions; the cache keeps them.

    Args:
        output: Of transformers.
        batch: Number of rows.
        count: How many positions go.
    """
    output["last_hidden_state"] = output["last_hidden_state"][:, count:]
    for name, cut in (
        ("hidden_states", lambda t: t[:, count:]),
        ("attentions", lambda t: t[:, :, count:]),
        ("router_logits", lambda t: t.view(batch, -1, t.shape[-1])[:, count:].reshape(-1, t.shape[-1])),
    ):
        value = output.get(name)
        if value is not None:
            output[name] = tuple(None if tensor is None else cut(tensor) for tensor in value)
    return output


def _more_columns(mask: Tensor, count: int) -> Tensor:
    seen = mask.new_ones if mask.dim() == 2 or mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([seen(*mask.shape[:-1], count), mask], dim=-1)


@cache
def _positional(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]
