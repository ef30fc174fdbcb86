# SPDX-License-Identifier: Apache-2.0
"""Where callbacks write what they found: one folder a run, beside its logs."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer, dirpath: str | Path | None = None) -> Path:
    """The folder that was asked for; else the logger's, else the Trainer's ``default_root_dir``.

    Addresses of remote stores, which loggers and Lightning's checkpoints may have, are passed over: these files are
    local. Every rank asks, and all get rank 0's answer.

    Args:
        trainer: As it runs.
        dirpath: What the user gave; None for the default.
    """
    if dirpath is not None:
        return Path(dirpath)
    places = (trainer.log_dir, trainer.default_root_dir)
    return Path(next((place for place in places if place and "://" not in str(place)), "."))
