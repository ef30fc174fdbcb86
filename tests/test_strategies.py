# SPDX-License-Identifier: Apache-2.0
"""The adapter strategies: their names, what they refuse, and that a killed process leaves whole files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry

from lightning_lora import (
    AdapterDDPStrategy,
    AdapterSingleDeviceStrategy,
    AdapterStateMixin,
    LoRA,
    LoRAConfig,
    adapter_state_dict,
    apply_lora,
)
from lightning_lora.errors import CheckpointError, ConfigError, Notice, UnsupportedError
from lightning_lora.strategies.checkpoint_io import AtomicCheckpointIO
from lightning_lora.strategies.ddp import ReplicatedBaseMixin
from lightning_lora.strategies.registry import attach, register_strategies
from tests.helpers import LM, TinyNet, loader, make_trainer


def test_names_are_registered_once() -> None:
    register_strategies()
    assert {"lora", "lora_ddp"} <= set(StrategyRegistry.available_strategies())


@pytest.mark.parametrize(
    ("strategy", "kind"), [("lora", AdapterSingleDeviceStrategy), ("lora_ddp", AdapterDDPStrategy)]
)
def test_by_name(strategy: str, kind: type, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy=strategy)
    assert type(trainer.strategy) is kind
    assert trainer.strategy.root_device == torch.device("cpu")
    assert trainer.world_size == 1


def test_one_device_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='`strategy="lora"` runs on one device, got `devices=2`; use "lora_ddp"'):
        make_trainer(tmp_path, strategy="lora", devices=2)


def test_a_users_strategy_gets_the_behaviour_once() -> None:
    class Mine(SingleDeviceStrategy):
        def mine(self) -> int:
            return 7

    strategy = Mine("cpu")
    attach(strategy)
    kind = type(strategy)
    assert isinstance(strategy, AdapterStateMixin)
    assert strategy.mine() == 7
    assert kind.__name__ == "AdapterMine"
    attach(strategy)
    assert type(strategy) is kind


class Unheard(Strategy):
    """A strategy from elsewhere: one CPU process, nothing of Lightning's own kinds."""

    root_device = torch.device("cpu")
    is_global_zero, global_rank, local_rank, node_rank, world_size = True, 0, 0, 0, 1

    def model_to_device(self) -> None:
        pass

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def barrier(self, name: str | None = None) -> None:
        pass

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        return tensor


def test_an_unknown_strategy_gives_a_notice_and_plain_behaviour(tmp_path: Path) -> None:
    module, strategy = LM(TinyNet()), Unheard()
    trainer = make_trainer(tmp_path, [LoRA(r=4)], strategy=strategy)
    with pytest.warns(Notice, match="`Unheard` is a strategy that `LoRA` does not know: adapters are trained, and its"):
        trainer.fit(module, loader())
    assert type(strategy) is Unheard
    assert all(float(t.abs().sum()) > 0 for t in adapter_state_dict(module).values())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    whole = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert whole["state_dict"].keys() == module.state_dict().keys()
    again = make_trainer(tmp_path, [LoRA(r=4)], strategy=Unheard(), max_steps=6)
    with pytest.warns(Notice, match="does not know"):
        again.fit(LM(TinyNet()), loader(), ckpt_path=tmp_path / "x.ckpt")
    assert again.global_step == 6


def test_a_class_that_begins_with_no_strategy_is_refused() -> None:
    class Mixin:
        """Of the user's."""

    class Mine(Mixin, DDPStrategy):
        """Of the user's too."""

    text = r"`Mine` begins with `Mixin`, which is no strategy.*write `class Mine\(ReplicatedBaseMixin, ...\)`, from"
    with pytest.raises(UnsupportedError, match=text):
        attach(Mine())

    class Written(ReplicatedBaseMixin, Mixin, DDPStrategy):
        """As the message says."""

    attach(Written())


def test_spawn_is_refused() -> None:
    strategy = DDPStrategy(start_method="spawn")
    strategy.cluster_environment = L.fabric.plugins.environments.LightningEnvironment()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._configure_launcher()
    with pytest.raises(UnsupportedError, match='starts its processes by spawn or fork.*Use `strategy="ddp"`'):
        attach(strategy)


