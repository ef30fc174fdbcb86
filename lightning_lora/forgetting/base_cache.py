# SPDX-License-Identifier: Apache-2.0
"""The base's answers on disk: asked once, used by later looks and later runs over the same base.

One file for each identity of what answered::

    base-<digest of the identity>.json
        {"version": 1, "identity": {...}, "sha256": of the next line}
        {"<digest of the tokens asked>": [log-likelihood, greedy], ...}

The identity says everything that could change an answer but for the question itself: the base's fingerprint and its
tensors as they stand, quantization, dtypes, device, attention, forward. The question is tokens, which hold item,
prompt, chat template and tokenizer; in 16 bits it is the tokens of the whole batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lora.errors import CheckpointError, WriteError
from lightning_lora.forgetting.asking import Answer
from lightning_lora.io.atomic import atomic_write
from lightning_lora.ranks import notice, rank_and_world

VERSION = 1

#: Environment variable with the folder of the caches, for runs that name none.
PLACE = "LIGHTNING_LORA_BASE_CACHE"

#: By how much an answer asked again may differ from the one in the file [nats]: with logits in 32 bits, in 16 bits.
AGREES = {True: 1e-3, False: 0.05}


def cache_folder(given: str | Path | None) -> Path | None:
    """Where the caches lie: what was given, else what the environment says, else nowhere."""
    place = given if given is not None else os.environ.get(PLACE)
    return Path(place).expanduser() if place else None


def question(row: Sequence[int], continuation: Sequence[int], batch: str = "") -> str:
    """The key of a question.

    Args:
        row: what the model was given.
        continuation: the tokens asked about, of which all but the last end ``row``.
        batch: digest of everything else in the batch, where answers depend on it.
    """
    return digest_of([batch, list(row), list(continuation)])[:32]


def digest_of(value: Any) -> str:
    """SHA-256 of a value in primitives."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class BaseCache:
    """Answers of one base.

    The first rank reads and writes the file; what it read is to be given to all.

    Args:
        folder: where the file lies or will lie.
        identity: what answers, in primitives.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.identity = dict(identity)
        self.path = folder / f"base-{digest_of(self.identity)[:32]}.json"
        #: Whether some answers of the file have been asked again and were the same.
        self.trusted = False
        self._new: dict[str, Answer] = {}
        self.answers: dict[str, Answer] = {}

    def read(self) -> dict[str, Answer]:
        """What the file holds; nothing on other ranks than the first."""
        return self._read() if rank_and_world()[0] == 0 else {}

    def take(self, answers: Mapping[str, Answer]) -> None:
        """Believe what the first rank read, until some of it has been asked again."""
        self.answers = dict(answers)

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Take answers in; those that are no numbers (a diverged base) are left out."""
        self._new.update({key: answer for key, answer in answers.items() if math.isfinite(answer[0])})
        self.answers.update(self._new)

    def distrust(self, difference: float) -> None:
        """Drop what the file held: asked again, the base answered otherwise.

        Args:
            difference: by how much [nats].
        """
        notice(
            f"{self.path} does not fit this base: answers asked again differ by {difference:.3g} nats. The file is "
            f"not used, and is written anew."
        )
        self.answers.clear()
        self.trusted = True

    def save(self) -> None:
        """Write new answers beside the old ones. That it cannot be written is no reason to end a run."""
        new, self._new = self._new, {}
        if not new or rank_and_world()[0] != 0:
            return
        beside = self._read() if self.trusted else {}  # another run may have written since
        answers = json.dumps({**beside, **self.answers})
        head = {"version": VERSION, "identity": self.identity, "sha256": hashlib.sha256(answers.encode()).hexdigest()}
        try:
            with atomic_write(self.path) as part:
                part.write_text(f"{json.dumps(head)}\n{answers}\n", encoding="utf-8")
        except (WriteError, CheckpointError, OSError) as error:
            notice(f"The base's answers were not kept for later runs: {error}")

    def _read(self) -> dict[str, Answer]:
        try:
            head, answers = self.path.read_text(encoding="utf-8").splitlines()
            said = json.loads(head)
            if said["version"] != VERSION or said["identity"] != json.loads(json.dumps(self.identity)):
                raise ValueError("it is of another version or another base")
            if said["sha256"] != hashlib.sha256(answers.encode()).hexdigest():
                raise ValueError("its digest does not fit")
            return {key: (float(value), bool(greedy)) for key, (value, greedy) in json.loads(answers).items()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notice(
                f"{self.path} is damaged and not used ({type(error).__name__}: {error}); the base is asked again, and "
                f"the file is written anew."
            )
            return {}
