# SPDX-License-Identifier: Apache-2.0
"""`write_merged`: the merged model as a folder, written, loaded back and compared before it appears.

::

    folder/config.json, model.safetensors ...   what transformers' from_pretrained loads, or, for another
                                                module, model.safetensors alone: its plain state dict
    folder/merge_report.json                    errors of the merge, and that the folder is ours

The live model is not changed. The plain model is built empty (meta device) from a copy of the live one's
config and given the merged tensors, so that nothing of wrappers, packing or quantization settings is written.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora.bars import Bar, no_bar
from lightning_lora.errors import ConfigError, MergeError, Notice, UnsupportedError
from lightning_lora.io.atomic import atomic_folder, atomic_write
from lightning_lora.io.companions import copy_companions
from lightning_lora.io.folder import CONFIG, RECORD, package_version
from lightning_lora.io.merge import (
    LOGIT_LIMITS,
    MergeReport,
    check_limit,
    dense_dtype,
    merged_tensors,
    outputs_of,
    plain_module,
    relative_error,
    replaceable,
)
from lightning_lora.io.names import adapter_root, clean
from lightning_lora.model.inner import is_hf_model
from lightning_lora.model.slots import adapter_record, is_adapted
from lightning_lora.nn.adapter import torch_dtype
from lightning_lora.nn.quantized import PackedLinear
from lightning_lora.rng import preserve_rng

REPORT, STATE = "merge_report.json", "model.safetensors"

Inputs = Mapping[str, tuple[tuple, dict]]


def write_merged(
    model: nn.Module,
    dir: str | os.PathLike[str],
    dtype: str = "auto",
    inputs: Mapping[str, Sequence[Inputs]] | None = None,
    tokenizer: Any = None,
    notes: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
    bar: Bar = no_bar,
) -> MergeReport:
    """Write the model that `model` stands for, merged, without changing `model`.

    Args:
        model: A converted model, or a LightningModule around one.
        dir: The folder; one of ours that stands there is replaced, as a whole.
        dtype: "auto" (the base's own; a packed layer takes that of the dense ones), "fp32", "bf16" or "fp16".
        inputs: What to compare live and merged on: batches under what they are called, the first that runs is
            taken. A batch is, by name of a module inside the plain root ("" is the root), the ``(args, kwargs)``
            that it is called with. Without them a language model gets fixed token ids.
        tokenizer: Saved beside the model; without one, files in the base model's local folder are copied.
        notes: Further entries of ``merge_report.json``.
        max_shard_size: Bytes of a file of a transformers model, or a text such as "5GB".
        bar: Shows how many layers are merged.

    Returns:
        The report that was written.

    Raises:
        ConfigError: The model has no adapters.
        MergeError: The folder holds something else, or the merged model differs too much; nothing is written.
    """
    if not is_adapted(model):
        raise ConfigError("the model has no adapters to merge")
    check_target(dir)
    _, root = adapter_root(model)
    report = MergeReport()
    with atomic_folder(dir) as part, preserve_rng(), torch.no_grad():
        tensors = {}
        with bar("merging", len(list(root.parameters()))) as advance:
            for name, tensor in merged_tensors(model, dtype, report):
                tensors[name] = tensor
                advance(1)
        written = Counter(t.dtype for t in tensors.values() if t.is_floating_point()).most_common(1)[0][0]
        report.dtype = str(written).removeprefix("torch.")
        if is_hf_model(root):
            _write_transformers(root, part, tensors, written, max_shard_size)
            _save_tokenizer(root, part, tokenizer)
        else:
            save_file({name: t.clone() for name, t in tensors.items()}, part / STATE, metadata={"format": "pt"})
        del tensors
        _compare(root, part, inputs or {}, report)
        report.logit_limit = _limit(written, root)
        check_limit(report)
        entry = {"lightning_lora": package_version(), **(notes or {}), **report.to_dict()}
        (part / REPORT).write_text(json.dumps(entry, indent=2) + "\n")
    return report


def compare_folder(
    model: nn.Module,
    dir: str | os.PathLike[str],
    report: MergeReport,
    inputs: Mapping[str, Sequence[Inputs]] | None = None,
    tokenizer: Any = None,
    notes: Mapping[str, Any] | None = None,
    limited: bool = False,
) -> None:
    """Measure how far a merged folder that stands there is from the live model.

    Args:
        model: The live model.
        dir: The folder, of a transformers model; its ``merge_report.json`` is written anew.
        report: Of the merge; `logit_error` and `checked_on` are filled in.
        inputs: See `write_merged`.
        tokenizer: Saved beside the model.
        notes: Further entries of ``merge_report.json``.
        limited: Whether more than the limit of its dtype is an error.

    Raises:
        MergeError: It differs by more than that.
    """
    path, root = Path(dir), adapter_root(model)[1]
    with preserve_rng(), torch.no_grad():
        _compare(root, path, inputs or {}, report)
    if limited:
        report.logit_limit = _limit(getattr(torch, report.dtype), root)
        check_limit(report)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    entry = {"lightning_lora": package_version(), **report.to_dict(), **(notes or {})}
    with atomic_write(path / REPORT) as part:
        part.write_text(json.dumps(entry, indent=2) + "\n")


def check_target(dir: str | os.PathLike[str], argument: str = "dirpath") -> None:
    """See that a merged model may be written to `dir`: nothing is there, or an earlier one of ours.

    Args:
        dir: The folder.
        argument: What the user calls it.

    Raises:
        MergeError: It holds something else, or cannot be written.
    """
    path = Path(dir)
    if path.is_dir() and any(path.iterdir()):
        try:
            ours = "lightning_lora" in json.loads((path / REPORT).read_text())
        except (OSError, ValueError):
            ours = False
        if not ours:
            raise MergeError(
                f"`{argument}` {str(path)!r} is not empty and holds no earlier merged model: it is not overwritten. "
                "Choose another folder, or empty this one"
            )
    elif path.exists() and not path.is_dir():
        raise MergeError(f"`{argument}` {str(path)!r} is a file: choose another path")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise MergeError(
            f"`{argument}` {str(path)!r} cannot be made: {str(parent)!r} is not writable: choose another folder"
        )


def _write_transformers(
    root: nn.Module, part: Path, tensors: dict[str, Tensor], dtype: torch.dtype, max_shard_size: int | str
) -> None:
    """``save_pretrained`` of an empty plain model of the same class, with the merged tensors."""
    config: Any = copy.deepcopy(root.config)
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    plain = _skeleton(root, config)
    ends = _names_of(plain, "get_input_embeddings"), _names_of(plain, "get_output_embeddings")
    if getattr(config, "tie_word_embeddings", False) and ends[0] and ends[1]:
        first, second = tensors[ends[0]], tensors[ends[1]]
        if first is not second and not torch.equal(first, second):
            config.tie_word_embeddings = False  # trained apart: a tied load would drop one of them
            plain = _skeleton(root, config)
    plain.to(dtype)
    if getattr(root, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(root.generation_config)
    with _quiet():
        plain.save_pretrained(part, state_dict=tensors, max_shard_size=max_shard_size)  # type: ignore[operator]


def _skeleton(root: nn.Module, config: Any) -> nn.Module:
    """A plain model of the live one's class without values."""
    try:
        with torch.device("meta"):
            return type(root)(config)
    except TypeError as error:
        raise UnsupportedError(
            f"{type(root).__name__} cannot be built from its config alone ({error}), so no folder that "
            "`from_pretrained` loads can be written; fold the adapters in memory with `merge_adapters`"
        ) from error


def _names_of(model: nn.Module, getter: str) -> str | None:
    """The name of the weight of a model's input or output embeddings."""
    try:
        embeddings = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    found = (name for name, m in model.named_modules() if m is embeddings and getattr(m, "weight", None) is not None)
    name = next(found, None)
    return f"{name}.weight" if name is not None else None


def _save_tokenizer(root: nn.Module, part: Path, tokenizer: Any) -> None:
    """The tokenizer that was given, or the files beside the weights in the local folder that the base came from."""
    if tokenizer is not None:
        tokenizer.save_pretrained(part)
        return
    source = Path(str(getattr(root.config, "_name_or_path", "") or "\0"))
    with contextlib.suppress(ValueError):  # a name that is no path
        if (source / "config.json").is_file():
            copy_companions(source, part, (REPORT, CONFIG, RECORD))


def _compare(root: nn.Module, part: Path, inputs: Mapping[str, Sequence[Inputs]], report: MergeReport) -> None:
    """Load what was written and compare its outputs with the live model's, on the first inputs that both take."""
    merged = _load_transformers(root, part) if is_hf_model(root) else None
    problem = "no input was seen in training, and there is none for a model of its kind"
    choices = list(inputs.items())
    if merged is not None and (ids := _token_ids(root)) is not None:
        choices.append(("fixed token ids", [{"": ids}]))
    for name, batches in choices:
        try:
            if merged is not None:
                pairs = [_outputs(root, merged, batch[""]) for batch in batches if "" in batch]
            else:
                state = load_file(part / STATE) if batches else {}
                pairs = [
                    _outputs(unit, merged_unit, own)
                    for batch in batches
                    for unit, merged_unit, own in _units(root, state, batch)
                ]
        except Exception as error:  # the merge stands; what could not run here (a GPU kernel, say) is said
            problem = f"{name}: {error!r}"
            continue
        live, other = ([t for pair in pairs for t in pair[side]] for side in (0, 1))
        if live or other:
            report.logit_error, report.checked_on = relative_error(other, live), name
            return
        if pairs:
            problem = f"{name}: there are no floating outputs"
    warnings.warn(f"live and merged outputs could not be compared ({problem}): only weights were", Notice, stacklevel=3)


def _units(
    root: nn.Module, state: dict[str, Tensor], inputs: Inputs
) -> Iterator[tuple[nn.Module, nn.Module, tuple[tuple, dict]]]:
    """Live module, its plain copy with the written weights, and what to call both with."""
    for name, given in inputs.items():
        unit = root.get_submodule(name)
        plain = _unwrapped(copy.deepcopy(unit))
        prefix = f"{clean(name)}." if name else ""
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        plain.load_state_dict(own, assign=True)
        yield unit, plain, given


def _outputs(live: nn.Module, merged: nn.Module, given: tuple[tuple, dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Both models' outputs for the same input, which is brought to each one's device and dtype."""
    return outputs_of(live, _fitted(given, live)), outputs_of(merged, _fitted(given, merged))


def _fitted(given: tuple[tuple, dict], module: nn.Module) -> tuple[tuple, dict]:
    """`given` on the device and, where floating, in the dtype of a module's frozen weights.

    Under mixed precision a module was called with narrower activations than its weights.
    """
    device = next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    dtypes += [m.packed.source_dtype for m in module.modules() if isinstance(m, PackedLinear)]

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtypes[0] if dtypes and value.is_floating_point() else value.dtype)

    args, kwargs = given
    return tuple(fit(value) for value in args), {key: fit(value) for key, value in kwargs.items()}


def _load_transformers(root: nn.Module, part: Path) -> nn.Module:
    """The written folder through the model's own class.

    Raises:
        MergeError: Keys are missing or unexpected, or shapes differ.
    """
    name = "dtype" if hasattr(root.config, "dtype") else "torch_dtype"  # before transformers 4.56
    arguments: dict[str, Any] = {name: "auto", "local_files_only": True, "output_loading_info": True}
    attention = getattr(root.config, "_attn_implementation", None)
    if attention is not None:
        arguments["attn_implementation"] = attention
    with _quiet():
        merged, info = type(root).from_pretrained(part, **arguments)  # type: ignore[attr-defined]
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise MergeError(f"the merged folder does not load cleanly into {type(root).__name__}: {problems}")
    return merged.requires_grad_(False).to(next(root.parameters()).device)


def _unwrapped(module: nn.Module) -> nn.Module:
    """`module` with plain layers in place of adapters, in place."""
    dense = dense_dtype(module)
    done: set[int] = set()
    for names, adapter in replaceable(module):
        plain = plain_module(adapter, dense, done)
        if names == [""]:
            return plain
        for name in names:
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, plain)
    return module


def _token_ids(root: nn.Module) -> tuple[tuple, dict] | None:
    """A fixed batch ``(2, 16)`` of token ids for a model that reads such; None for another."""
    if getattr(root, "main_input_name", None) != "input_ids" or not hasattr(root, "get_input_embeddings"):
        return None
    size = getattr(root.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    if not size:
        return None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (2, 16), generator=generator)
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(root.config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids
    return (), kwargs


def _limit(written: torch.dtype, root: nn.Module) -> float:
    return max(LOGIT_LIMITS.get(dtype, 1e-4) for dtype in (written, *_live_dtypes(root)))


def _live_dtypes(root: nn.Module) -> set[torch.dtype]:
    """The dtypes that the live model computes in: a wider written one cannot be closer to it."""
    record = adapter_record(root)
    dtypes = {p.dtype for p in root.parameters() if not p.requires_grad and p.is_floating_point()}
    packed = any(isinstance(m, PackedLinear) for m in root.modules())
    if packed and record is not None and record.config.compute_dtype != "auto":
        dtypes.add(torch_dtype(record.config.compute_dtype))
    return dtypes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' own progress bars off for a moment, as they were after it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
