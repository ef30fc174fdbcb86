# SPDX-License-Identifier: Apache-2.0
"""Write an adapter folder, a checkpoint or LitGPT's folder as one that another program loads."""

from __future__ import annotations

from typing import Any

from lightning_lora.cli import output
from lightning_lora.cli.model_arguments import ADAPTER

#: What the page of help begins with.
USAGE = "ADAPTER OUT --base BASE [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("out", help="folder to write; an adapter that stands there is replaced")
    parser.add_argument("--base", required=True, help="folder or name of the base model: it is loaded")
    parser.add_argument("--layout", default=None, help="peft, or portable: one scale and rank, for every server")
    parser.add_argument("--target", default=None, help="peft, vllm, sglang, tgi, llama.cpp or all: it must load there")
    parser.add_argument("--max_rank", type=int, default=None, help="the server's --max-lora-rank, if not its default")
    parser.add_argument("--cast", default=None, help="dtype of what is written: fp32, bf16 or fp16; unchanged if null")
    parser.add_argument("--dtype", default="auto", help="of the base: auto (as stored), fp32, bf16 or fp16")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(
    adapter: str,
    out: str,
    base: str,
    layout: str | None,
    target: str | None,
    max_rank: int | None,
    cast: str | None,
    dtype: str,
    quiet: bool,
    json: bool,
) -> bool:
    """Write the folder; whether the target would not load what could be written, of which then nothing is."""
    from lightning_lora.bars import no_bar, terminal_bar
    from lightning_lora.cli.models import is_whole_model, read_models
    from lightning_lora.errors import ConfigError
    from lightning_lora.io.adapter import save_adapter
    from lightning_lora.io.atomic import atomic_folder
    from lightning_lora.io.folder import check_target
    from lightning_lora.io.loaders import LOADERS, ValidationReport, validate_adapter

    if target is not None and target not in (*LOADERS, "all"):
        raise ConfigError(f"`target` must be one of {[*LOADERS, 'all']}, got {target!r}")
    if layout not in (None, "peft", "portable"):
        raise ConfigError(f'`layout` must be "peft" or "portable", got {layout!r}')
    if is_whole_model(adapter):
        raise ConfigError(f"{adapter} is a whole model, no adapter")
    layout = layout or ("portable" if target not in (None, "peft") else "peft")
    report: ValidationReport | None = None
    with output.work(json or quiet):
        check_target(out)
        models = read_models(base, adapter, dtype, None, "cpu", no_bar if json or quiet else terminal_bar)
        try:
            with atomic_folder(out) as part:
                saved = save_adapter(models.tuned, part, layout, cast)
                if target is not None:
                    report = validate_adapter(part, target, max_rank, base if _is_folder(base) else None)
                    if not report.ok:
                        raise _Refused
        except _Refused:
            saved = None
    checked = None if report is None else ValidationReport(out, report.loaders)
    values: dict[str, Any] = {
        "path": out if saved else None,
        "layout": layout,
        "tensors": saved.tensors if saved else None,
        "nbytes": saved.nbytes if saved else None,
        "delta_error": saved.delta_error if saved else None,
        "loaders": checked.to_dict()["loaders"] if checked else None,
    }
    text = (
        f"{out}: {saved.tensors} tensors, {saved.nbytes:,} bytes, {layout} layout" if saved else f"{out}: not written"
    )
    output.show(f"{text}\n{checked}" if checked else text, values, json)
    return saved is None


class _Refused(Exception):
    """The target would not load the folder."""


def _is_folder(base: str) -> bool:
    from pathlib import Path

    return (Path(base).expanduser() / "config.json").is_file()