def test_strategy_without_adapters(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="lora")
    trainer.fit(LM(TinyNet()), loader())
    with pytest.raises(CheckpointError, match="saves and loads adapters, and the module has none: add the"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")


def test_strategy_without_the_callback(tmp_path: Path) -> None:
    class Own(LM):
        def configure_model(self) -> None:
            if not adapter_state_dict(self):
                apply_lora(self, LoRAConfig(r=2))

    module = Own(TinyNet())
    trainer = make_trainer(tmp_path, strategy="lora")
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"].keys() == adapter_state_dict(module).keys()
    make_trainer(tmp_path, strategy="lora", max_steps=6).fit(Own(module.net), loader(), ckpt_path=tmp_path / "x.ckpt")


class TestWriter:
    def test_lightnings_writer_becomes_atomic(self) -> None:
        strategy = AdapterSingleDeviceStrategy("cpu")
        assert type(strategy.checkpoint_io) is AtomicCheckpointIO
        strategy.checkpoint_io = TorchCheckpointIO()
        assert type(strategy.checkpoint_io) is AtomicCheckpointIO

    def test_asynchronous_writer_is_kept_over_the_atomic_one(self) -> None:
        writer = AsyncCheckpointIO()
        strategy = AdapterSingleDeviceStrategy("cpu", checkpoint_io=writer)
        assert strategy.checkpoint_io is writer
        inner = writer.checkpoint_io
        assert type(inner) is AtomicCheckpointIO
        assert strategy.checkpoint_io.checkpoint_io is inner  # not another one at each look

    def test_the_users_writer_is_left_alone(self) -> None:
        class Mine(TorchCheckpointIO):
            pass

        writer = Mine()
        assert AdapterSingleDeviceStrategy("cpu", checkpoint_io=writer).checkpoint_io is writer
        wrapped = AsyncCheckpointIO(Mine())
        assert type(AdapterSingleDeviceStrategy("cpu", checkpoint_io=wrapped).checkpoint_io.checkpoint_io) is Mine

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "deep" / "x.ckpt"
        AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
        with pytest.raises(Exception, match="(?i)pickle"):
            AtomicCheckpointIO().save_checkpoint({"a": lambda: 0}, path)
        assert torch.load(path) == {"a": 1}
        assert os.listdir(path.parent) == ["x.ckpt"]

    def test_storage_options_go_to_lightnings_own(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="storage_options"):
            AtomicCheckpointIO().save_checkpoint({}, tmp_path / "x.ckpt", storage_options={"a": 1})


SAVING = """
import sys, torch
from tests.helpers import LM, TinyNet, loader, make_trainer
from lightning_lora import LoRA
trainer = make_trainer(sys.argv[1], [LoRA(r=64)], max_steps=1)
trainer.fit(LM(TinyNet()), loader())
print("saving", flush=True)
while True:
    trainer.save_checkpoint(sys.argv[1] + "/x.ckpt")
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with subprocess.Popen(
        [sys.executable, "-c", SAVING, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as process:
        assert process.stdout is not None
        while b"saving" not in process.stdout.readline():
            assert process.poll() is None
        while not path.exists():
            time.sleep(0.01)
        for _ in range(20):  # whole at any moment
            assert len(torch.load(path, weights_only=True)["state_dict"]) == 4
            time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
    assert len(torch.load(path, weights_only=True)["state_dict"]) == 4
    trainer = make_trainer(tmp_path, [LoRA(r=64)], max_steps=1)
    trainer.fit(LM(TinyNet()), loader())
    trainer.save_checkpoint(path)  # clears up what the killed process left
    assert os.listdir(tmp_path) == ["x.ckpt"]


def test_random_state_of_the_run_is_not_moved_by_validation(tmp_path: Path) -> None:
    class Draws(LM):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(5)
            super().validation_step(batch, batch_idx)

    ends = []
    for val in (None, loader(8)):
        torch.manual_seed(0)
        module = Draws(TinyNet(dropout=0.2))
        torch.manual_seed(1)
        trainer = make_trainer(tmp_path, [LoRA(r=4, lora_dropout=0.1)], max_steps=8, val_check_interval=2)
        trainer.fit(module, loader(), val)
        ends.append({name: t.clone() for name, t in adapter_state_dict(module).items()})
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
