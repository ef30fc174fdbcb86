# SPDX-License-Identifier: Apache-2.0
"""Whether a model folder is the base that an adapter folder was trained on, by the fingerprint that it records.

The fingerprint is of a model in memory: its tensors in the model's order and in the dtype that it was loaded in. Here
the order comes from the model built without values, the values from the files, and each dtype that a model may have
been loaded in is tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import BaseMismatchError, Notice
from lightning_lora.io.folder import AdapterFolder
from lightning_lora.io.skeleton import file_keys, skeleton
from lightning_lora.io.tensor_files import TensorFolder
from lightning_lora.model.fingerprint import VERSION, digest, distinct_tensors

_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)  # None: as each tensor is stored


def check_base_folder(base: TensorFolder, adapter: AdapterFolder, config: dict[str, Any]) -> None:
    """Compare the base's files with the fingerprint in an adapter folder; PEFT's folders have none.

    Args:
        base: The base's tensors.
        adapter: The adapter folder.
        config: The base's ``config.json``.

    Raises:
        BaseMismatchError: It is another base.
    """
    expected = adapter.record.get("fingerprint")
    if not expected:
        return
    same = _same(base, expected, config)
    if same is None:
        warnings.warn(
            f"the base in {base.path} could not be compared with the one that the adapter in {adapter.path} was "
            "trained on: only names and shapes were",
            Notice,
            stacklevel=4,
        )
    elif not same:
        raise BaseMismatchError(
            f"the adapter in {adapter.path} was trained on another base ({expected.get('base') or 'not named'}) than "
            f"the one in {base.path}: give the folder of that base. If you know that it is the right one, pass "
            "`check_base=False`"
        )


def _same(base: TensorFolder, expected: dict[str, Any], config: dict[str, Any]) -> bool | None:
    """None where it cannot be told."""
    if expected.get("version") != VERSION or expected.get("packed"):
        return None
    model = skeleton(base.path, config, str(expected.get("base") or "").partition(" ")[0])
    keys = None if model is None else _keys(model, base, expected.get("without") or [])
    if keys is None or len(keys) != expected["tensors"]:
        return None

    def tensors() -> Iterator[Tensor]:
        return (base.tensor(key) for key in keys)

    if any(digest(tensors(), dtype) == expected["digest"] for dtype in _DTYPES):
        return True
    # transformers keeps some modules of such models in fp32: a mixture of dtypes that is not tried
    return None if getattr(model, "_keep_in_fp32_modules", None) else False


def _keys(model: nn.Module, base: TensorFolder, without: list[str]) -> list[str] | None:
    """The base's keys of the model's tensors, in the model's order; None where a tensor has none."""
    model.tie_weights()  # type: ignore[operator]
    left_out = tuple(f"{name}." for name in without)
    names = [name for name, _ in distinct_tensors(model) if not name.startswith(left_out)]
    renamed = file_keys(model, base.entries)
    keys = [name if name in base.entries else renamed.get(name) for name in names]
    return None if None in keys else keys  # type: ignore[return-value]
