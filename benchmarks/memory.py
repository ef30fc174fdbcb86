# SPDX-License-Identifier: Apache-2.0
"""Bytes that autograd keeps alive for one Llama decoder layer, bf16, against the frozen layer.

Counted are the distinct storages that the second layer's forward saves for backward, parameters and buffers
apart; the embedded input requires a gradient, as in a deep model.

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from variants import arguments, build, environment, saved_base

SHAPE = {
    "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 256, "attn_implementation": "sdpa",
}  # fmt: skip
NAMES = "frozen,ours,ours-drop,ours-nf4,peft-same,peft-same-drop,peft,peft-drop"


def saved_by_layer(model: nn.Module, layer: nn.Module, run: Callable[[], object]) -> int:
    """Bytes that ``layer`` saves for backward while ``run`` computes ``model``; its own tensors apart."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, int] = {}
    held: list[Tensor] = []  # keeps addresses from being used again
    inside = [False]

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if inside[0] and address not in own:
            seen[address] = tensor.untyped_storage().nbytes()
        held.append(tensor)
        return tensor

    hooks = [
        layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, False)),
    ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    for hook in hooks:
        hook.remove()
    return sum(seen.values())


def saved_bytes(model: nn.Module, batch: int, length: int) -> int:
    """Bytes saved by the second decoder layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    embedded = base.get_input_embeddings()(torch.randint(256, (batch, length))).detach().requires_grad_()
    return saved_by_layer(model, base.model.layers[1], lambda: base.model(inputs_embeds=embedded, use_cache=False))


def options(parser: argparse.ArgumentParser) -> None:
    """This script's arguments."""
    parser.add_argument("--variants", default=NAMES, help="comma-separated names")
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")


if __name__ == "__main__":
    args = arguments(__doc__ or "", options)
    torch.set_num_threads(args.threads)
    print(environment("peft"))
    folder = saved_base(SHAPE)
    frozen = 0
    print("| variant | MiB a layer | / frozen |\n|---|---|---|")
    for name in args.variants.split(","):
        count = saved_bytes(build(name, folder, torch.bfloat16).model, args.batch, args.length)
        frozen = frozen or count
        print(f"| {name} | {count / 2**20:.2f} | {count / frozen:.2f} |")
