# SPDX-License-Identifier: Apache-2.0
"""`BottleneckSublayer`: a frozen sublayer with a small network at its output (Houlsby et al. 2019; He et al. 2022).

h (..., width) is what the sublayer gives, x (..., width) what it reads:

    sequential    y = h + s up(f(down(h)))
    parallel      y = h + s up(f(down(x)))

Earlier adapters may stay frozen below the one that is trained: each reads what those before it give.
``up`` begins at zero, so that y is h, bit for bit, until the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord
from lightning_lora.errors import TargetError, UnsupportedError
from lightning_lora.nn.adapter import AdapterModule, KeepsDType, torch_dtype
from lightning_lora.nn.layers import is_conv1d, linear_shape
from lightning_lora.nn.quantized import PackedLinear

#: What may stand between ``down`` and ``up``.
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


class BottleneckAdapter(KeepsDType):
    """``down`` and ``up``, master weights.

    Args:
        width: Of what is read and changed.
        size: Of the bottleneck.
        function: A name in `NON_LINEARITIES`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(self, width: int, size: int, function: str, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.function = function
        self.down = nn.Linear(width, size, device=device, dtype=dtype)
        self.up = nn.Linear(size, width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``down`` as LoRA's A, ``up`` zero: the change starts at exactly zero."""
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., width)``; ``up(f(down(x)))`` in its dtype."""
        dtype = x.dtype
        hidden = F.linear(x, self.down.weight.to(dtype), self.down.bias.to(dtype))
        hidden = NON_LINEARITIES[self.function](hidden)
        return F.linear(hidden, self.up.weight.to(dtype), self.up.bias.to(dtype)).to(dtype)


class BottleneckSublayer(AdapterModule):
    """Runs ``base_layer``, an attention or feed-forward sublayer, and changes the hidden states that it gives.

    Args:
        base_layer: The user's; frozen by the caller. It gives hidden states, or a tuple that begins with them.
        record: Its config is a `BottleneckConfig`.
    """

    title = "Bottleneck"
    unmergeable = "what it adds is no linear function of what a layer reads"

    #: The child in whose place this module stands.
    inner = "base_layer"

    def __init__(self, base_layer: nn.Module, record: AdapterRecord) -> None:
        super().__init__(record)
        config: Any = record.config
        self.training = base_layer.training
        self.base_layer = base_layer
        self.width = width = sublayer_width(base_layer)
        self.parallel = config.mode == "parallel"
        self.scaling = float(config.scaling)
        device = next((t.device for t in [*base_layer.parameters(), *base_layer.buffers()]), torch.device("cpu"))
        self.below = nn.ModuleList()  # earlier adapters, frozen
        self.below_names: list[str] = []
        self._below_how: list[tuple[bool, float]] = []
        self.adapter = BottleneckAdapter(
            width, config.size_for(width), config.non_linearity, device, torch_dtype(config.adapter_dtype)
        )

    def stand_over(self, name: str, config: Any, tensors: dict[str, Tensor]) -> None:
        """Put an earlier adapter, frozen, between the sublayer (or others before it) and the one that is trained.

        Args:
            name: What to call it.
            config: Its `BottleneckConfig`.
            tensors: By their names in its `BottleneckAdapter`.
        """
        size = tensors["down.weight"].shape[0]
        own = self.adapter.down.weight
        earlier = BottleneckAdapter(self.width, size, config.non_linearity, own.device, own.dtype)
        earlier.load_state_dict(tensors)
        self.below.append(earlier.requires_grad_(False))
        self.below_names.append(name)
        self._below_how.append((config.mode == "parallel", float(config.scaling)))

    def drawn(self) -> dict[str, Tensor]:
        """See `AdapterModule.drawn`: earlier adapters, whose folders give them again."""
        return {
            f"{name} ({own})": tensor.detach()
            for name, earlier in zip(self.below_names, self.below, strict=True)
            for own, tensor in earlier.named_parameters()
        }

    @property
    def replaced(self) -> nn.Module:
        """See `AdapterModule.replaced`: the sublayer."""
        return self.base_layer

    @property
    def added(self) -> nn.Module:
        """See `AdapterModule.added`."""
        return nn.ModuleList([self.adapter, *self.below])

    def own_names(self) -> list[str]:
        """Weights and biases of ``down`` and ``up``."""
        return [f"adapter.{part}.{name}" for part in ("down", "up") for name in ("weight", "bias")]

    def successors(self) -> dict[str, list[nn.Parameter]]:
        """See `AdapterModule.successors`: all that is trained, in place of the sublayer's first weight."""
        name = next((name for name, _ in self.base_layer.named_parameters()), None)
        return {} if name is None else {name: list(self.adapter.parameters())}

    def watched(self) -> list[nn.Parameter]:
        """See `AdapterModule.watched`: all that is trained."""
        return [parameter for parameter in self.adapter.parameters() if parameter.requires_grad]

    def untrained(self) -> bool:
        """Whether ``up`` is exactly zero and nothing lies below."""
        return not len(self.below) and not any(bool(p.detach().any()) for p in self.adapter.up.parameters())

    def _nothing(self) -> dict[str, Tensor]:
        weight = self.adapter.down.weight.detach()
        shapes = {"down.weight": (0, self.width), "down.bias": (0,), "up.weight": (self.width, 0), "up.bias": (0,)}
        return {f"adapter.{name}": weight.new_empty(shape) for name, shape in shapes.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the sublayer takes and gives."""
        output = self.base_layer(*args, **kwargs)
        if not self.enabled or self.vacant or self.strength == 0.0:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor) or hidden.shape[-1] != self.width:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise UnsupportedError(
                f"a bottleneck adapter of width {self.width} stands on a {type(self.base_layer).__name__}, which gives "
                f"{shape}: name modules that give hidden states in `target_modules`"
            )
        how = [*self._below_how, (self.parallel, self.scaling)]
        for adapter, (parallel, scaling) in zip([*self.below, self.adapter], how, strict=True):
            read = _first_tensor(args, kwargs) if parallel else hidden
            hidden = hidden + scaling * self.strength * adapter(read.to(hidden.dtype))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def __getattr__(self, name: str) -> Any:
        # Code around the sublayer reads its attributes: `layer_idx`, `is_causal`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_layer, name)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"size={self.adapter.down.out_features}, parallel={self.parallel}, scaling={self.scaling:.4g}"


def sublayer_width(sublayer: nn.Module) -> int:
    """The width of the hidden states that a sublayer reads and gives.

    Args:
        sublayer: A linear layer, which gives them; or a module whose first weight reads them.

    Raises:
        TargetError: It has no weight.
    """
    if is_linear(sublayer):
        return linear_shape(sublayer)[1]
    for module in sublayer.modules():
        if is_linear(module):
            return linear_shape(module)[0]
        wide = [p for p in module.parameters(recurse=False) if p.dim() > 1]
        if wide:
            return wide[0].shape[-1]
    raise TargetError(
        f"a {type(sublayer).__name__} has no weight that tells the width of its hidden states: a bottleneck adapter "
        "stands on attention or feed-forward sublayers"
    )


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer, dense, ``Conv1D`` or packed."""
    return isinstance(module, nn.Linear | PackedLinear) or is_conv1d(module)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
