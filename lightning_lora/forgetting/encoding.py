# SPDX-License-Identifier: Apache-2.0
"""Encoding: text to tokens by lm-eval's rules, with a copy of the user's tokenizer."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_lora.errors import ConfigError, TaskError
from lightning_lora.forgetting.sources import hub_problem

#: Longest input when neither the model's configuration nor the tokenizer states one [tokens].
DEFAULT_MAX_LENGTH = 2048


class Encoder:
    """A copy of the tokenizer, with lm-eval's rule where a context ends and a choice begins.

    Args:
        tokenizer: what the user gave. It is copied, so that nothing of it is ever set.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            self.tokenizer = copy.deepcopy(tokenizer)
        except Exception:  # some tokenizers hold what cannot be copied; encoding leaves those as they are
            self.tokenizer = tokenizer
        self.eos = getattr(tokenizer, "eos_token_id", None)
        bos = getattr(tokenizer, "bos_token_id", None)
        self.prefix = self.eos if bos is None else bos
        self._prefix_text = "" if self.prefix is None else self.tokenizer.decode([self.prefix])
        self._special = _takes(self.tokenizer.encode, "add_special_tokens")
        self._known: dict[tuple[str, bool | None], list[int]] = {}

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """Tokens of ``text``.

        Args:
            text: any text.
            special: whether to add the tokenizer's special tokens; None for its own way, without doubling
                a beginning-of-sequence token that the text already has.
        """
        key = (text, special)
        if key not in self._known:
            if special is None and self._prefix_text and text.startswith(self._prefix_text):
                special = False
            kwargs = {"add_special_tokens": special} if special is not None and self._special else {}
            ids = self.tokenizer.encode(text, **kwargs)
            self._known[key] = list(getattr(ids, "ids", ids))
        return self._known[key]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out where the tokenizer can tell them."""
        kwargs = {"skip_special_tokens": True} if _takes(self.tokenizer.decode, "skip_special_tokens") else {}
        return self.tokenizer.decode(list(tokens), **kwargs)

    def chat(self, messages: list[dict[str, str]], start_answer: bool, template: str | None = None) -> str:
        """A conversation as the tokenizer's chat template writes it.

        Args:
            messages: what was said, each with ``role`` and ``content``.
            start_answer: whether the assistant's turn is begun after them; otherwise the last message stays open.
            template: name of the template, where the tokenizer has several.
        """
        kwargs = {} if template is None else {"chat_template": template}
        write = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=start_answer,
            continue_final_message=not start_answer,
            **kwargs,
        )
        try:
            return write(messages)
        except Exception as error:
            if not any(message["role"] == "system" for message in messages):
                raise TaskError(f"The tokenizer's chat template fails: {type(error).__name__}: {error}") from error
        # Some templates know no system role; lm-eval leaves it out then, and so does this.
        return write([message for message in messages if message["role"] != "system"])

    def forget(self) -> None:
        """Drop what was kept from base's pass to model's."""
        self._known.clear()


def find_tokenizer(tokenizer: Any, module: nn.Module) -> Any:
    """The tokenizer that the user means; a name is looked up on the hub.

    Args:
        tokenizer: an object with ``encode`` and ``decode``; a folder or name that
            `transformers.AutoTokenizer` knows; None for ``module.tokenizer``.
        module: where to look.

    Raises:
        ConfigError: when there is none, or it cannot be loaded.
    """
    found = name_tokenizer(tokenizer, module)
    return _load(found) if isinstance(found, str) else found


def name_tokenizer(tokenizer: Any, module: nn.Module) -> Any:
    """The tokenizer object that the user means, or its folder or name; nothing is loaded.

    Args:
        tokenizer: see `find_tokenizer`.
        module: where to look.

    Raises:
        ConfigError: when there is none, it is no tokenizer, or its folder does not exist.
    """
    if tokenizer is None:
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ConfigError(
                f"ForgettingMonitor has no tokenizer: {type(module).__name__} has no attribute `tokenizer`. Give "
                f"`tokenizer=` a folder, a name or an object."
            )
    if not isinstance(tokenizer, str | Path):
        if not callable(getattr(tokenizer, "encode", None)):
            raise ConfigError(f"`tokenizer` must have a method `encode`: got {type(tokenizer).__name__}.")
        return tokenizer
    path = Path(tokenizer).expanduser()
    if not path.exists() and (isinstance(tokenizer, Path) or _is_path(tokenizer)):
        raise ConfigError(
            f"`tokenizer`={str(tokenizer)!r} does not exist (looked from {Path.cwd()}). Give a folder that holds a "
            f"tokenizer, a name on the hub, or an object."
        )
    return str(path) if path.exists() else str(tokenizer)


def _is_path(name: str) -> bool:
    """Whether a name can be no name on the hub: those are ``name`` or ``owner/name``."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def _load(name: str) -> Any:
    """Load by folder or name. The hub is asked once whether it is there: the library would ask for 50 s."""
    from transformers import AutoTokenizer

    problem = None if Path(name).exists() else hub_problem()
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=problem is not None)
    except Exception as error:
        if problem is not None:
            raise ConfigError(
                f"`tokenizer`={name!r} is no folder here and not in this machine's Hugging Face cache, and {problem}. "
                f"To work without the hub, give the local folder of a tokenizer, or an object."
            ) from error
        raise ConfigError(
            f"`tokenizer`={name!r} cannot be loaded: {type(error).__name__}: {error}. Give a folder that "
            f"holds a tokenizer, a name on the hub, or an object."
        ) from error


def longest_input(config: Any, tokenizer: Any) -> int:
    """How many tokens a model takes, by its configuration, its tokenizer, or `DEFAULT_MAX_LENGTH`.

    Args:
        config: a transformers configuration, or None.
        tokenizer: the tokenizer.
    """
    inner = getattr(config, "text_config", None) or config
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(inner, name, None) is not None:
            return int(getattr(inner, name))
    stated = getattr(tokenizer, "model_max_length", None)
    return int(stated) if stated is not None and stated < 10**9 else DEFAULT_MAX_LENGTH


def _takes(function: Any, argument: str) -> bool:
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a compiled function without a signature
        return False
