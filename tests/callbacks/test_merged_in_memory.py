# SPDX-License-Identifier: Apache-2.0
"""A model into which adapters were merged in memory gets none: what they learned would count twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_lora import LoRA, LoRAConfig, apply_lora, load_adapter, merge_adapters, save_adapter
from lightning_lora.errors import AlreadyAdaptedError, BaseMismatchError
from tests.helpers import LM, TinyNet, loader, make_trainer


def test_training_and_resume_are_refused(tmp_path: Path) -> None:
    module = LM(TinyNet())
    make_trainer(tmp_path, [LoRA(r=4)]).fit(module, loader())
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    save_adapter(module, tmp_path / "adapter")
    merge_adapters(module)
    match = "adapters were merged into 2 layers of the model in memory, 'net.first' first: .* count twice"
    trainer = make_trainer(tmp_path, [LoRA(r=4)])
    with pytest.raises(AlreadyAdaptedError, match=match):
        trainer.fit(module, loader())
    with pytest.raises(AlreadyAdaptedError, match=match):
        trainer.test(module, loader(8), ckpt_path=tmp_path / "x.ckpt", verbose=False)
    with pytest.raises(AlreadyAdaptedError, match=match):
        apply_lora(module, LoRAConfig(r=4))
    with pytest.raises((AlreadyAdaptedError, BaseMismatchError)):
        load_adapter(module, tmp_path / "adapter")


def test_a_merged_model_is_tested_as_it_is(tmp_path: Path) -> None:
    module = LM(TinyNet())
    make_trainer(tmp_path, [LoRA(r=4)]).fit(module, loader())
    merge_adapters(module)
    keys = module.state_dict().keys()
    make_trainer(tmp_path, [LoRA(r=4)]).test(module, loader(8), verbose=False)
    assert module.state_dict().keys() == keys
