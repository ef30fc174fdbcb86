# SPDX-License-Identifier: Apache-2.0
"""`ReplayMix`: a share of general batches among those of the run's own data, whatever brings them."""

from __future__ import annotations

import importlib
from fractions import Fraction
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset, default_collate
from typing_extensions import override

from lightning_lora.errors import ConfigError, UnsupportedError
from lightning_lora.forgetting.arguments import check_counts, check_real, check_seed
from lightning_lora.io.mixed_loader import Replay, is_general, mixed
from lightning_lora.io.resumable import resumable


class ReplayMix(Callback):
    """Puts batches of general data among the run's own: what is seen again is forgotten less.

    The train loader, from a DataModule, a LightningModule or given to ``fit``, is read as it would be, and general
    batches stand between its batches at even distances, each taken by ``training_step`` as any other. Nothing is
    drawn for it: the run's random state is untouched, and a run that is resumed sees the batches that an uncut one
    sees wherever its own loader goes on exactly: a plain `DataLoader` does. Where the own loader begins its epoch anew
    (an iterable data set without a state), the general batches still go on. Under several processes each reads general
    batches of its own.

    An epoch still sees each of the run's own batches once: with ``share=0.1`` it is a ninth longer.

    Example::

        trainer = Trainer(callbacks=[LoRA(r=16), ReplayMix(general, share=0.05)])

    Args:
        data: What is replayed, with items like those of the run's data set: a data set with indices, a `DataLoader`
            over one (its batch size and collate function are used, its order is not), or the import path of such
            an object or of a function without arguments that gives it.
        share: Of all batches, how many are general, in [0, 1).
        batch_size: Items in a general batch; None for ``data``'s own or else as many as in the run's own batches.
        seed: Of the order in which general items come.

    Raises:
        ConfigError: A value is out of range, or the data cannot be found or is empty.
        UnsupportedError: The data has no indices; there are several train loaders, or one that cannot be mixed into.
    """

    def __init__(self, data: Any, share: float = 0.05, batch_size: int | None = None, seed: int = 0) -> None:
        super().__init__()
        check_real("share", share, below=1.0)
        check_counts(none_too=True, batch_size=batch_size)
        check_seed(seed)
        self.data = data
        self.share = share
        self.batch_size = batch_size
        self.seed = seed
        self._share = Fraction(0)
        self._replay: Replay | None = None
        self._strategy: Any = None
        self._taken = 0  # general batches that training has seen
        self._loader: Any = None
        self._epochs, self._place = 0, 0  # of the loader: which iterator, and which batch of it comes next

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()
        if stage != "fit" or self.share == 0:
            return
        source = _found(self.data)
        share = self._share = Fraction(self.share).limit_denominator(1_000_000)
        self._replay, strategy = None, trainer.strategy
        self._taken = self._epochs = 0

        def process_dataloader(dataloader: object) -> object:
            # The class is asked anew: `LoRA` may have extended it since.
            dataloader = type(strategy).process_dataloader(strategy, dataloader)
            if not trainer.training:
                return dataloader
            if self._replay is None:
                self._replay = self._stream(source, dataloader, trainer)
                self._replay.taken = self._taken  # of a checkpoint, whether or not the loader has a place in it too
            # `LoRA`'s strategies keep a plain loader's place themselves; in a run without adapters nobody does.
            own = resumable(dataloader)
            self._loader, self._epochs = mixed(own, self._replay, share, rewinds=own is not dataloader), 0
            return self._loader

        # Where a strategy may put its own loader in, Lightning lets every train loader pass, wherever it came from.
        vars(strategy)["process_dataloader"] = process_dataloader
        self._strategy = strategy

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaders = torch.utils._pytree.tree_leaves(trainer.train_dataloader)
        if self._strategy is not None and len(loaders) != 1:
            raise UnsupportedError(
                f"ReplayMix mixes into one train loader, and this run has {len(loaders)}: put the general data among "
                f"them yourself, with Lightning's `CombinedLoader`."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # The stream itself may be ahead: Lightning reads a batch early where it cannot know which is the last.
        if self._loader is None:
            return
        if self._loader.epochs != self._epochs:
            self._epochs, self._place = self._loader.epochs, self._loader.began_at
        self._taken += is_general(self._place, self._share)
        self._place += 1

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._taken = int(state_dict["taken"])

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        if self._strategy is not None:
            vars(self._strategy).pop("process_dataloader", None)
        self._strategy = self._loader = None

    def _stream(self, source: Any, loader: Any, trainer: Trainer) -> Replay:
        dataset, size, collate = source, self.batch_size, None
        if isinstance(source, DataLoader):
            dataset, collate = source.dataset, source.collate_fn
            size = size or _batch_size(source)
        size = size or _batch_size(loader)
        if size is None:
            raise ConfigError(
                f"ReplayMix cannot tell how many items a batch of {type(loader).__name__} holds: give `batch_size`."
            )
        shares: dict[str, Any] = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        return Replay(
            dataset,
            size,
            collate or getattr(loader, "collate_fn", None) or default_collate,
            self.seed,
            shares.get("rank", 0),
            shares.get("num_replicas", 1),
        )


def _found(data: Any) -> Any:
    """The data set or loader that ``data`` is or names."""
    found = data
    if isinstance(data, str):
        home, _, name = data.replace(":", ".").rpartition(".")
        try:
            found = getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"`data`={data!r} is not the import path of a data set or function: {error}.") from error
    if callable(found):
        found = found()
    dataset = found.dataset if isinstance(found, DataLoader) else found
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UnsupportedError(
            f"ReplayMix needs general data with `__len__` and `__getitem__`, to take any of it at any time: got "
            f"{type(dataset).__name__}."
        )
    if len(dataset) == 0:
        raise ConfigError("ReplayMix has no general data: `data` is empty.")
    return found


def _batch_size(loader: Any) -> int | None:
    own = getattr(loader, "batch_size", None)
    return own or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
