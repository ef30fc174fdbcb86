# SPDX-License-Identifier: Apache-2.0
"""`validate_adapter`: will PEFT, vLLM, SGLang, TGI and llama.cpp load an adapter folder, and scale it rightly?

One and the same ``adapter_config.json`` is read in five ways::

    peft        lora_alpha / r, or / sqrt(r) with use_rslora, r and lora_alpha by module (patterns)
    vllm, tgi   lora_alpha / r, or / sqrt(r) with use_rslora, the same for all modules
    sglang      lora_alpha / r, the same for all modules, whatever use_rslora says
    llama.cpp   lora_alpha / (rank of the tensor),  whatever use_rslora says

What each does with which kind of folder is data: a `Rule` finds something in a folder, a `Loader` says what it
does with it. What is found and not in a loader's table is no problem for that loader.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.config import scaling
from lightning_lora.errors import CheckpointError, ConfigError
from lightning_lora.io.atomic import recover
from lightning_lora.io.folder import CONFIG, RECORD, WEIGHTS, AdapterFolder, check_words, identity_of, read_json
from lightning_lora.io.loader_rules import RULES, Facts, Loader

#: What "ok" does not say.
NOT_JUDGED = "not judged: whether a server knows the base's architecture and takes adapters on these of its modules"


@dataclass(frozen=True)
class Problem:
    """One reason why a loader does not do what the adapter was trained to do.

    Args:
        rule: Name of the rule, a key of `RULES`.
        reason: What the folder holds and what the loader does with it.
        remedy: What to do.
    """

    rule: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.reason}. {self.remedy[:1].upper()}{self.remedy[1:]}."


@dataclass(frozen=True)
class ValidationReport:
    """What `validate_adapter` found, by loader.

    Args:
        path: The folder.
        loaders: By name of the loader, its problems; none is ok.
    """

    path: str
    loaders: dict[str, list[Problem]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every loader that was asked for takes the folder as it is."""
        return not any(self.loaders.values())

    @property
    def problems(self) -> list[Problem]:
        """Every loader's problems in one list."""
        return [problem for problems in self.loaders.values() for problem in problems]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON's primitives."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [f"{self.path}:"]
        for name, problems in self.loaders.items():
            lines.append(f"  {name}: {'no' if problems else 'ok'}")
            lines += [f"    - {problem}" for problem in problems]
        if set(self.loaders) - {"peft"}:
            lines.append(f"  {NOT_JUDGED}")
        return "\n".join(lines)


def validate_adapter(
    dir: str | os.PathLike[str],
    target: str = "vllm",
    max_rank: int | None = None,
    base_dir: str | os.PathLike[str] | None = None,
) -> ValidationReport:
    """Say whether programs will load an adapter folder as it was trained, and if not, why and what to do.

    Nothing but the folder's JSON files and the names and shapes of its tensors is read.

    Args:
        dir: The folder, PEFT's or ours.
        target: "peft", "vllm", "sglang", "tgi" or "llama.cpp"; "all" for each of them.
        max_rank: What the server's ``--max-lora-rank`` is; its default if null.
        base_dir: Folder of the base model; with it the number of its layers and its tied embeddings count too.

    Returns:
        Problems by loader; ``report.ok`` without any. Whether a server knows the base's architecture, and takes
        adapters on modules of these names there, is not judged.

    Raises:
        ConfigError: No such target.
        CheckpointError: No adapter folder, or one that cannot be read.
    """
    if target != "all" and target not in LOADERS:
        raise ConfigError(f"`target` must be one of {[*LOADERS, 'all']}, got {target!r}")
    folder = _open(dir)
    base = read_json(Path(base_dir) / "config.json") if base_dir is not None else {}
    facts = Facts(folder, folder.shapes(), base.get("text_config", base), max_rank)
    names = list(LOADERS) if target == "all" else [target]
    try:
        return ValidationReport(str(dir), {name: _problems(facts, name) for name in names})
    except re.error as error:
        raise CheckpointError(f"{folder.path / CONFIG} has a pattern that is no regular expression: {error}") from error


