# SPDX-License-Identifier: Apache-2.0
"""Companions: the files of a model folder beside its weights and its configuration.

Tokenizers, processors and the model's own code have files of many names (``source.spm``, ``bpe.codes``,
``modeling_own.py``), so what is left out is named, not what is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

#: How files with weights, or with the state of a training, end.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx", ".onnx_data", ".tflite",
    ".npz", ".npy", ".pkl", ".lora", ".index.json",
)  # fmt: skip
_OTHERS = ("config.json", "README.md")  # written anew; of the base alone
_FOLDERS = ("additional_chat_templates",)


def copy_companions(source: Path, part: Path, leave: Collection[str] = ()) -> None:
    """Copy tokenizer, processor, generation settings, chat templates, own code and licence of a model.

    Args:
        source: The model's folder.
        part: Where to; a file that stands there is left as it is.
        leave: Further names that are not copied.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _FOLDERS and not (part / path.name).exists():
            shutil.copytree(path, part / path.name, copy_function=shutil.copyfile)
        left = path.name.startswith(".") or path.name.endswith(_WEIGHTS) or path.name in (*_OTHERS, *leave)
        if path.is_file() and not left and not (part / path.name).exists():
            shutil.copyfile(path, part / path.name)
