# SPDX-License-Identifier: Apache-2.0
"""`LoRA(init_lora_weights="eva")`: A from the run's own first batches, and the run is otherwise what it would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import MeanMetric

from lightning_lora import LoRA, ReplayMix
from lightning_lora.callbacks.first_batches import FirstBatches
from lightning_lora.errors import UnsupportedError
from lightning_lora.model.slots import adapter_modules
from lightning_lora.nn.linear import LoRALinear
from tests.helpers import LM, TinyNet, Tokens, loader, make_trainer


def factors(module: nn.Module) -> list[Tensor]:
    return [m.lora_A.detach().clone() for _, m in adapter_modules(module) if isinstance(m, LoRALinear)]


class Watched(LM):
    """Notes each batch and what A was then; counts in a metric; draws; has statistics."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(TinyNet(dropout=0.2))
        self.norm = nn.BatchNorm1d(4)
        self.mean = MeanMetric()
        self.seen: list[Tensor] = []
        self.first: list[Tensor] = []
        self.modes: list[bool] = []
        self.counted: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.mean.update(batch.float())
        self.norm(torch.rand(6, 4))
        self.log("mean", self.mean)
        self.modes.append(torch.is_grad_enabled())
        if torch.is_grad_enabled():
            self.seen.append(batch)
            self.counted.append(float(self.mean.compute()))
            if not self.first:
                self.first = factors(self)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def run(tmp_path: Path, init: str, kind: type[DataLoader] = DataLoader, **words: Any) -> tuple[Watched, L.Trainer]:
    module = Watched()
    callback = LoRA(r=4, init_lora_weights=init, modules_to_save=["norm"], **words)
    trainer = make_trainer(tmp_path, [callback, ReplayMix(Tokens(seed=9), share=0.4)], max_steps=3)
    torch.manual_seed(11)
    trainer.fit(module, kind(Tokens(), batch_size=4, shuffle=True))
    return module, trainer


@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
def test_the_run_begins_in_its_own_data_and_is_otherwise_the_same(kind: type[DataLoader], tmp_path: Path) -> None:
    eva, _ = run(tmp_path, "eva", kind, eva_batches=2)
    plain, _ = run(tmp_path, "kaiming", kind)
    assert eva.modes == [False] * 2 + [True] * 3
    assert all(torch.equal(a, b) for a, b in zip(eva.seen, plain.seen, strict=True))
    for A in eva.first:
        torch.testing.assert_close(A @ A.t(), torch.eye(4), rtol=1e-4, atol=1e-5)
    # The metric and the statistics have counted three steps, not five.
    assert eva.counted == plain.counted
    for mine, theirs in zip(eva.norm.trained.buffers(), plain.norm.trained.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_start_is_that_of_the_function_on_the_same_batches(tmp_path: Path) -> None:
    from lightning_lora import LoRAConfig, apply_lora, eva_start

    data = loader()
    module = LM(TinyNet())
    trainer = make_trainer(tmp_path, [LoRA(r=4, init_lora_weights="eva", eva_batches=3)], max_steps=1)
    trainer.fit(module, data)
    torch.manual_seed(0)
    own = TinyNet()
    own.load_state_dict(
        {n.replace("base_layer.", "").removeprefix("net."): p for n, p in module.state_dict().items() if "base" in n}
        | {n.removeprefix("net."): p for n, p in module.state_dict().items() if ".embed" in n or ".head" in n}
    )
    apply_lora(own, LoRAConfig(r=4))
    eva_start(own, [batch for _, batch in zip(range(3), data, strict=False)])
    for (name, mine), (_, theirs) in zip(adapter_modules(module.net), adapter_modules(own), strict=True):
        overlap = torch.linalg.svdvals(mine.lora_A.detach() @ theirs.lora_A.detach().t())
        assert overlap.min() > 0.9, name  # one step of the optimizer lies between


def test_a_resumed_run_and_a_second_fit_leave_A_alone(tmp_path: Path) -> None:
    module, trainer = run(tmp_path, "eva")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    A = factors(module)
    again = Watched()
    resumed = make_trainer(tmp_path, [LoRA(r=4, init_lora_weights="eva", modules_to_save=["norm"])], max_steps=4)
    resumed.fit(again, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert all(again.modes)
    assert all(torch.equal(a, b) for a, b in zip(again.first, A, strict=True))
    module.modes.clear()
    second = make_trainer(tmp_path, [LoRA(r=4, init_lora_weights="eva", modules_to_save=["norm"])], max_steps=1)
    second.fit(module, loader())
    assert module.modes == [True]
    started = Watched()
    first = make_trainer(
        tmp_path,
        [LoRA(r=4, init_lora_weights="eva", modules_to_save=["norm"], init_from=str(tmp_path / "a.ckpt"))],
        max_steps=1,
    )
    first.fit(started, loader())
    assert started.modes == [True]


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.left = iter(Tokens())

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Tensor:
        return next(self.left)


class ByHand(LM):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__(TinyNet())
        self.automatic_optimization = False


def test_loaders_and_modules_that_cannot_be_looked_at_are_named(tmp_path: Path) -> None:
    def fails(match: str, module: LM, data: Any) -> None:
        trainer = make_trainer(tmp_path, [LoRA(r=4, init_lora_weights="eva")], max_steps=1)
        with pytest.raises(UnsupportedError, match=match):
            trainer.fit(module, data)

    fails("optimizes by hand", ByHand(), loader())
    fails("its data passes once only", LM(TinyNet()), DataLoader(Stream(), batch_size=4))
    fails("and the run has a list", LM(TinyNet()), [loader(), loader()])


def test_workers_and_generators_are_where_they_were(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    data = DataLoader(Tokens(), batch_size=4, shuffle=True, generator=generator, num_workers=1, persistent_workers=True)

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before = generator.get_state(), torch.get_rng_state()
            first = FirstBatches(trainer, pl_module, 2)
            self.batches = list(first)
            assert torch.equal(generator.get_state(), before[0])
            assert torch.equal(torch.get_rng_state(), before[1])
            assert len(self.batches) == 2

    look = Look()
    module = Watched()
    make_trainer(tmp_path, [LoRA(r=4, modules_to_save=["norm"]), look], max_steps=2).fit(module, data)
    assert sum(torch.equal(a, b) for a in look.batches for b in module.seen) <= 2
