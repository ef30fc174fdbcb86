# SPDX-License-Identifier: Apache-2.0
"""Say what an adapter is: its configuration, its base, how large and how full each update is, who loads it.

Singular values come from the r x r core of each module. Of a folder it also says which programs load it as it was
trained, and where not, why and what to do.
"""

from __future__ import annotations

from typing import Any

from lightning_lora.cli import output

#: What modules can be ordered by, the worst first, and whether the largest is the worst.
WORST = {
    "relative_update": True,
    "norm": True,
    "dead_ranks": True,
    "condition": True,
    "stable_rank": False,
    "name": False,
}


#: What the page of help begins with.
USAGE = "DIR [options]"


def add_arguments(parser: Any) -> None:
    """The command's own arguments."""
    parser.add_argument("dir", help="adapter folder, of this package or of PEFT, or a run's checkpoint")
    parser.add_argument("--target", default="all", help="peft, vllm, sglang, tgi, llama.cpp or all")
    parser.add_argument("--max_rank", type=int, default=None, help="the server's --max-lora-rank, if not its default")
    parser.add_argument("--base", default=None, help="folder of the base: gives |dW|/|W|, layers and tied embeddings")
    parser.add_argument("--sort", default="name", help=f"the worst first, by {', '.join(WORST)}")
    parser.add_argument("--limit", type=int, default=20, help="modules to show, 0 for all; JSON has every one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(dir: str, target: str, max_rank: int | None, base: str | None, sort: str, limit: int, json: bool) -> bool:
    """Print what was found; whether a program has a problem with the folder."""
    from lightning_lora.errors import ConfigError, UnsupportedError
    from lightning_lora.io.adapter_facts import AdapterFacts, adapter_facts
    from lightning_lora.io.loaders import LOADERS, validate_adapter
    from lightning_lora.model.diagnosis import Diagnosis

    if sort not in WORST:
        raise ConfigError(f"`sort` must be one of {', '.join(WORST)}, got {sort!r}")
    if limit < 0:
        raise ConfigError(f"`limit` must be 0 or more, got {limit}")
    if target not in (*LOADERS, "all"):
        raise ConfigError(f"`target` must be one of {[*LOADERS, 'all']}, got {target!r}")
    note = ""
    try:
        facts = adapter_facts(dir, base)
    except UnsupportedError as error:  # a method that is not built here may be known elsewhere
        facts, note = AdapterFacts(False, {}, None, None, {}, [], 0), f"{error}"
    report = None if facts.checkpoint else validate_adapter(dir, target, max_rank, base)
    diagnosis = Diagnosis(facts.step or 0, facts.modules)
    told = diagnosis.to_dict()
    values = {
        "path": dir,
        "kind": "checkpoint" if facts.checkpoint else "folder",
        "config": facts.config,
        "fingerprint": facts.fingerprint,
        "step": facts.step,
        "parameters": facts.parameters,
        "saved": facts.saved,
        "note": note,
        **{key: told[key] for key in ("metrics", "advice", "modules")},
        **({} if report is None else report.to_dict()),
    }
    parts = [note or _head(dir, facts), _modules(facts.modules, sort, limit), *diagnosis.advice().values()]
    last: Any = report or "A checkpoint is loaded by no server: write it with `lightning-lora export` first."
    output.show("\n\n".join(str(part) for part in (*parts, last) if part), values, json)
    return report is not None and not report.ok


def _head(dir: str, facts: Any) -> str:
    """What it is, in a few lines."""
    config, print_ = facts.config, facts.fingerprint
    where = f" at step {facts.step:,}" if facts.step is not None else ""
    ranks = sorted({s.r for s in facts.modules.values()})
    rank = "" if not ranks else f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    start = config.get("init_lora_weights")
    known = ("lora_alpha", "use_rslora", "quantize", "lora_dropout")
    lines = [
        f"{dir}: {'checkpoint' if facts.checkpoint else 'adapter folder'}{where}, "
        f"{_kind(facts)}, {facts.parameters:,} parameters",
        ", ".join(
            filter(
                None,
                [
                    "DoRA" * bool(config.get("use_dora")),
                    "LoRA-FA" * bool(config.get("freeze_lora_A")),
                    "" if start in (True, None, "kaiming", "gaussian") else f"begun by {start}",
                    rank,
                    *(f"{key} {config[key]}" for key in known if config.get(key) is not None),
                ],
            )
        ),
    ]
    if facts.saved:
        lines.append(f"trained in full: {', '.join(facts.saved)}")
    if print_:
        lines.append(
            f"base: {print_.get('base')}, fingerprint {print_['digest'][:16]} over {print_['tensors']} tensors"
        )
    elif config.get("base_model_name_or_path"):
        lines.append(f"base: {config['base_model_name_or_path']}, without a fingerprint")
    return "\n".join(lines)


def _kind(facts: Any) -> str:
    return facts.title if facts.title != "LoRA" else f"{len(facts.modules)} low-rank modules"


def _modules(found: dict[str, Any], sort: str, limit: int) -> str:
    """The table of modules, or nothing."""
    if not found:
        return ""
    rows = list(found.items())
    if sort != "name":
        sign = -1.0 if WORST[sort] else 1.0
        rows.sort(key=lambda row: key if (key := sign * getattr(row[1], sort)) == key else float("inf"))
    shown = rows[: limit or None]
    common = _common([name for name, _ in rows])
    header = ("module", "r", "|dW|", "|dW|/|W|", "stable rank", "effective rank", "condition", "dead")
    cells = [
        (
            name.removeprefix(common), str(s.r), f"{s.norm:.3g}", _number(s.relative_update), _number(s.stable_rank),
            _number(s.effective_rank), _number(s.condition), str(s.dead_ranks),
        )
        for name, s in shown
    ]  # fmt: skip
    keep = [i for i in range(len(header)) if i != 3 or any(row[3] != "-" for row in cells)]
    text = output.table([header[i] for i in keep], [[row[i] for i in keep] for row in cells])
    left = f"\n... and {len(rows) - len(shown)} more: --limit 0 shows all" if len(shown) < len(rows) else ""
    return f"{f'modules of {common}' if common else ''}\n{text}{left}".lstrip("\n")


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.3g}"


def _common(names: list[str]) -> str:
    """What every name begins with, up to a dot."""
    import os

    shared = os.path.commonprefix(names)
    return shared[: shared.rfind(".") + 1] if len(names) > 1 else ""
