# SPDX-License-Identifier: Apache-2.0
"""`InstructionDataModule`: files of instructions, questions, completions, conversations or text, ready to train on."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_lora.causal_lm.checks import DataReport, look_at, oversampled
from lightning_lora.causal_lm.collate import Collate, Row
from lightning_lora.causal_lm.encoding import Encoded, Encoder, Template, TooLong
from lightning_lora.causal_lm.formats import Example, Format, Reading, read_examples
from lightning_lora.causal_lm.packing import pack
from lightning_lora.errors import ConfigError, DataError, MissingDependencyError, Notice
from lightning_lora.ranks import rank_and_world

_LONGEST = 2048  # tokens of an example, where neither the user nor the tokenizer says less

_SKIP, _ERROR = "skip", "error"


class InstructionDataModule(pl.LightningDataModule):
    """Reads data, looks at it, and makes batches in which answers are learned and prompts are not.

    A batch is a dict for `CausalLMModule`: ``input_ids``, ``labels``, and ``attention_mask`` or ``position_ids``
    (see `causal_lm.collate`). What was found in the data stands in `report` and is printed once; what should be
    looked at is a notice each.

    Example::

        data = InstructionDataModule("train.jsonl", tokenizer="base/", batch_size=8)
        trainer.fit(CausalLMModule("base/"), data)

    Args:
        train: File, folder, or a list of files, folders and records; the formats are those of `causal_lm.formats`.
        validation: The same for validation; without one `validation_share` of `train` is held out.
        validation_share: Share of the training examples that is held out; 0 for no validation. Examples that say the
            same fall on the same side, and an example's side does not depend on its place in the file.
        format: Which format the records have; "auto" tells it by their fields.
        tokenizer: Folder, name or object of the tokenizer; that of the LightningModule if null.
        template: Whether instructions and questions are rendered by the tokenizer's chat template ("chat"), by a fixed
            text ("plain"), or by the template where there is one ("auto").
        chat_template: Jinja text to use in place of the tokenizer's template.
        max_length: Tokens of an example, and of a packed row; the tokenizer's limit, at most 2048, if null.
        packing: Whether rows are filled with several examples that do not see one another. The model is asked before
            the first step whether it keeps them apart, and refused by name if it does not.
        mask_prompts: Whether only answers are learned.
        batch_size: Rows of a batch, a process. Guides want 64 or more examples a step, by accumulation.
        num_workers: Worker processes of a loader.
        oversample: Repeat examples of rare answers until each answer has this share of the most frequent one's
            number, in (0, 1]; null for as they are. Only where the answers are classes.
        drop_duplicates: Whether an example that says what an earlier one says is left out.
        on_malformed: What is done with a record that cannot be read: "error" or "skip".
        on_too_long: What is done with an example of more tokens: "cut" its end off, "drop" it, or "error". A text is
            cut into as many pieces as it takes.
        seed: Chooses what is held out.

    Raises:
        ConfigError: An argument has no such value.
        DataError: A record is malformed (with file and line), or nothing is left to train on.
    """

    def __init__(
        self,
        train: str | list[str | dict[str, Any]],
        validation: str | list[str | dict[str, Any]] | None = None,
        validation_share: float = 0.05,
        format: Format = "auto",
        tokenizer: Any = None,
        template: Template = "auto",
        chat_template: str | None = None,
        max_length: int | None = None,
        packing: bool = False,
        mask_prompts: bool = True,
        batch_size: int = 8,
        num_workers: int = 0,
        oversample: float | None = None,
        drop_duplicates: bool = False,
        on_malformed: str = _ERROR,
        on_too_long: TooLong = "cut",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0.0 <= validation_share < 1.0:
            raise ConfigError(f"`validation_share` must be in [0, 1), got {validation_share!r}")
        if oversample is not None and not 0.0 < oversample <= 1.0:
            raise ConfigError(f"`oversample` must be null or in (0, 1], got {oversample!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"`batch_size` must be an integer of at least 1, got {batch_size!r}")
        if on_malformed not in (_SKIP, _ERROR):
            raise ConfigError(f'`on_malformed` must be "error" or "skip", got {on_malformed!r}')
        self.train, self.validation, self.validation_share = train, validation, validation_share
        self.format, self.template, self.chat_template = format, template, chat_template
        self.max_length, self.packing, self.mask_prompts = max_length, packing, mask_prompts
        self.batch_size, self.num_workers = batch_size, num_workers
        self.oversample, self.drop_duplicates = oversample, drop_duplicates
        self.on_malformed, self.on_too_long, self.seed = on_malformed, on_too_long, seed
        self._given_tokenizer = tokenizer
        self.tokenizer: Any = None
        self.report: DataReport | None = None
        self._train_rows: Rows | None = None
        self._validation_rows: Rows | None = None

    def setup(self, stage: str) -> None:
        """Read, encode and look at the data, once; every process makes the same rows."""
        if self._train_rows is not None:
            return
        self.tokenizer = self._tokenizer()
        length = self._length()
        encoder = Encoder(
            self.tokenizer, length, self.mask_prompts, self.template, self.chat_template, self.on_too_long
        )
        read = self._read(self.train)
        train = (
            list({e.key: e for e in reversed(read.examples)}.values())[::-1] if self.drop_duplicates else read.examples
        )
        if self.validation is not None:
            held_out = self._read(self.validation).examples
        else:
            train, held_out = _split(train, self.validation_share, self.seed)
        encoded = _encode(encoder, train, "training", shows_bars(self))
        self.report = look_at(train, encoded, held_out, len(read.problems), self.drop_duplicates)
        if not self.report.examples:
            raise DataError(f"no training example is left: of {len(train)} none has an answer within {length} tokens")
        rank_zero_info(f"Training data: {self.report}")
        if rank_and_world()[0] == 0:
            for problem in self.report.problems():
                warnings.warn(f"Training data: {problem}", Notice, stacklevel=2)
        order = range(len(train)) if self.oversample is None else oversampled(train, self.oversample)
        self._train_rows = self._rows([part for index in order for part in encoded[index]], length)
        validated = _encode(encoder, held_out, "validation", shows_bars(self))
        self._validation_rows = self._rows([part for parts in validated for part in parts], length)

    def train_dataloader(self) -> DataLoader:
        """Shuffled; a plain loader, whose place in the epoch `LoRA`'s strategies keep."""
        return self._loader(self._train_rows, shuffle=True)

    def val_dataloader(self) -> DataLoader | list[Any]:
        """In the order of the data; an empty list without a validation."""
        return self._loader(self._validation_rows) if self._validation_rows else []

    def _loader(self, rows: Rows | None, shuffle: bool = False) -> DataLoader:
        if rows is None:
            raise ConfigError("InstructionDataModule: call `setup` first, or give it to a Trainer")
        pad = next(t for t in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if t is not None)
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            collate_fn=Collate(pad, self.packing),
        )

    def _rows(self, parts: Sequence[Encoded], length: int) -> Rows:
        if not self.packing:
            return Rows([[part] for part in parts])
        return Rows([[parts[index] for index in row] for row in pack([len(part) for part in parts], length)])

    def _read(self, source: str | Path | Sequence[str | Path | Mapping[str, Any]]) -> Reading:
        return read_examples(source, self.format, self.on_malformed == _SKIP)

    def _tokenizer(self) -> Any:
        given = self._given_tokenizer
        if given is None and self.trainer is not None:
            given = getattr(self.trainer.lightning_module, "tokenizer", None)
        if given is None:
            raise ConfigError("InstructionDataModule: give `tokenizer`; the LightningModule has none")
        if not isinstance(given, str | Path):
            return given
        return load_tokenizer(given)

    def _length(self) -> int:
        limit = getattr(self.tokenizer, "model_max_length", None) or _LONGEST
        if self.max_length is None:
            return min(int(limit), _LONGEST)
        if self.max_length > limit:
            warnings.warn(
                f"`max_length={self.max_length}` is more than the tokenizer's limit of {limit} tokens: the model may "
                "not know so many positions",
                Notice,
                stacklevel=2,
            )
        return self.max_length


