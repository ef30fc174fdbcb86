# SPDX-License-Identifier: Apache-2.0
"""`AdapterDiagnostics`: how much of its rank a run's adapters use, from their singular values."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.callbacks.place import run_folder
from lightning_lora.errors import ConfigError, Notice
from lightning_lora.io.atomic import atomic_write
from lightning_lora.model.diagnosis import Diagnosis
from lightning_lora.model.spectrum import adapter_spectra, base_norms, gradient_norms
from lightning_lora.strategies.state import AdapterStateMixin

#: Kinds of advice that are warned of at once; the others say nothing before the run is over.
WARNED = ("rank collapse", "wasted rank")
FILE, PLOT = "adapter_diagnostics.json", "adapter_diagnostics.png"


class AdapterDiagnostics(Callback):
    """Looks at the spectra of all adapters as training goes on, logs averages, and says where ranks are wasted.

    Everything comes from the r x r core of each adapter (see `Spectrum`), so a look at hundreds of layers takes about
    a second; the norms of the frozen weights are taken once. Training is the same with and without it, bit for bit.

    When ``fit`` ends, ``adapter_diagnostics.json`` (every module of the last look, the averages of all) and a heat map
    (with matplotlib) are written.

    Example::

        trainer = Trainer(callbacks=[LoRA(r=16), AdapterDiagnostics(every_n_steps=100)])

    Args:
        every_n_steps: Look after every so many optimizer steps; null for the end alone.
        dirpath: Folder for the two files; the logger's folder if null, or the Trainer's ``default_root_dir``.

    Raises:
        ConfigError: ``every_n_steps`` is no whole number above 0.
        AdapterMismatchError: At fit start, when the module has no low-rank adapters.
    """

    def __init__(self, every_n_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__()
        wrong = not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1
        if every_n_steps is not None and wrong:
            raise ConfigError(f"`every_n_steps` must be a whole number of 1 or more, or null: got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self.dirpath = dirpath
        #: Every look of this process, in order.
        self.history: list[Diagnosis] = []
        self._base: dict[str, float] = {}
        self._gradients: dict[str, tuple[float, float]] = {}
        self._said: set[str] = set()
        self._seen_step = 0

    @property
    def report(self) -> Diagnosis | None:
        """The newest look; None before the first."""
        return self.history[-1] if self.history else None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._base = base_norms(pl_module)
        adapter_spectra(pl_module)  # a module without adapters is refused now, and not after the run
        self.history, self._gradients, self._said = [], {}, set()
        self._seen_step = trainer.global_step

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        strategy = trainer.strategy
        step = trainer.global_step + 1
        if (step == trainer.max_steps or self._is_due(step - 1, step)) and isinstance(strategy, AdapterStateMixin):
            self._gradients = gradient_norms(pl_module, strategy.gradient)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._seen_step = self._seen_step, trainer.global_step
        if self._is_due(before, trainer.global_step):
            self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.history or self.history[-1].step != trainer.global_step:
            self._look(trainer, pl_module)
        where = run_folder(trainer, self.dirpath)  # on every rank: it is agreed on
        if trainer.is_global_zero:
            self._write(where)

    def _is_due(self, before: int, now: int) -> bool:
        """Accumulation repeats a step and several optimizers jump over some: due is a step that was passed."""
        n = self.every_n_steps
        return n is not None and now // n > before // n

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = Diagnosis(trainer.global_step, adapter_spectra(pl_module, self._base, self._gradients))
        self.history.append(found)
        self._gradients = {}
        for logger in trainer.loggers:
            logger.log_metrics(found.metrics(), step=trainer.global_step)
        for kind, advice in found.advice().items():
            if kind in WARNED and trainer.is_global_zero and kind not in self._said:
                self._said.add(kind)
                warnings.warn(f"AdapterDiagnostics at step {found.step}: {advice}", Notice, stacklevel=2)

    def _write(self, where: Path) -> None:
        where.mkdir(parents=True, exist_ok=True)
        values = {
            **self.history[-1].to_dict(),
            "history": [{"step": look.step, **look.metrics()} for look in self.history],
        }
        with atomic_write(where / FILE) as part:
            part.write_text(json.dumps(values, indent=2) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            from lightning_lora.reporting.diagnostics import plot_diagnostics

            with atomic_write(where / PLOT) as part:
                plot_diagnostics(self.history[-1]).savefig(part, format="png", dpi=120)
        told = [text for kind, text in self.history[-1].advice().items() if kind not in WARNED]
        rank_zero_info("\n".join([f"AdapterDiagnostics: {where / FILE}", *told]))
