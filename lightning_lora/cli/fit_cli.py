# SPDX-License-Identifier: Apache-2.0
"""`FitCLI`: a LightningCLI with the callbacks of this package at hand, each under a key of its own.

::

    model:       CausalLMModule, or any LightningModule by class_path
    data:        InstructionDataModule, or any LightningDataModule by class_path
    lora:        arguments of LoRA, which is there unless another method is named
    method:      callback of another method by class_path, such as IA3, with its arguments
    checkpoint:  of AdapterCheckpoint, unless trainer.enable_checkpointing is false; of ModelCheckpoint for a
                 method that leaves no adapter folder
    forgetting:  of ForgettingMonitor, which is there if it has tasks
    merge:       of MergeOnFitEnd, which is there if it has a dirpath
    trainer:     of the Trainer
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, LRSchedulerTypeTuple, instantiate_class
from torch.optim import Optimizer

from lightning_lora.callbacks.adapter_checkpoint import AdapterCheckpoint
from lightning_lora.callbacks.adapting import AdapterCallback
from lightning_lora.callbacks.forgetting_monitor import ForgettingMonitor
from lightning_lora.callbacks.lora import LoRA
from lightning_lora.callbacks.merge_on_fit_end import MergeOnFitEnd
from lightning_lora.errors import ConfigError
from lightning_lora.io.peft_types import has_folder
from lightning_lora.strategies.registry import register_strategies

#: Beside the defaults of the classes: 8 x 8 examples a step, seen twice (guides: 64 to 128, one to three times).
TRAINER_DEFAULTS = {"max_epochs": 2, "accumulate_grad_batches": 8}

_OWN = {"lora": LoRA, "checkpoint": AdapterCheckpoint, "forgetting": ForgettingMonitor, "merge": MergeOnFitEnd}
#: Arguments by which an optional callback is asked for.
_ASKS = {"forgetting": "tasks", "merge": "dirpath"}


class FitCLI(LightningCLI):
    """Parses a command line and makes model, data and Trainer; `fit` trains.

    An ``--optimizer`` is made when the Trainer asks for it: `LightningCLI` makes it from the parameters that there are
    before the model is loaded and has adapters.

    Args:
        args: The command line, or its values as a dict.
    """

    def __init__(self, args: Sequence[str] | dict[str, Any]) -> None:
        register_strategies()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=dict(TRAINER_DEFAULTS),
            parser_kwargs={
                "prog": "lightning-lora fit",
                "description": "Fine-tune a model by adapters.",
                "allow_abbrev": False,  # `--lora.rank` would be read as `--lora.rank_pattern`
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The callbacks' own groups, the optimizer's, and where to go on."""
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_lora.CausalLMModule"},
                "data": {"class_path": "lightning_lora.InstructionDataModule"},
            }
        )
        for key, callback in _OWN.items():
            skip = {_ASKS[key]} if key in _ASKS else set()
            if key in _ASKS:
                parser.add_argument(f"--{key}.{_ASKS[key]}", **_QUESTIONS[key])
            parser.add_class_arguments(callback, key, instantiate=False, skip=skip)
        parser.add_subclass_arguments(
            AdapterCallback, "method", required=False, help="Callback of another method than LoRA, by its import path."
        )
        parser.set_defaults({"checkpoint.monitor": "val_loss"})
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args(LRSchedulerTypeTuple)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="Checkpoint to go on from.")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning, without its notice that there is a command line too."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """As Lightning; an optimizer of the command line takes the place of the module's."""
        super().instantiate_classes()
        optimizer, scheduler = self.config_init.get("optimizer"), self.config_init.get("lr_scheduler")
        if scheduler and not optimizer:
            raise ConfigError("`lr_scheduler` needs `optimizer`: a module's own optimizer has its own schedule")
        if optimizer:
            configure = _configuring(optimizer.as_dict(), scheduler.as_dict() if scheduler else None)
            self.model.configure_optimizers = MethodType(configure, self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the callbacks that are asked for, `LoRA` first."""
        users = self.config_init["trainer"].get("callbacks") or []
        users = list(users) if isinstance(users, Iterable) else [users]
        own = list(self._own_callbacks())
        for callback in users:
            key = next((key for key, kind in _OWN.items() if isinstance(callback, kind)), None)
            if key is None and isinstance(callback, AdapterCallback):
                key = "method"
            if key == "method" or any(isinstance(other, type(callback)) for other in own):
                raise ConfigError(
                    f"`fit` adds {type(callback).__name__} itself: write its arguments under `{key}`, not `trainer`"
                )
        return super().instantiate_trainer(callbacks=[own[0], *users, *own[1:]], **kwargs)

    def fit(self) -> None:
        """Train."""
        self.trainer.fit(self.model, self.datamodule, ckpt_path=self.config["ckpt_path"])

    def _own_callbacks(self) -> Iterable[Callback]:
        method = self._method()
        for key, kind in _OWN.items():
            values = self.config_init[key].as_dict()
            if key == "lora" and method is not None:
                yield method
                continue
            if key in _ASKS and not values[_ASKS[key]]:
                continue
            if key == "checkpoint" and self.config_init["trainer"]["enable_checkpointing"] is False:
                continue
            if key == "checkpoint" and method is not None and not has_folder(method.config):
                kind = ModelCheckpoint
                del values["keep_last_n"]
            yield kind(**values)

    def _method(self) -> AdapterCallback | None:
        """The callback under ``method``; None for `LoRA` as ``lora`` has it."""
        method: AdapterCallback | None = self.config_init.get("method")
        if method is not None:
            own, plain = self.config["lora"].as_dict(), self.parser.get_defaults()["lora"].as_dict()
            given = [name for name in own if own[name] != plain[name]]
            if given:
                raise ConfigError(
                    f"`lora.{given[0]}` is given, and `method` {type(method).__name__}: a run has one method. Write "
                    "its arguments under `method.init_args`, and leave `lora` out"
                )
        return method


_QUESTIONS: dict[str, dict[str, Any]] = {
    "forgetting": {
        "type": str | dict[str, Any] | list[str | dict[str, Any]] | None,
        "default": None,
        "help": "lm-eval tasks, names or YAML files; nothing is measured without.",
    },
    "merge": {"type": str | None, "default": None, "help": "Folder of the merged model; none is written without."},
}


def _configuring(optimizer: dict[str, Any], scheduler: dict[str, Any] | None) -> Any:
    """A ``configure_optimizers`` that makes what the command line says, from the parameters of that moment."""

    def configure_optimizers(module: LightningModule) -> Any:
        made = instantiate_class([p for p in module.parameters() if p.requires_grad], optimizer)
        if scheduler is None:
            return made
        return LightningCLI.configure_optimizers(module, made, instantiate_class(made, scheduler))

    return configure_optimizers
