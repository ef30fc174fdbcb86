# SPDX-License-Identifier: Apache-2.0
"""Tensors that no file holds because a seed gives them again: their digests stand in checkpoints and folders.

A seed gives the same bits as long as torch's generator on the CPU does; where it does not, an adapter would be read
between other matrices than it was trained between, and nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.errors import AdapterMismatchError
from lightning_lora.io.integrity import tensor_digest
from lightning_lora.model.slots import adapter_modules, adapter_record


def drawn_digests(model: nn.Module) -> dict[str, str]:
    """By name, the digest of each tensor of a converted model that a seed gives again."""
    return {name: tensor_digest(t) for _, module in adapter_modules(model) for name, t in module.drawn().items()}


def compare_drawn(model: nn.Module, entry: Mapping[str, Any], what: str) -> None:
    """See that a converted model has drawn what it was trained with.

    Args:
        model: The model.
        entry: What stands in the file beside the tensors, the digests under "drawn".
        what: How the text calls the adapters.

    Raises:
        AdapterMismatchError: It has not.
    """
    expected, found = entry.get("drawn") or {}, drawn_digests(model)
    other = [name for name in expected if name in found and expected[name] != found[name]]
    record = adapter_record(model)
    if other and record is not None and getattr(record.config, "stack", None):
        raise AdapterMismatchError(
            f"{what} were trained over {other[0]} with other values: a folder of `stack` was changed since. Give it as "
            "it was"
        )
    if other:
        raise AdapterMismatchError(
            f"{what} were trained between {' and '.join(other)} that their seed does not give here: this torch draws "
            "otherwise than that of the run. Load them where they were trained, and save them there with "
            "`save_projection=True`"
        )