class Rows(Dataset):
    """Rows of encoded examples by number.

    Args:
        rows: One example each, or several where they are packed.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a folder or a name.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "a tokenizer by name needs `transformers`, which is not installed: pip install 'lightning-lora[hf]'"
        ) from error
    return AutoTokenizer.from_pretrained(name)


def shows_bars(owner: pl.LightningModule | pl.LightningDataModule) -> bool:
    """Whether progress bars are wanted: on the first process, unless the Trainer has none."""
    try:
        trainer = owner.trainer
    except RuntimeError:  # a module without one
        trainer = None
    return rank_and_world()[0] == 0 and (trainer is None or trainer.progress_bar_callback is not None)


def _encode(encoder: Encoder, examples: Sequence[Example], what: str, bar: bool) -> list[list[Encoded]]:
    off = None if bar else True  # None: in a terminal only
    shown = tqdm(examples, desc=f"tokens of {what}", delay=2, leave=False, disable=off)
    return [encoder.encode(example) for example in shown]


def _split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """What is trained on and what is held out, by a digest of what an example says."""
    if share == 0.0:
        return list(examples), []
    keys = [_digest(example, seed) for example in examples]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataError(
            f"{len(distinct)} example cannot be split: give `validation`, or set `validation_share` to 0 for none"
        )
    count = min(max(1, math.floor(share * len(distinct) + 0.5)), len(distinct) - 1)
    held = set(distinct[:count])
    train = [example for example, key in zip(examples, keys, strict=True) if key not in held]
    return train, [example for example, key in zip(examples, keys, strict=True) if key in held]


def _digest(example: Example, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{example.key}".encode()).digest()
