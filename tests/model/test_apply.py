# SPDX-License-Identifier: Apache-2.0
"""`apply_lora` on whole models: step 0, switching, scaling, shared and odd modules, state, refusals."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, AlreadyAdaptedError, ConfigError, UnsupportedError
from lightning_lora.model.apply import apply_lora, disable_adapters, set_adapter_scale
from lightning_lora.model.slots import adapter_modules, adapter_record, is_adapted
from lightning_lora.model.state import adapter_state_dict, load_adapter_state
from lightning_lora.nn.linear import LoRALinear
from lightning_lora.nn.quantized import PackedLinear
from lightning_lora.nn.saved import SavedModule
from tests.helpers import LM, TinyNet, named_tensors, random_adapters, tiny_gpt2, tiny_llama
from tests.model.nets import Normed, Shared, notices, tiny_bert

IDS = torch.arange(24).view(2, 12)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    return out.logits if hasattr(out, "logits") else out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "plain": TinyNet,
    "module": LM,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_model_computes_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = MODELS[name]().to(dtype)
    before = _logits(model)
    apply_lora(model, LoRAConfig(r=4))
    assert torch.equal(_logits(model), before)
    random_adapters(model)
    assert not torch.equal(_logits(model), before)
    with disable_adapters(model):
        assert torch.equal(_logits(model), before)
    set_adapter_scale(model, 0)
    assert torch.equal(_logits(model), before)


@pytest.mark.parametrize("quantize", ["nf4", "nf4-dq", "fp4", "int8"])
def test_a_packed_model_is_the_model_of_its_dequantized_weights(quantize: str) -> None:
    model = tiny_llama()
    dense = copy.deepcopy(model)
    apply_lora(model, LoRAConfig(r=4, quantize=quantize))
    for name, module in adapter_modules(model):
        dense.get_submodule(name).weight.data = module.base_weight()
    assert torch.equal(_logits(model), _logits(dense))


def test_report_and_what_is_trained() -> None:
    model = TinyNet()  # embed 64x64, first 128x64, second 64x128, head 64x64
    report = apply_lora(model, LoRAConfig(r=4, modules_to_save=["head"], quantize="nf4"))
    assert report.adapted == ["first", "second"]
    assert report.saved == ["head"]
    weights = 64 * 64 + 128 * 64 + 128 + 64 * 128 + 64 + 64 * 64
    assert report.logical_params == weights
    assert report.base_bytes == 4 * weights
    packed = 2 * (128 * 64 // 2 + 4 * 128)  # two matrices of 128 blocks
    assert report.packed_bytes == 4 * (64 * 64 * 2 + 128 + 64) + packed
    assert report.trainable_params == 2 * 4 * (64 + 128) + 64 * 64
    assert report.quantize == "nf4"
    assert report.fingerprint["tensors"] == 5  # all but the head, which is trained in full
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        "first.adapter.lora_A", "first.adapter.lora_B", "second.adapter.lora_A", "second.adapter.lora_B",
        "head.trained.weight",
    }  # fmt: skip
    assert trainable == set(adapter_state_dict(model))
    dense = apply_lora(TinyNet(), LoRAConfig(r=4))
    assert dense.packed_bytes == dense.base_bytes == 4 * weights


def test_ranks_and_scales_by_pattern() -> None:
    model = tiny_llama()
    apply_lora(model, LoRAConfig(r=4, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}))
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.r, attention.q_proj.scaling) == (2, 4.0)
    assert (attention.v_proj.r, attention.v_proj.scaling) == (4, 0.75)


def test_training_flags_of_replaced_layers_stay() -> None:
    model = TinyNet()
    model.second.eval()
    apply_lora(model, LoRAConfig())
    assert model.first.training
    assert not model.second.training


# switching and scaling


def test_switching_off_is_undone_also_on_exceptions_and_when_nested() -> None:
    model = random_adapters(_adapted(TinyNet()))
    on = _logits(model)
    with pytest.raises(KeyError), disable_adapters(model):
        raise KeyError
    assert torch.equal(_logits(model), on)
    with disable_adapters(model):
        off = _logits(model)
        with disable_adapters(model):
            assert torch.equal(_logits(model), off)
        assert torch.equal(_logits(model), off)
    assert torch.equal(_logits(model), on)
    model.first.enabled = False  # by hand: stays as it was
    with disable_adapters(model):
        pass
    assert [m.enabled for _, m in adapter_modules(model)] == [False, True]


def _adapted(model: nn.Module, **config: object) -> nn.Module:
    apply_lora(model, LoRAConfig(**{"r": 4, **config}))
    return model


@pytest.mark.parametrize("lam", [2, 0.5, -1.0])
def test_scale_multiplies_every_update(lam: float) -> None:
    net = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64))
    model = random_adapters(_adapted(net, modules_to_save=["2"]))
    base, trained = model[2].original.weight, model[2].trained.weight
    off, on = model[1].base_weight(), model[1].delta_weight()
    set_adapter_scale(model, lam)
    assert torch.allclose(model[1].delta_weight(), lam * on)
    x = torch.randn(5, 16)
    assert torch.allclose(model[1](x), x @ (off + lam * on).t() + model[1].bias, atol=1e-5)
    weight = base + lam * (trained - base)
    bias = model[2].original.bias + lam * (model[2].trained.bias - model[2].original.bias)
    assert torch.allclose(model[2](x), x @ weight.t() + bias, atol=1e-5)
    set_adapter_scale(model, 1)
    assert torch.equal(model[1].delta_weight(), on)


def test_scales_that_are_no_number_and_models_without_adapters_are_refused() -> None:
    model = _adapted(TinyNet())
    for lam in (float("nan"), float("inf"), "1", None):
        with pytest.raises(ConfigError, match=f"`lam` must be a finite number, got {lam!r}"):
            set_adapter_scale(model, lam)
    with pytest.raises(ConfigError, match="the model has no adapters to scale; call `apply_lora` or `load_adapter`"):
        set_adapter_scale(TinyNet(), 1.0)
    with disable_adapters(TinyNet()):  # nothing to switch off: the base already
        pass


# shared and odd modules


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_shared_modules_are_converted_once_and_stay_shared(quantize: str) -> None:
    model = Shared()
    x = torch.randn(3, 16)
    before = model(x)
    report = apply_lora(model, LoRAConfig(r=4, quantize=quantize))
    assert report.adapted == ["first.up", "first.down", "enter"]
    assert model.first is model.second
    assert model.enter is model.leave
    assert isinstance(model.leave, LoRALinear)
    if quantize == "none":
        assert torch.equal(model(x), before)
    assert len(adapter_state_dict(model)) == 6
    model(x).sum().backward()
    assert model.second.up.lora_B.grad.any()


def test_a_linear_with_a_forward_or_hooks_of_its_own_keeps_them_and_is_not_packed() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(64, 64), Doubling(64, 64), nn.Linear(64, 64))
    seen: list[Tensor] = []
    model[2].register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.randn(3, 64)
    doubled, hooked = model[1](x), model[2](x)
    said = notices(lambda: apply_lora(model, LoRAConfig(quantize="nf4")))
    assert "2 linear layers, '1' first, have a forward or hooks of their own and stay unpacked" in said
    assert isinstance(model[0].base_layer, PackedLinear)
    assert torch.equal(model[1](x), doubled)
    assert torch.equal(model[2](x), hooked)
    assert len(seen) == 2


def test_running_statistics_of_the_base_stand_still_and_off_stays_the_base() -> None:
    model = Normed()
    for _ in range(3):
        model(torch.randn(16, 8))
    base, x = copy.deepcopy(model).eval(), torch.randn(16, 8)
    said = notices(lambda: apply_lora(model, LoRAConfig(r=2)))
    assert any(
        text == "the running statistics of 2 normalisation layers, 'batch' first, are frozen with the base; name them "
        "in `modules_to_save` to train them"
        for text in said
    )
    random_adapters(model)
    model.train()
    for _ in range(3):
        model(torch.randn(16, 8)).sum().backward()
    model.eval()
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))


def test_saved_normalisation_layers_move_their_own_statistics_only() -> None:
    model = Normed()
    base, x = copy.deepcopy(model).eval(), torch.randn(16, 8)
    said = notices(lambda: apply_lora(model, LoRAConfig(r=2, modules_to_save=["batch", "instance"])))
    assert not any("running statistics" in text for text in said)
    model.train()
    model(torch.randn(16, 8))
    with disable_adapters(model):
        model(torch.randn(16, 8))
    model.eval()
    assert not torch.equal(model(x), base(x))
    assert "batch.trained.running_mean" in adapter_state_dict(model)
    with disable_adapters(model):
        assert torch.equal(model(x), base(x))


def test_saved_modules_of_a_tied_model_leave_the_other_end_alone() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = _logits(model)
    _adapted(model, modules_to_save=["embed_tokens"])
    assert torch.equal(_logits(model), before)
    embed = model.model.embed_tokens
    assert isinstance(embed, SavedModule)
    model(IDS).logits.sum().backward()
    assert embed.trained.weight.grad.any()
    assert model.lm_head.weight is embed.original.weight
    assert model.lm_head.weight.grad is None
    with torch.no_grad():
        embed.trained.weight.add_(0.1)
    assert not torch.equal(_logits(model), before)
    with disable_adapters(model):
        assert torch.equal(_logits(model), before)


def test_tied_tensors_inside_a_saved_module_are_kept_under_both_names() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    block[1].weight = block[0].weight
    model = _adapted(nn.Sequential(nn.Linear(4, 4), block), modules_to_save=["1"])
    state = adapter_state_dict(model)
    assert set(state) >= {"1.trained.0.weight", "1.trained.1.weight"}
    load_adapter_state(model, {name: torch.ones_like(t) for name, t in state.items()})
    assert (model[1].trained[1].weight == 1).all()


@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layers_of_torch_use_their_adapters_in_evaluation_too(padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    model = random_adapters(_adapted(model, target_modules=["linear1", "linear2"]), std=0.5)
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    keep = slice(None) if mask is None else ~mask
    want = model.train()(x, src_key_padding_mask=mask)[keep]
    model.eval()
    with torch.no_grad():
        got = model(x, src_key_padding_mask=mask)[keep]
        with disable_adapters(model):
            off = model(x, src_key_padding_mask=mask)[keep]
    assert torch.allclose(got, want, atol=1e-5)
    assert not torch.allclose(off, want, atol=1e-2)


def test_a_task_head_is_saved_and_trained() -> None:
    model = _adapted(tiny_bert())
    assert isinstance(model.classifier, SavedModule)
    model(IDS, labels=torch.tensor([0, 2])).loss.backward()
    assert model.classifier.trained.weight.grad.any()


# compile


SLOW = pytest.mark.slow


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=SLOW), pytest.param("int8", marks=SLOW)])
def test_a_converted_llama_compiles_as_one_graph(quantize: str) -> None:
    model = random_adapters(_adapted(tiny_llama(num_hidden_layers=1), quantize=quantize))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    params = [p for p in model.parameters() if p.requires_grad]
    eager = model(IDS).logits
    grads = torch.autograd.grad(eager.square().sum(), params)
    out = compiled(IDS).logits
    assert torch.allclose(out, eager, atol=1e-5)
    for got, want in zip(torch.autograd.grad(out.square().sum(), params), grads, strict=True):
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    torch.compiler.reset()


@SLOW
def test_a_converted_llama_compiles_to_code() -> None:
    model = random_adapters(_adapted(tiny_llama(num_hidden_layers=1), quantize="nf4"))
    eager = model(IDS).logits
    out = torch.compile(model, fullgraph=True)(IDS).logits
    assert torch.allclose(out, eager, atol=1e-5)


# casts


@pytest.mark.parametrize("quantize", ["none", "nf4", "nf4-dq", "int8"])
def test_casting_the_model_leaves_adapters_and_packed_base_alone(quantize: str) -> None:
    module = random_adapters(_adapted(LM(), quantize=quantize))
    before = {name: (t.dtype, t.clone()) for name, t in named_tensors(module) if "adapter" in name or "packed" in name}
    assert before
    for cast in (lambda: module.to(torch.bfloat16), module.half, module.bfloat16, module.double):
        cast()
        assert module.net.model.norm.weight.dtype != torch.float32
        for name, tensor in named_tensors(module):
            if name in before:
                assert tensor.dtype == before[name][0]
                assert torch.equal(tensor, before[name][1])


# state


def test_state_goes_out_and_in_without_touching_the_base() -> None:
    source, target = random_adapters(_adapted(LM())), _adapted(LM())
    base = {name: t.clone() for name, t in named_tensors(target) if "adapter" not in name}
    load_adapter_state(target, adapter_state_dict(source))
    ids = [t.data_ptr() for t in adapter_state_dict(target).values()]
    load_adapter_state(target, {k: v.clone() for k, v in adapter_state_dict(source).items()})
    assert ids == [t.data_ptr() for t in adapter_state_dict(target).values()]
    assert torch.equal(_logits(target), _logits(source))
    assert all(torch.equal(t, base[name]) for name, t in named_tensors(target) if name in base)
    assert set(adapter_state_dict(source)) <= set(source.state_dict())


def test_names_of_the_state_are_clean_of_wrappers() -> None:
    model = _adapted(TinyNet())
    compiled = torch.compile(model)
    assert set(adapter_state_dict(nn.ModuleDict({"net": compiled}))) == {f"net.{n}" for n in adapter_state_dict(model)}


def test_state_that_does_not_fit_is_refused_whole_with_the_nearest_names() -> None:
    model = random_adapters(_adapted(TinyNet()))
    good = {name: torch.zeros_like(t) for name, t in adapter_state_dict(model).items()}
    before = _logits(model)

    renamed = {name.replace("first", "frist"): t for name, t in good.items()}
    text = (
        "the adapter does not fit the model: 2 of 4 tensors are missing, 'first.adapter.lora_A' first (nearest in the "
        "file: 'frist.adapter.lora_A'); 2 tensors are unknown to the model, 'frist.adapter.lora_A' first (nearest in "
        "the model: 'first.adapter.lora_A'); use the `target_modules` and `modules_to_save` that it was trained with"
    )
    with pytest.raises(AdapterMismatchError, match=re.escape(text)):
        load_adapter_state(model, renamed)
    with pytest.raises(AdapterMismatchError, match="1 tensors are unknown to the model, 'zzz' first; use"):
        load_adapter_state(model, {**good, "zzz": torch.zeros(1)})
    text = (
        "'second.adapter.lora_B' is (64, 8) in the file and (64, 4) in the model: was the adapter trained with another"
    )
    with pytest.raises(AdapterMismatchError, match=re.escape(text)):
        load_adapter_state(model, {**good, "second.adapter.lora_B": torch.zeros(64, 8)})
    assert torch.equal(_logits(model), before)
    load_adapter_state(model, {**good, "zzz": torch.zeros(1)}, strict=False)
    with pytest.raises(AdapterMismatchError, match="4 of 4 tensors are missing"):
        load_adapter_state(model, {}, strict=False)


# refusals


def test_a_second_conversion_is_refused() -> None:
    model = TinyNet()
    assert not is_adapted(model)
    assert adapter_record(model) is None
    config = LoRAConfig(r=4)
    report = apply_lora(model, config)
    assert is_adapted(nn.Sequential(model))
    assert adapter_record(model).config == config
    assert adapter_record(model).fingerprint == report.fingerprint
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(
            AlreadyAdaptedError, match="the model already carries adapters; start from a fresh base mod"
        ):
            apply_lora(whole, config)


def test_a_sharded_model_is_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = distribute_module(TinyNet(), init_device_mesh("cpu", (1,)))
        with pytest.raises(
            UnsupportedError, match=r"the model is already sharded \('embed.weight'\): call `apply_lora"
        ):
            apply_lora(model, LoRAConfig())
    finally:
        dist.destroy_process_group()
    wrapped = nn.Sequential(nn.ModuleDict({"_fsdp_wrapped_module": TinyNet()}))
    with pytest.raises(UnsupportedError, match=r"already sharded \('FSDP'\): .* before `fully_shard` or `wrap`"):
        apply_lora(wrapped, LoRAConfig())


def test_conversion_under_a_seed_is_the_same_conversion() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(adapter_state_dict(_adapted(TinyNet())))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_model_of_pefts_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AlreadyAdaptedError, match="carries adapters of PEFT's: give the base model"):
        apply_lora(model, LoRAConfig(r=2))


def test_a_dict_is_no_config() -> None:
    with pytest.raises(ConfigError, match=r"`config` must be a LoRAConfig, got \{'r': 4\}"):
        apply_lora(TinyNet(), {"r": 4})
