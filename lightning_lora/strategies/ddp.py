# SPDX-License-Identifier: Apache-2.0
"""`AdapterDDPStrategy`: the whole model on every process; the frozen base is never sent from one to another.

`DistributedDataParallel` sends every parameter and buffer of rank 0 to the others when it is made, and every
buffer before each forward. Of an adapted model it gets to see what is trained, and sends that alone: adapters
and `modules_to_save` start equal on all ranks, as without LoRA. The base is compared in place of being sent.
"""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.errors import BaseMismatchError
from lightning_lora.model.fingerprint import digest
from lightning_lora.model.inner import clean_name
from lightning_lora.model.slots import adapter_modules, adapter_record
from lightning_lora.nn.saved import SavedModule
from lightning_lora.ranks import gather
from lightning_lora.strategies.state import AdapterStateMixin

_IGNORED = "_ddp_params_and_buffers_to_ignore"  # where torch looks for the names


class ReplicatedBaseMixin(AdapterStateMixin):
    """Put before a `DDPStrategy`: neither start nor forward nor backward sends anything of the frozen base."""

    def setup(self, trainer: Trainer) -> None:
        """Leave no trace on the module, which may be trained in full later."""
        module = self.lightning_module
        before = vars(module).get(_IGNORED)
        try:
            super().setup(trainer)
        finally:
            vars(module).pop(_IGNORED, None)
            if before is not None:
                vars(module)[_IGNORED] = before

    def model_to_device(self) -> None:
        """Keep the base from `DistributedDataParallel`, which is made next.

        Raises:
            BaseMismatchError: Some ranks hold another base than rank 0; every rank raises.
        """
        super().model_to_device()  # type: ignore[safe-super]
        module = self.lightning_module
        if module is None or adapter_record(module) is None or self.world_size == 1:
            return
        names = [*vars(module).get(_IGNORED, ()), *compare_bases(module, self.world_size)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


class AdapterDDPStrategy(ReplicatedBaseMixin, DDPStrategy):
    """`DDPStrategy` with adapter-only checkpoints, the base never sent; ``strategy="lora_ddp"``."""

    strategy_name = "lora_ddp"


def frozen_base(module: nn.Module) -> dict[str, Tensor]:
    """What stays as it is in training, by name: frozen parameters and buffers, packed ones among them.

    Left out are what is trained, the frozen originals of `modules_to_save` (a fresh head is another one in each
    process) and the root module's own buffers, where a LightningModule keeps running values of its own.
    """
    sent: set[int] = set()
    for _, adapter in adapter_modules(module):
        if isinstance(adapter, SavedModule):
            sent.update(map(id, (*adapter.parameters(), *adapter.buffers())))
        else:
            own = set(adapter.own_names()) - set(adapter.base_names())
            named = (*adapter.named_parameters(remove_duplicate=False), *adapter.named_buffers(remove_duplicate=False))
            tensors = {clean_name(name): tensor for name, tensor in named}  # inside wrappers of FSDP's
            sent.update(id(tensors[name]) for name in own)
    frozen: dict[str, Tensor] = {
        n: p for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    frozen |= {name: b for name, b in module.named_buffers(remove_duplicate=False) if "." in name}
    return {name: tensor for name, tensor in frozen.items() if id(tensor) not in sent}


def compare_bases(module: nn.Module, world_size: int) -> dict[str, Tensor]:
    """`compare_ranks` of a converted module that is still whole; gives its frozen base."""
    base = frozen_base(module)
    record = adapter_record(module)
    if world_size > 1 and record is not None:
        compare_ranks([(record.fingerprint or {}).get("digest"), digest(base.values())])
    return base


def compare_ranks(values: list[str | None]) -> None:
    """See that every rank has the same base.

    Args:
        values: Digests of this rank's base; None where it had no values (meta device).

    Raises:
        BaseMismatchError: On every rank, naming those that differ from rank 0.
    """
    everyone = gather(values)
    differing = [str(rank) for rank, found in enumerate(everyone) if found != everyone[0]]
    if differing:
        raise BaseMismatchError(
            f"rank{'s' * (len(differing) > 1)} {', '.join(differing)} of {len(everyone)} built another base than rank "
            "0, and the base is not sent between processes: load the same pretrained weights on every rank, or call "
            "`lightning.seed_everything` before the model is built; name modules that are to begin at random in "
            "`modules_to_save`"
        )
