# SPDX-License-Identifier: Apache-2.0
"""Counts of a model: logical and trainable parameters, and the bytes that they really take.

A packed weight of 4 bits keeps two parameters in one byte and its scales beside them, and it is no parameter of torch:
``sum(p.numel())`` sees nothing of it. Here it counts as the weights that it stands for (logical), and its bytes are
those of codes and scales. A tensor that several modules share counts once, where it comes first; a sharded one counts
whole in parameters, and in bytes what this process holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_lora.errors import ConfigError
from lightning_lora.model.inner import clean_name
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.adapter import AdapterModule
from lightning_lora.nn.quantized import PackedWeight
from lightning_lora.nn.sharded import whole_shape


@dataclass(frozen=True)
class ModuleCount:
    """What a module and everything inside it has.

    Args:
        name: The module's name; empty for the model itself.
        kind: Name of its class.
        logical_params: Parameters, packed ones counted as the weights that they stand for, adapters included.
        trainable_params: Those that need a gradient.
        nbytes: Bytes of its parameters and buffers on this process [bytes].
    """

    name: str
    kind: str
    logical_params: int
    trainable_params: int
    nbytes: int


@dataclass(frozen=True)
class Summary:
    """What `summarize` found.

    Args:
        rows: One for each module down to the depth that was asked for.
        total: The whole model.
        adapter_params: Parameters of adapters and of modules that are trained in full, which are no part of the base.
        adapter_nbytes: Bytes of these [bytes].
    """

    rows: list[ModuleCount]
    total: ModuleCount
    adapter_params: int
    adapter_nbytes: int

    @property
    def base_params(self) -> int:
        """Parameters of the base alone."""
        return self.total.logical_params - self.adapter_params

    @property
    def trainable_share(self) -> float:
        """Trainable parameters as a share of the base's."""
        return self.total.trainable_params / max(self.base_params, 1)

    def lines(self) -> list[str]:
        """The totals in words."""
        base = self.total.nbytes - self.adapter_nbytes
        return [
            f"{self.base_params:,} parameters of the base in {size_text(base)}"
            f" ({8 * base / max(self.base_params, 1):.2f} bits each)",
            f"{self.total.trainable_params:,} trainable ({100 * self.trainable_share:.2f} %)",
            f"{self.adapter_params:,} in adapters, {size_text(self.adapter_nbytes)}",
        ]

    def __str__(self) -> str:
        cells = [HEADER, *(row_cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(HEADER))]
        text = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in cells
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:], "-" * len(text[0]), *self.lines()])


#: The columns of a table of `ModuleCount`.
HEADER = ("module", "type", "parameters", "trainable", "size")


def row_cells(row: ModuleCount) -> tuple[str, ...]:
    """A row's cells, by `HEADER`."""
    counts = (f"{row.logical_params:,}", f"{row.trainable_params:,}" if row.trainable_params else "-")
    return (row.name, row.kind, *counts, size_text(row.nbytes))


def size_text(nbytes: int) -> str:
    """A size for people, in decimal units."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.2f} {name}"
    return f"{nbytes / 1e3:,.1f} kB"


def summarize(model: nn.Module, max_depth: int = 1) -> Summary:
    """Count a model's parameters and bytes.

    Args:
        model: Any module, converted or not.
        max_depth: How far down modules get a row of their own: 1 for the model's attributes, 0 for none, -1 for all.

    Raises:
        ConfigError: ``max_depth`` is no whole number of -1 or more.
    """
    check_depth(max_depth)
    owners = {module: (clean_name(name), type(module).__name__) for name, module in model.named_modules()}
    counts = {name: [0, 0, 0] for name, _ in owners.values()}
    added = {id(tensor) for _, module in adapter_modules(model) for tensor in _own_tensors(module)}
    adapters = [0, 0]
    for module, tensor, logical in _tensors(model):
        nbytes = _held(tensor)
        if id(tensor) in added:
            adapters = [adapters[0] + logical, adapters[1] + nbytes]
        name = owners[module][0]
        for above in _ancestors(name):
            if above in counts:  # not what wrappers put between
                found = counts[above]
                found[0] += logical
                found[1] += logical if tensor.requires_grad else 0
                found[2] += nbytes
    rows = [
        ModuleCount(name, kind, *counts[name])
        for name, kind in owners.values()
        if name and (max_depth == -1 or name.count(".") < max_depth)
    ]
    return Summary(rows, ModuleCount("", type(model).__name__, *counts[""]), *adapters)


def check_depth(max_depth: int) -> None:
    """Refuse a depth out of range.

    Raises:
        ConfigError: ``max_depth`` is no whole number of -1 or more.
    """
    if not isinstance(max_depth, int) or isinstance(max_depth, bool) or max_depth < -1:
        raise ConfigError(f"`max_depth` must be a whole number of -1 (all modules) or more, got {max_depth!r}")


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, Tensor, int]]:
    """Every parameter and buffer once: its module, itself, and how many parameters it stands for."""
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(module, PackedWeight):
                yield module, tensor, module.logical_numel if name == "codes" else 0
            else:
                yield module, tensor, whole_shape(tensor).numel() if isinstance(tensor, nn.Parameter) else 0


def _own_tensors(module: AdapterModule) -> Iterator[Tensor]:
    """What an adapter module has beside the module that it replaced."""
    theirs = {id(t) for t in [*module.replaced.parameters(), *module.replaced.buffers()]}
    return (t for t in [*module.parameters(), *module.buffers()] if id(t) not in theirs)


def _held(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return int(local.numel() * local.element_size())


def _ancestors(name: str) -> Iterator[str]:
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name