def _problems(facts: Facts, name: str) -> list[Problem]:
    loader, found = LOADERS[name], []
    for rule_name, does in loader.does.items():
        rule = RULES[rule_name]
        finding = rule.find(facts, loader)
        if finding is not None:
            what, remedy = finding if isinstance(finding, tuple) else (finding, rule.remedy)
            found.append(Problem(rule_name, f"{what}: {name} {does}", remedy))
    return found


def _open(dir: str | os.PathLike[str]) -> AdapterFolder:
    """A folder with whatever method in it: what cannot be loaded here may load elsewhere."""
    path = Path(dir)
    recover(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no adapter folder at {path}")
    config = read_json(path / CONFIG)
    check_words(config, str(path / CONFIG))
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path} has no {WEIGHTS}; pickles (.bin) are not opened: save it as safetensors")
    config = {key: value for key, value in config.items() if value is not None}
    record = read_json(path / RECORD) if (path / RECORD).exists() else {}
    return AdapterFolder(path, config, record, identity_of(path))


def _scale_peft(folder: AdapterFolder, name: str, rank: int) -> float:
    return folder.scale(name)


def _scale_global(folder: AdapterFolder, name: str, rank: int) -> float:
    return scaling(folder.spec.r, folder.spec.lora_alpha, bool(folder.config.get("use_rslora")))


def _scale_plain(folder: AdapterFolder, name: str, rank: int) -> float:
    return folder.spec.lora_alpha / folder.spec.r


def _scale_tensor(folder: AdapterFolder, name: str, rank: int) -> float:
    return folder.spec.lora_alpha / rank


_EVERY = {
    "incomplete": "refuses it or runs without it",
    "names": "does not find the layer",
}
_SERVERS = {
    "method": "loads LoRA only",
    **_EVERY,
    "whole_module": "does not find the layers",
    "experts": "reads these tensors otherwise or not at all",
    "convolutions": "adapts linear layers only",
    "base_changed": "adds the update to the unchanged base",
    "extensions": "does not read it",
}

LOADERS: dict[str, Loader] = {
    "peft": Loader(
        _scale_peft,
        {
            "no_type": "has no such method",
            **_EVERY,
            "prefix": "takes them for missing and only warns",
            "whole_module": "finds them over the whole module alone, not over the transformers model",
        },
    ),
    "vllm": Loader(
        _scale_global,
        {
            **_SERVERS,
            "fields": "refuses it",
            "dora": "refuses it",
            "modules_to_save": "refuses it",
            "bias": "refuses it",
            "token_rows": "refuses it",
            "rank": "refuses it",
            "scale": "has one scale for all modules",
        },
        max_rank=16,
    ),
    "sglang": Loader(
        _scale_plain,
        {
            **_SERVERS,
            "fields": "refuses it",
            "dora": "does not compute it",
            "modules_to_save": "leaves them out",
            "bias": "leaves them out",
            "token_rows": "leaves them out",
            "regex": "takes a list of names only",
            "rank": "refuses it",
            "siblings": "refuses it in older versions, which stack them",
            "scale": "has one scale, lora_alpha / r, for all modules",
        },
    ),
    "tgi": Loader(
        _scale_global,
        {
            **_SERVERS,
            "prefix": "does not find them",
            "dora": "leaves the magnitudes out",
            "modules_to_save": "leaves them out",
            "bias": "leaves them out",
            "embeddings": "leaves it out",
            "token_rows": "leaves them out",
            "rank_step": "pads it and divides the scale of all but the first kind of layer by the padded one",
            "rank_span": "has kernels up to 128",
            "uniform_rank": "stacks the layers and fails",
            "layers": "leaves out a kind of layer that is not adapted everywhere",
            "base_name": "cannot compare the bases",
            "scale": "has one scale for all modules",
        },
    ),
    "llama.cpp": Loader(
        _scale_tensor,
        {
            **_SERVERS,
            "dora": "stops at the magnitudes",
            "modules_to_save": "stops at full weights",
            "bias": "stops at biases",
            "token_rows": "stops at them",
            "tied_head": "has no such tensor and stops",
            "base_name": "needs --base FOLDER to convert it",
            "scale": "scales by lora_alpha over each tensor's rank, and nothing else",
        },
    ),
}
