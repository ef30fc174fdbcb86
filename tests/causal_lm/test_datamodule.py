# SPDX-License-Identifier: Apache-2.0
"""`InstructionDataModule`: splits, rows, batches and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_lora import InstructionDataModule
from lightning_lora.errors import ConfigError, DataError
from small_base.data import MODEL_DIR, load_tokenizer
from tests.model.nets import notices

TOKENIZER = load_tokenizer()


def rows(n: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"question": f"what is {i}?", "answer": f"the number {i}" + " so" * (i % 7)} for i in range(start, start + n)
    ]


def made(train: Any, **arguments: Any) -> InstructionDataModule:
    data = InstructionDataModule(train, tokenizer=TOKENIZER, **arguments)
    notices(lambda: data.setup("fit"))
    return data


def texts(loader: DataLoader | list[Any]) -> list[str]:
    """What each row of a loader's batches says, padding left out, in order."""
    said = []
    for batch in loader:
        for ids in batch["input_ids"]:
            said.append(TOKENIZER.decode([int(i) for i in ids if int(i) != TOKENIZER.pad_token_id]))
    return said


def test_batches_are_padded_and_labelled() -> None:
    data = made(rows(20), batch_size=4)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    assert set(batches[0]) == {"input_ids", "labels", "attention_mask"}
    assert all(batch["input_ids"].shape == batch["labels"].shape for batch in batches)
    assert all((batch["input_ids"] == TOKENIZER.pad_token_id).equal(batch["attention_mask"] == 0) for batch in batches)
    assert len(texts(data.val_dataloader())) == 1


def test_split_is_of_what_examples_say_and_not_of_their_place() -> None:
    first = made(rows(40), validation_share=0.25)
    held = set(texts(first.val_dataloader()))
    assert len(held) == 10
    assert not held & set(texts(first.train_dataloader()))
    assert set(texts(made(rows(40)[::-1], validation_share=0.25).val_dataloader())) == held
    assert set(texts(made(rows(40), validation_share=0.25, seed=1).val_dataloader())) != held
    twice = made(rows(40) * 2, validation_share=0.25)
    assert not set(texts(twice.val_dataloader())) & set(texts(twice.train_dataloader()))
    assert len(texts(made(rows(40) * 2, validation_share=0.25, drop_duplicates=True).train_dataloader())) == 30


def test_validation_of_its_own_or_none() -> None:
    data = made(rows(8), validation=rows(3, start=8))
    assert len(texts(data.val_dataloader())) == 3
    assert len(texts(data.train_dataloader())) == 8
    assert made(rows(8), validation_share=0).val_dataloader() == []


@pytest.mark.parametrize("max_length", [24, 64])
def test_packed_rows_hold_every_token_that_rows_alone_hold(max_length: int) -> None:
    alone, packed = (made(rows(40), packing=p, max_length=max_length, validation_share=0) for p in (False, True))

    def tokens(data: InstructionDataModule) -> list[int]:
        batches = list(data.train_dataloader())
        pad = TOKENIZER.pad_token_id
        return sorted(int(i) for b in batches for i in b["input_ids"].flatten() if int(i) != pad)

    assert tokens(packed) == tokens(alone)
    learned = [sum(int((b["labels"] != -100).sum()) for b in data.train_dataloader()) for data in (alone, packed)]
    assert learned[0] == learned[1]
    if max_length == 64:
        assert len(packed.train_dataloader()) < len(alone.train_dataloader())


def test_problems_are_notices_and_stand_in_the_report() -> None:
    train = [{"question": f"{i}?", "answer": "no" if i < 18 else "yes"} for i in range(20)]
    data = InstructionDataModule([*train, {}], tokenizer=TOKENIZER, validation_share=0, on_malformed="skip")
    said = notices(lambda: data.setup("fit"))
    assert [text.split(":")[0] for text in said] == ["Training data"] * 3
    assert any("18 of 20 answers (90%) are 'no'" in text for text in said)
    assert data.report is not None
    assert data.report.malformed == 1
    more = made(train, validation_share=0, oversample=0.5)
    assert len(texts(more.train_dataloader())) == 18 + 9
    assert notices(lambda: more.setup("fit")) == []  # once


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n{\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        InstructionDataModule(str(path), tokenizer=TOKENIZER).setup("fit")


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(DataError, match="none has an answer within 4 tokens"):
        made(rows(8), max_length=4)
    with pytest.raises(DataError, match="cannot be split"):
        made(rows(1))


def test_length_is_the_tokenizers_or_said_to_be_more() -> None:
    data = InstructionDataModule([{"text": "word " * 3000}], tokenizer=str(MODEL_DIR), validation_share=0)
    notices(lambda: data.setup("fit"))
    assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == 256
    longer = InstructionDataModule(rows(8), tokenizer=TOKENIZER, max_length=512)
    assert any("more than the tokenizer's limit of 256" in text for text in notices(lambda: longer.setup("fit")))


def test_order_is_that_of_the_random_state() -> None:
    data = made(rows(20))
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        orders.append(texts(data.train_dataloader()))
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("validation_share", 1.0), ("oversample", 0.0), ("batch_size", 0), ("on_malformed", "warn")],
)
def test_wrong_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{argument}`"):
        InstructionDataModule([], **{argument: value})


def test_without_a_tokenizer_or_setup() -> None:
    with pytest.raises(ConfigError, match="give `tokenizer`"):
        InstructionDataModule(rows(8)).setup("fit")
    with pytest.raises(ConfigError, match="call `setup` first"):
        InstructionDataModule(rows(8)).train_dataloader()
