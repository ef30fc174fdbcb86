# SPDX-License-Identifier: Apache-2.0
"""`merge_to_disk`: fold an adapter folder into a model folder, tensor by tensor; no model is built or loaded.

    W' = round( W + s B A )           base="original"
    W' = round( W4 + s B A )          base="dequantized":  W4 = dequantize(pack(W)), as training packed it

A DoRA adapter gives ``round( m V / |V| )``, V that sum. Sums are fp32 and rounded once. A run over a packed base
trained ``W4 + dW``; what the original base adds to that is ``q = W - W4``, reported against ``dW``. A tied head or
embedding that was trained is written apart and untied.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.bars import Bar, no_bar, terminal_bar
from lightning_lora.errors import ConfigError, MergeError, UnsupportedError
from lightning_lora.io.atomic import atomic_folder
from lightning_lora.io.companions import copy_companions
from lightning_lora.io.folder import CONFIG, PREFIX, RECORD, AdapterFolder, package_version
from lightning_lora.io.kinds import rows
from lightning_lora.io.merge import MergeReport
from lightning_lora.io.merge_base import check_base_folder
from lightning_lora.io.merge_plan import MergePlan
from lightning_lora.io.merged_folder import REPORT, check_target
from lightning_lora.io.tensor_files import Entry, TensorFolder, parse_size, write_shards
from lightning_lora.io.tied import changed_config, config_of
from lightning_lora.nn.adapter import torch_dtype
from lightning_lora.nn.quantized import PackedWeight

_LOG = logging.getLogger(__name__)


@dataclass
class DiskMergeReport(MergeReport):
    """What `merge_to_disk` wrote.

    Args:
        base: "dequantized" or "original".
        trained: By layer, ``||W' - (W_t + dW)|| / ||W_t + dW||`` with W_t the weight that training computed with.
        q_over_dw: By layer of a packed base, ``||q|| / ||dW||``.
        files: The files with tensors.
        nbytes: Size of the tensors [bytes].
        untied: Whether tied embeddings were written apart.
    """

    base: str = "original"
    trained: dict[str, float] = field(default_factory=dict)
    q_over_dw: dict[str, float] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    nbytes: int = 0
    untied: bool = False

    def __str__(self) -> str:
        """One line for people."""
        text = f"{super().__str__()}; base {self.base}, {self.nbytes / 1e9:.3g} GB in {len(self.files)} files"
        if self.q_over_dw:
            low, high = min(self.q_over_dw.values()), max(self.q_over_dw.values())
            worst = max(self.trained.values())
            text += f"; |q|/|dW| {low:.2g} to {high:.2g}, {worst:.2e} from what was trained at worst"
        return text + ("; embeddings untied" if self.untied else "")


@torch.no_grad()
def merge_to_disk(
    base_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    base: str = "dequantized",
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    progress: bool | Bar = True,
    check_base: bool = True,
) -> DiskMergeReport:
    """Merge an adapter folder into a folder of safetensors, without loading the model.

    Tensors are read, merged and written one at a time. Config, tokenizer and generation files are copied. The
    folder appears as a whole when all is written; a merge that was cut off leaves none and can be run again.

    Args:
        base_dir: The base model, as ``save_pretrained`` writes it: one file, or shards with their index.
        adapter_dir: The adapter folder, PEFT's or ours.
        out_dir: The folder to write; an earlier merged one of ours is replaced.
        base: "dequantized" packs and unpacks what training packed, so that the result is what was trained;
            "original" adds the update to the base as it is. The same where training packed nothing.
        dtype: "auto" (each tensor's own), "fp32", "bf16" or "fp16".
        max_shard_size: Bytes of a file, or a text such as "5GB".
        progress: Show a bar where the error output is a terminal; or what shows one, see `lightning_lora.bars`.
        check_base: Compare the base with the fingerprint that an adapter folder of ours records.

    Returns:
        Errors by layer, also written as ``merge_report.json``.

    Raises:
        ConfigError: An argument has no such value.
        CheckpointError: A folder is missing, incomplete or broken.
        BaseMismatchError: The adapter was trained on another base.
        MergeError: The adapter does not fit the base, or `out_dir` holds something else.
        UnsupportedError: A quantized base folder, or embeddings that cannot be untied.
    """
    if base not in ("dequantized", "original"):
        raise ConfigError(f'`base` must be "dequantized" or "original", got {base!r}')
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"`dtype` must be auto, fp32, bf16 or fp16, got {dtype!r}")
    limit, base_path, out = parse_size(max_shard_size), Path(base_dir), Path(out_dir)
    if out.resolve() in (base_path.resolve(), Path(adapter_dir).resolve()):
        raise ConfigError(f"`out_dir` {str(out)!r} is where the base or the adapter stands: choose another folder")
    check_target(out, "out_dir")
    adapter, report = AdapterFolder.open(adapter_dir), DiskMergeReport(base=base)
    with TensorFolder(base_path) as source, atomic_folder(out) as part:
        config = config_of(base_path)
        if config and adapter.record.get("names") == "module":
            raise UnsupportedError(
                f"the adapter in {adapter.path} lies partly outside the transformers model, which a model folder has "
                "no place for: merge in memory with `merge_adapters`"
            )
        if check_base:
            check_base_folder(source, adapter, config)
        merge = _Merge(source, adapter, config, None if dtype == "auto" else torch_dtype(dtype), report)
        report.nbytes = sum(entry.nbytes for entry in merge.entries.values())
        bar = progress if callable(progress) else terminal_bar if progress else no_bar
        with bar("merging", report.nbytes) as advance:

            def tensor(key: str) -> Tensor:
                made = merge.tensor(key)
                advance(merge.entries[key].nbytes)
                return made

            report.files = write_shards(part, merge.entries, tensor, limit, _say)
        dtypes = Counter(e.dtype for e in merge.entries.values() if e.dtype.is_floating_point)
        report.dtype = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
        _check_written(part, merge.entries)
        copy_companions(base_path, part, (REPORT, CONFIG, RECORD))
        if config:
            written = changed_config(config, report.untied, report.dtype if dtype != "auto" else None)
            (part / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        entry = {"lightning_lora": package_version(), **report.to_dict()}
        (part / REPORT).write_text(json.dumps(entry, indent=2) + "\n")
    return report


class _Merge:
    """Every tensor of the merged model: what it will be, and its values when they are asked for."""

    def __init__(
        self,
        base: TensorFolder,
        adapter: AdapterFolder,
        config: Mapping[str, Any],
        dtype: torch.dtype | None,
        report: DiskMergeReport,
    ) -> None:
        self.base, self.adapter, self.dtype, self.report = base, adapter, dtype, report
        self.factors = adapter.tensors()
        self.transposed = set(adapter.record.get("transposed") or ())
        plan = MergePlan(base, adapter, self.factors, config)
        self.changes, self.kind, report.untied = plan.changes, plan.kind, plan.untied
        keys = dict.fromkeys([*base.entries, *self.changes])
        self.entries = {key: self._entry(key) for key in keys}

    def tensor(self, key: str) -> Tensor:
        """The values of one tensor."""
        change, wanted = self.changes.get(key), self.entries[key].dtype
        if change is None:
            return _fitted(key, self.base.tensor(key), wanted)
        if change.saved is not None:
            return _fitted(key, self.factors[change.saved], wanted, trained=True)
        weight = self.base.tensor(change.source or key)
        trained = _repack(weight, change.packed) if change.packed else None
        start = weight if trained is None or self.report.base == "original" else trained
        if change.lora is None:
            return _fitted(key, start, wanted)
        return self._merged(change.lora, weight, trained, start, wanted)

    def _merged(self, name: str, weight: Tensor, trained: Tensor | None, start: Tensor, wanted: torch.dtype) -> Tensor:
        """Sum, rounding and measures of one adapted weight."""
        total, update = self._folded(name, start, wanted)
        if trained is not None and update > 0:
            q = sum(_square(w.float() - t) for w, t in rows(weight, trained)) ** 0.5
            self.report.q_over_dw[name] = q / update
        merged = total.to(wanted).contiguous()
        difference, size = _distance(merged, total), float(total.norm())
        if not math.isfinite(difference):
            raise MergeError(f"{name!r}: merged values are not finite in {wanted}: did the run diverge?")
        self.report.layers[name] = difference / size if size > 0 else difference
        self.report.lost[name] = difference / update if update > 0 else 0.0
        self.report.trained[name] = self.report.layers[name]
        if trained is not None and start is weight:
            exact, _ = self._folded(name, trained, wanted)
            self.report.trained[name] = _distance(merged, exact) / float(exact.norm().clamp(min=1e-30))
        return merged

    def _folded(self, name: str, start: Tensor, wanted: torch.dtype) -> tuple[Tensor, float]:
        """A weight with the adapter in it, and the norm of what was added."""
        tensors = {own: self.factors[f"{PREFIX}{name}.{own}"] for own in self.kind.file_names}
        wide = torch.promote_types(wanted, torch.float32)
        scale, transposed = self.adapter.scale(name), self._is_transposed(name, start)
        return self.kind.fold(tensors, scale, start, transposed, wide)  # type: ignore[misc]  # it has one

    def _entry(self, key: str) -> Entry:
        change = self.changes.get(key)
        source = change.source if change is not None else key
        if source is None:
            tensor = self.factors[change.saved]  # type: ignore[union-attr, index]
            like = Entry(tensor.dtype, tuple(tensor.shape))
        else:
            like = self.base.entries[source]
        floating = like.dtype.is_floating_point
        return Entry(self.dtype, like.shape) if self.dtype is not None and floating else like

    def _is_transposed(self, name: str, weight: Tensor) -> bool:
        """Whether the weight is stored ``(in, out)``: by its shape, and by the configuration where it is square."""
        out = self.factors[f"{PREFIX}{name}.lora_B.weight"].shape[0]
        if weight.shape[0] != weight.shape[1]:
            return weight.shape[0] != out
        if "transposed" in self.adapter.record:
            return name in self.transposed
        return bool(self.adapter.config.get("fan_in_fan_out"))


def _fitted(key: str, tensor: Tensor, wanted: torch.dtype, trained: bool = False) -> Tensor:
    """`tensor` in the dtype that is written; one of the base may hold an infinity of its own, a trained one not.

    Raises:
        MergeError: It is not finite in that dtype.
    """
    cast = tensor.to(wanted)
    if (trained or wanted != tensor.dtype) and not cast.isfinite().all():
        if not tensor.isfinite().all():
            if trained:
                raise MergeError(f"{key!r}: trained values are not finite: did the run diverge?")
        else:
            raise MergeError(
                f'{key!r}: values up to {tensor.abs().max():.3g} do not fit {wanted}: merge with dtype="bf16" or "fp32"'
            )
    return cast


def _repack(weight: Tensor, how: tuple[str, torch.dtype]) -> Tensor:
    """The fp32 values that training computed with: packed from the dtype that the model was loaded in."""
    return PackedWeight(weight.to(how[1]), how[0]).dequantize(torch.float32)


def _distance(first: Tensor, second: Tensor) -> float:
    return sum(_square(a.to(b.dtype) - b) for a, b in rows(first, second)) ** 0.5


def _square(difference: Tensor) -> float:
    return float(difference.double().square().sum())


def _check_written(part: Path, entries: Mapping[str, Entry]) -> None:
    """Open what was written and compare its headers with what it must be."""
    with TensorFolder(part) as written:
        if written.entries != dict(entries):
            raise MergeError(f"what was read back from {part} is not what was written: is the disk full or broken?")


def _say(name: str, number: int, count: int) -> None:
    _LOG.info("merged %s (%d of %d)", name, number, count)
