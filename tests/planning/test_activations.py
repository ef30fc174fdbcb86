# SPDX-License-Identifier: Apache-2.0
"""What is planned against what is there: storages alive after the forward of a real converted model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from lightning_lora import LoRAConfig, apply_lora
from lightning_lora.errors import UnsupportedError
from lightning_lora.planning.activations import activations, with_layers
from lightning_lora.planning.architecture import build

CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    ),
    "gpt2": GPT2Config(vocab_size=512, n_embd=128, n_layer=6, n_head=4, n_positions=256),
    "gpt2 without dropout": GPT2Config(
        vocab_size=512, n_embd=128, n_layer=6, n_head=4, n_positions=256, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0,
    ),
}  # fmt: skip
SHAPE = (3, 160)


class Storages(TorchDispatchMode):
    """Every storage that operations made, and how many bytes of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[len(self.made)] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self, without: set[int]) -> int:
        found = {ref.cdata: size for ref, size in self.made.values() if not ref.expired()}
        return sum(size for key, size in found.items() if key not in without)


def measured(config: Any, lora: LoRAConfig | None, dtype: torch.dtype, checkpointing: bool) -> int:
    torch.manual_seed(0)
    model: Any = build(config, dtype).train()
    if lora is not None:
        apply_lora(model, lora)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {StorageWeakRef(t.untyped_storage()).cdata for t in [*model.parameters(), *model.buffers()]}
    ids = torch.randint(config.vocab_size, SHAPE)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with Storages() as storages:
        out = model(inputs_embeds=embedded, labels=ids, use_cache=False)
    assert out.loss.requires_grad
    return storages.alive(own) + (embedded.numel() * embedded.element_size() if checkpointing else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_planned_activations_are_there(name: str, dtype: torch.dtype, method: str, checkpointing: bool) -> None:
    config = CONFIGS[name]
    lora = None if method == "full" else LoRAConfig(r=16, quantize=method)
    planned = activations(config, lora, *SHAPE, dtype)
    expected = planned.total(checkpointing) - (planned.block if checkpointing else 0)
    assert expected == pytest.approx(measured(config, lora, dtype, checkpointing), rel=0.1)


def test_a_model_that_asks_for_values_is_refused() -> None:
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"activations of MixtralConfig cannot be counted.*measure one step"):
        activations(config, LoRAConfig(r=4), 1, 16, torch.float32)


def test_fewer_layers_keep_what_is_given_for_each() -> None:
    from transformers import Qwen3Config

    config = Qwen3Config(num_hidden_layers=6, layer_types=["full_attention"] * 6)
    own = with_layers(config, 2)
    assert (own.num_hidden_layers, own.layer_types) == (2, ["full_attention"] * 2)
    assert config.num_hidden_layers == 6
