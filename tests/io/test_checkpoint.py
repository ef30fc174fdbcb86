# SPDX-License-Identifier: Apache-2.0
"""What stands in the checkpoints that runs write, and how it is read back."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    AdapterCheckpoint,
    LoRA,
    LoRAConfig,
    adapter_state_dict,
    apply_lora,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
    set_adapter_scale,
)
from lightning_lora.errors import (
    AdapterMismatchError,
    AlreadyAdaptedError,
    BaseMismatchError,
    CheckpointError,
    Notice,
)
from lightning_lora.io.checkpoint import KEY, VERSION, load_state, metadata
from lightning_lora.io.checkpoint_file import write_checkpoint
from lightning_lora.model.slots import adapter_modules
from tests.helpers import LM, TinyNet, loader, make_trainer, random_adapters, tiny_llama

LIGHTNING_KEYS = {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops"}
TRAINING_KEYS = LIGHTNING_KEYS | {"callbacks", "optimizer_states", "lr_schedulers"}
ENTRY_KEYS = {"version", "config", "targets", "saved", "fingerprint", "strength", "digests"}


class Net(LM):
    """Always the same base; hyperparameters as people keep them."""

    def __init__(self, lr: float = 1e-2, late: bool = False, seed: int = 0) -> None:
        super().__init__(None, lr, build_late=True)
        self.save_hyperparameters()
        self.late, self.seed = late, seed
        if not late:
            self._build()

    def configure_model(self) -> None:
        if self.net is None:
            self._build()

    def _build(self) -> None:
        torch.manual_seed(self.seed)
        self.net = TinyNet()


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def nbytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def assert_adapter_only(path: Path, module: nn.Module) -> dict[str, Any]:
    """Every key of a checkpoint is known, and its file is no larger than what belongs in it."""
    checkpoint = torch.load(path, weights_only=True)
    training = "optimizer_states" in checkpoint
    assert checkpoint.keys() - {"hparams_name", "hyper_parameters"} == (
        TRAINING_KEYS if training else LIGHTNING_KEYS
    ) | {KEY}
    assert checkpoint["state_dict"].keys() == adapter_state_dict(module).keys()
    assert checkpoint[KEY].keys() == ENTRY_KEYS | ({"rng"} if training else set())
    trained = sum(1 for p in module.parameters() if p.requires_grad)
    for state in checkpoint.get("optimizer_states", []):
        assert len(state["state"]) <= trained
        assert sum(len(group["params"]) for group in state["param_groups"]) == trained
    wanted = tensors_in([checkpoint["state_dict"], checkpoint.get("optimizer_states", [])])
    known = sum(t.numel() for t in tensors_in([checkpoint[KEY], checkpoint["loops"]]))
    everything = tensors_in(checkpoint)
    scores = sum(t.numel() for t in tensors_in(checkpoint.get("callbacks", {})) if t.dim() == 0)
    assert sum(t.numel() for t in everything) == sum(t.numel() for t in wanted) + known + scores  # no other tensors
    assert path.stat().st_size <= 1.05 * nbytes(wanted) + 1000 * len(everything) + 200_000
    return checkpoint


class SaveEverywhere(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / "inside.ckpt")
        trainer.save_checkpoint(self.folder / "inside_weights.ckpt", weights_only=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "validation.ckpt")


@pytest.mark.parametrize("strategy", ["auto", "lora", "ddp", "lora_ddp"])
@pytest.mark.parametrize(
    "lora", [{}, {"quantize": "nf4"}, {"modules_to_save": ["head"]}], ids=["dense", "nf4", "modules_to_save"]
)
def test_every_checkpoint_of_a_run_holds_adapters_only(lora: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    module = Net()
    savers: list[L.Callback] = [
        LoRA(r=4, **lora),
        ModelCheckpoint(tmp_path, filename="top-{step}", monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(tmp_path, filename="step-{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(
            tmp_path, filename="weights-{step}", every_n_train_steps=4, save_top_k=-1, save_weights_only=True
        ),
        AdapterCheckpoint(tmp_path, filename="adapter-{step}", every_n_train_steps=4, save_top_k=-1),
        SaveEverywhere(tmp_path),
    ]
    trainer = make_trainer(tmp_path, savers, strategy=strategy, max_steps=8, val_check_interval=2)
    trainer.fit(module, loader(), loader(8))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    trainer.save_checkpoint(tmp_path / "after_weights.ckpt", weights_only=True)
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert len(paths) >= 12
    kinds = {"optimizer_states" in assert_adapter_only(path, module) for path in paths}
    assert kinds == {True, False}
    keys = {f"net.{layer}.adapter.lora_{factor}" for layer in ("first", "second") for factor in "AB"}
    saved = {"net.head.trained.weight"} if "modules_to_save" in lora else set()
    assert adapter_state_dict(module).keys() == keys | saved
    whole = module.state_dict()  # the user's own stays whole
    assert {"net.embed.weight", "net.first.base_layer.bias"} <= whole.keys()


def test_averaged_weights_are_adapters_too(tmp_path: Path) -> None:
    def fit(steps: int, ckpt: Path | None = None) -> Net:
        module = Net()
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6)
        callbacks = [LoRA(r=4), EMAWeightAveraging(decay=0.5), saver]
        make_trainer(tmp_path, callbacks, max_steps=steps).fit(module, loader(24), ckpt_path=ckpt)
        return module

    module = fit(6)
    checkpoint = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    own = adapter_state_dict(module)
    assert checkpoint["state_dict"].keys() == checkpoint["current_model_state"].keys() == own.keys()
    assert checkpoint["averaging_state"].keys() == {"n_averaged"}
    assert not any(torch.equal(checkpoint["state_dict"][n], t) for n, t in checkpoint["current_model_state"].items())
    known = tensors_in([checkpoint[k] for k in ("state_dict", "current_model_state", "optimizer_states", "loops", KEY)])
    assert sum(t.numel() for t in tensors_in(checkpoint)) < sum(t.numel() for t in known) + 20
    whole, resumed = fit(12), fit(12, tmp_path / "step=6.ckpt")
    assert all(torch.equal(t, adapter_state_dict(resumed)[n]) for n, t in adapter_state_dict(whole).items())


def test_hyperparameters_that_hold_the_model_stay_out(tmp_path: Path) -> None:
    class Given(LM):
        def __init__(self, net: nn.Module, lr: float = 1e-2) -> None:
            super().__init__(net, lr)
            self.save_hyperparameters()

    net = TinyNet()
    module = Given(copy.deepcopy(net))
    trainer = make_trainer(tmp_path, [LoRA(r=4)])
    trainer.fit(module, loader())
    with pytest.warns(Notice, match=r"hyperparameters \['net'\] are modules and are not written"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert_adapter_only(tmp_path / "x.ckpt", module)
    assert "net" in module.hparams
    again = load_from_checkpoint(Given, tmp_path / "x.ckpt", net=net)
    assert torch.equal(again(torch.arange(8)[None]), module(torch.arange(8)[None]))


def train(tmp_path: Path, module: LM | None = None, **lora: Any) -> tuple[LM, Path]:
    module = module or Net()
    trainer = make_trainer(tmp_path, [LoRA(r=4, **lora)])
    trainer.fit(module, loader())
    path = tmp_path / "run.ckpt"
    trainer.save_checkpoint(path)
    return module.eval(), path


class TestLoadFromCheckpoint:
    @pytest.mark.parametrize("late", [False, True])
    @pytest.mark.parametrize("lora", [{}, {"quantize": "nf4"}, {"modules_to_save": ["head"]}], ids=str)
    def test_gives_the_trained_module(self, lora: dict[str, Any], late: bool, tmp_path: Path) -> None:
        module, path = train(tmp_path, Net(lr=0.02, late=late), **lora)
        again = load_from_checkpoint(Net, path).eval()
        assert again.lr == 0.02
        ids = torch.arange(32).view(2, 16)
        assert torch.equal(again(ids), module(ids))
        assert adapter_state_dict(again).keys() == adapter_state_dict(module).keys()

    def test_weights_only_checkpoint_and_arguments(self, tmp_path: Path) -> None:
        module = LM(tiny_llama())
        trainer = make_trainer(tmp_path, [LoRA(r=4)])
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
        again = load_from_checkpoint(LM, tmp_path / "w.ckpt", net=tiny_llama(), map_location="cpu")
        ids = torch.arange(32).view(2, 16)
        assert torch.equal(again.eval()(ids), module.eval()(ids))

    def test_module_that_adapts_itself(self, tmp_path: Path) -> None:
        class Own(Net):
            rank = 4

            def configure_model(self) -> None:
                super().configure_model()
                if metadata_or_none(self) is None:
                    apply_lora(self, LoRAConfig(r=self.rank))

        module, path = train(tmp_path)
        ids = torch.arange(16)[None]
        assert torch.equal(load_from_checkpoint(Own, path).eval()(ids), module(ids))
        Own.rank = 2
        with pytest.raises(AlreadyAdaptedError, match="Own adapts itself with .*r=2.*was made with .*r=4"):
            load_from_checkpoint(Own, path)

    def test_training_goes_on_from_it(self, tmp_path: Path) -> None:
        module, path = train(tmp_path)
        again = load_from_checkpoint(Net, path)
        make_trainer(tmp_path, [LoRA(r=4)]).fit(again, loader())
        names = adapter_state_dict(again)
        assert all(not torch.equal(t, adapter_state_dict(module)[n]) for n, t in names.items())

    def test_another_base(self, tmp_path: Path) -> None:
        _, path = train(tmp_path)
        with pytest.raises(
            BaseMismatchError, match="trained on another base: expected (TinyNet|Net) with fingerprint [0-9a-f]{16}"
        ):
            load_from_checkpoint(Net, path, seed=1)

    def test_a_plain_checkpoint(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path)
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.raises(CheckpointError, match="holds no adapters of this package; load it with `Net.load_from"):
            load_from_checkpoint(Net, tmp_path / "plain.ckpt")


def metadata_or_none(model: nn.Module) -> dict[str, Any] | None:
    try:
        return metadata(model)
    except CheckpointError:
        return None


def resume(path: Path, tmp_path: Path, module: LM | None = None, **lora: Any) -> None:
    trainer = make_trainer(tmp_path, [LoRA(**{"r": 4, **lora})], max_steps=8)
    trainer.fit(module or Net(), loader(), ckpt_path=path)


class TestRefusals:
    @pytest.mark.parametrize(
        ("lora", "text"),
        [
            ({"r": 8}, "r: checkpoint 4, model 8"),
            ({"lora_alpha": 8.0}, "lora_alpha: checkpoint 32.0, model 8.0"),
            ({"use_rslora": True}, "use_rslora: checkpoint False, model True"),
            ({"quantize": "nf4"}, "quantize: checkpoint 'none', model 'nf4'"),
            ({"target_modules": ["first"]}, r"target_modules: .*1 layers, 'net.second' first, only in the checkpoint"),
            ({"modules_to_save": ["head"]}, r"modules_to_save: .*1 layers, 'net.head' first, only in the model"),
        ],
    )
    def test_another_configuration(self, lora: dict[str, Any], text: str, tmp_path: Path) -> None:
        _, path = train(tmp_path)
        with pytest.raises(AdapterMismatchError, match=f"another LoRA configuration .*{text}"):
            resume(path, tmp_path, **lora)

    def test_the_same_layers_in_other_words(self, tmp_path: Path) -> None:
        _, path = train(tmp_path, target_modules=["first", "second"])
        resume(path, tmp_path, target_modules=r".*\.(first|second)", lora_dropout=0.5)

    def test_a_model_of_other_layers(self, tmp_path: Path) -> None:
        class Deeper(TinyNet):
            def __init__(self) -> None:
                super().__init__()
                self.third = nn.Linear(64, 64)

        _, path = train(tmp_path)
        with pytest.raises(AdapterMismatchError, match=r"\(1 layers, 'net.head' first, only in the model\)"):
            resume(path, tmp_path, LM(Deeper()))

    def test_another_base(self, tmp_path: Path) -> None:
        _, path = train(tmp_path)
        with pytest.raises(BaseMismatchError, match="Load the same pretrained weights, in the same dtype"):
            resume(path, tmp_path, Net(seed=3))

    def test_a_missing_adapter(self, tmp_path: Path) -> None:
        _, path = train(tmp_path)
        checkpoint = torch.load(path)
        del checkpoint["state_dict"]["net.second.adapter.lora_B"]
        write_checkpoint(checkpoint, path)
        with pytest.raises(AdapterMismatchError, match="1 of 4 tensors are missing, 'net.second.adapter.lora_B' first"):
            resume(path, tmp_path)

    def test_an_unknown_tensor(self, tmp_path: Path) -> None:
        _, path = train(tmp_path)
        checkpoint = torch.load(path)
        checkpoint["state_dict"]["net.third.adapter.lora_B"] = torch.zeros(1)
        write_checkpoint(checkpoint, path)
        with pytest.raises(AdapterMismatchError, match="1 tensors are unknown to the model, 'net.third.adapter"):
            resume(path, tmp_path)

    def test_a_plain_run(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path)
        trainer.fit(Net(), loader())
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        with pytest.raises(
            CheckpointError, match="it is of a run without LoRA. Load its weights into the module before"
        ):
            resume(tmp_path / "plain.ckpt", tmp_path)

    def test_a_newer_version(self, tmp_path: Path) -> None:
        _, path = train(tmp_path)
        checkpoint = torch.load(path)
        checkpoint[KEY]["version"] = VERSION + 1
        write_checkpoint(checkpoint, path)
        with pytest.raises(CheckpointError, match=f"of version {VERSION + 1}, this package knows {VERSION}: update it"):
            resume(path, tmp_path)

    def test_a_model_without_adapters(self) -> None:
        with pytest.raises(CheckpointError, match="the model has no adapters"):
            metadata(TinyNet())


def test_unknown_fingerprint_is_a_notice() -> None:
    model = TinyNet()
    apply_lora(model, LoRAConfig(r=2))
    entry = {**metadata(model), "fingerprint": None}
    with pytest.warns(Notice, match="could not be compared"):
        load_state(model, {"state_dict": adapter_state_dict(model), KEY: entry})


def test_a_full_checkpoint_that_holds_the_adapters_loads_too() -> None:
    model, other = TinyNet(), TinyNet()
    for net in (model, other):
        apply_lora(net, LoRAConfig(r=2))
    random_adapters(model)
    load_state(other, {"state_dict": model.state_dict()})
    pairs = itertools.product([adapter_state_dict(model)], adapter_state_dict(other).items())
    assert all(torch.equal(wanted[name], tensor) for wanted, (name, tensor) in pairs)


@pytest.mark.parametrize("whole", [False, True], ids=["adapters", "full"])
@pytest.mark.parametrize(
    "wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.", "module._orig_mod."]
)
def test_names_that_wrappers_have_changed_are_found(wrapper: str, whole: bool) -> None:
    model, other = TinyNet(), TinyNet()
    for net in (model, other):
        apply_lora(net, LoRAConfig(r=2))
    random_adapters(model)
    state = {wrapper + name: t for name, t in (model.state_dict() if whole else adapter_state_dict(model)).items()}
    entry = {} if whole else {KEY: {**metadata(model), "fingerprint": metadata(other)["fingerprint"]}}
    load_state(other, {"state_dict": state, **entry})
    assert all(torch.equal(t, adapter_state_dict(other)[name]) for name, t in adapter_state_dict(model).items())


def test_best_checkpoint_gives_the_live_numbers(tmp_path: Path) -> None:
    module = Net()
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    trainer = make_trainer(tmp_path, [LoRA(r=4, quantize="nf4"), saver], max_steps=16)
    trainer.fit(module, loader(), loader(16))
    live = trainer.test(module, loader(16), verbose=False)
    assert trainer.test(module, loader(16), ckpt_path="best", verbose=False) == live
    assert trainer.test(Net(), loader(16), ckpt_path="best", verbose=False) == live


class Classifier(LM):
    """A transformers model and, beside it, a linear that begins at random."""

    def __init__(self, seed: int) -> None:
        super().__init__(tiny_llama())
        torch.manual_seed(seed)
        self.beside = nn.Linear(64, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.beside(super().forward(ids))


def test_a_random_layer_beside_the_model_is_not_taken_for_the_same(tmp_path: Path) -> None:
    _, path = train(tmp_path, Classifier(1))
    resume(path, tmp_path, Classifier(1))
    with pytest.raises(BaseMismatchError, match="what lies beside the transformers model.*`modules_to_save`"):
        resume(path, tmp_path, Classifier(2))


def test_a_random_layer_that_is_trained_in_full_comes_back(tmp_path: Path) -> None:
    module, path = train(tmp_path, Classifier(1), modules_to_save=["beside"])
    other = Classifier(2)
    ids = torch.arange(32).view(2, 16)
    trainer = make_trainer(tmp_path, [LoRA(r=4, modules_to_save=["beside"])])
    trainer.validate(other, loader(8), ckpt_path=path, verbose=False)
    assert torch.equal(other.eval()(ids), module(ids))


def test_a_fresh_task_head_is_no_part_of_the_base(tmp_path: Path) -> None:
    from tests.model.nets import tiny_bert

    class Labels(LM):
        def __init__(self, seed: int) -> None:
            super().__init__(tiny_bert())
            nn.init.normal_(self.net.classifier.weight, generator=torch.Generator().manual_seed(seed))

        def loss(self, ids: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self(ids), ids[:, 0] % 3)

    module, path = train(tmp_path, Labels(1))
    again = load_from_checkpoint(Labels, path, seed=2).eval()
    ids = torch.arange(32).view(2, 16)
    assert torch.equal(again(ids), module(ids))
    save_adapter(module, tmp_path / "adapter")
    third = Labels(3).eval()
    load_adapter(third, tmp_path / "adapter")
    assert torch.equal(third(ids), module(ids))


def test_the_strength_of_adapters_comes_back(tmp_path: Path) -> None:
    module = LM(TinyNet())
    trainer = make_trainer(tmp_path, [LoRA(r=2)], max_steps=2)
    trainer.fit(module, loader())
    set_adapter_scale(module, 0.5)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    set_adapter_scale(module, 1.0)
    assert set(torch.load(tmp_path / "half.ckpt", weights_only=True)["lightning_lora"]["strength"].values()) == {0.5}
    trainer.validate(module, loader(size=4), ckpt_path=tmp_path / "half.ckpt", verbose=False)
    assert {m.strength for _, m in adapter_modules(module)} == {0.5}
