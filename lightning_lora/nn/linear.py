# SPDX-License-Identifier: Apache-2.0
"""`LoRALinear`: a frozen linear layer with a low-rank update (Hu et al. 2021).

       x (..., in)
       |------------------.
W (out, in), frozen    A (r, in)     s = lora_alpha / r
       |               B (out, r)
       |------- + --------'
       y = x W^T + b + s D(x) A^T B^T
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.config import AdapterRecord, LoRAConfig, scaling
from lightning_lora.errors import UnsupportedError
from lightning_lora.nn.adapted import AdaptedLinear, LowRank
from lightning_lora.nn.adapter import Held, KeepsDType, Use, torch_dtype
from lightning_lora.nn.functional import add_lora, lora_linear
from lightning_lora.nn.layers import device_of, is_transparent
from lightning_lora.nn.quantized import PackedLinear, compute_dtype, is_autocast, output_dtype


class LoRAAdapter(KeepsDType):
    """The two factors, a module of their own so that sharding can treat them apart from the frozen base.

    They are master weights: fp32 (or ``adapter_dtype``) whatever the model is cast to.
    """

    scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, r: int, init: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.init = init
        self.factor = 1.0
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        # The factor of B A once more as a tensor: compiled code reads it, and a new value compiles nothing anew.
        self.register_buffer("scale", torch.ones((), device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as ``init`` says, B zero: the update starts at exactly zero."""
        if self.lora_A.shape[0] > 0:  # else vacant: there is nothing to begin with
            if self.init == "gaussian":
                nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0])
            else:
                nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        self.scale.fill_(self.factor)

    def rescale(self, factor: float) -> None:
        """Set the factor of ``B A``: scaling and strength."""
        self.factor = factor
        self.scale.fill_(factor)

    def forward(self, y: Tensor, x: Tensor, scale: float | Tensor, dropout: float) -> Tensor:
        """``y + scale D(x) A^T B^T``: called where a wrapper gathers the factors as it is entered (FSDP 1)."""
        return add_lora(y, x.to(y.dtype), self.lora_A, self.lora_B, scale, dropout)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"A={tuple(self.lora_A.shape)}, B={tuple(self.lora_B.shape)}, {self.lora_A.dtype}"


#: What a frozen A was not tried with.
_SPREAD: frozenset[Use] = frozenset({"fsdp1", "fsdp2", "deepspeed", "tensor_parallel"})


class LoRALinear(AdaptedLinear):
    """A frozen ``base_layer`` and the adapter that is added to its output.

    Args:
        base_layer: `torch.nn.Linear`, transformers' ``Conv1D`` or `PackedLinear`; frozen by the caller.
        record: Shared by all modules of one `apply_lora`; its config gives dtype, dropout and start.
        r: Rank; 0 for a vacant module.
        lora_alpha: Numerator of the scale.
    """

    title = "LoRA"
    built_for = frozenset(
        {"fsdp1", "fsdp2", "deepspeed", "tensor_parallel", "mixed_batch", "combining", "portable", "beside"}
    )

    def __init__(self, base_layer: nn.Module, record: AdapterRecord, r: int, lora_alpha: float) -> None:
        super().__init__(base_layer, record)
        config = cast(LoRAConfig, record.config)
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = config.lora_dropout
        self.use_rslora = config.use_rslora
        self.freezes_A = config.freeze_lora_A
        self.adapter: LoRAAdapter = self._new_adapter(
            in_features=self.in_features,
            out_features=self.out_features,
            r=r,
            init=config.init_lora_weights,
            device=device_of(base_layer),
            dtype=torch_dtype(config.adapter_dtype),
        )
        if self.freezes_A:
            self.title, self.built_for = "LoRA-FA (`freeze_lora_A`)", self.built_for - _SPREAD
            self.adapter.lora_A.requires_grad_(False)
        if r == 0:
            self.hold(None)
        self._rescale()

    def _new_adapter(self, **kwargs: Any) -> LoRAAdapter:
        """What is trained here, at its start."""
        return LoRAAdapter(**kwargs)

    @property
    def lora_A(self) -> nn.Parameter:
        """``(r, in)``."""
        return self.adapter.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """``(out, r)``."""
        return self.adapter.lora_B

    @property
    def strength(self) -> float:
        """lambda, what the update is multiplied by besides `scaling`."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = value
        if "adapter" in self._modules:  # not yet while the base class is set up
            self._rescale()

    @property
    def scaling(self) -> float:
        """``lora_alpha / r``, or ``lora_alpha / sqrt(r)``; `strength` not included."""
        return 0.0 if self.vacant else scaling(self.r, self.lora_alpha, self.use_rslora)

    def _rescale(self) -> None:
        adapter: Any = self._modules["adapter"]
        factor = self.scaling * self._strength
        if factor != adapter.factor:
            adapter.rescale(factor)

    def watched(self) -> list[nn.Parameter]:
        """B: while it is zero, the gradient of A is too."""
        return [self.lora_B]

    def own_names(self) -> list[str]:
        """``adapter.lora_A`` and ``adapter.lora_B``."""
        return ["adapter.lora_A", "adapter.lora_B"]

    def held(self) -> Held | None:
        """See `AdapterModule.held`."""
        if self.vacant:
            return None
        A, B = self._factors()
        return Held(
            {"adapter.lora_A": A, "adapter.lora_B": B},
            self._strength,
            self.r,
            self.lora_alpha,
            self.use_rslora,
            self.lora_dropout,
        )

    def hold(self, held: Held | None, in_place: bool = True) -> None:
        """See `AdapterModule.hold`; the rank may be another one."""
        if held is not None and not self.vacant:
            self._take(held, in_place)
            return
        words = held or Held({})
        self.r, self.lora_alpha, self.use_rslora = words.r, words.lora_alpha, words.use_rslora
        self.lora_dropout = words.lora_dropout
        super().hold(held, in_place)

    def exchange(self, held: Held | None, changed: list[Tensor]) -> Held | None:
        """See `AdapterModule.exchange`."""
        if held is None or self.vacant:
            return super().exchange(held, changed)
        A, B = self._factors()
        if type(A) is not nn.Parameter:
            held = self.fitted(held)
        changed += (A, B)
        words = (self._strength, self.r, self.lora_alpha, self.use_rslora, self.lora_dropout)
        # What came in is nobody's now: its dictionary takes what went out. Hundreds of new containers at every swap
        # set off Python's garbage collector, which takes several times longer than the swap itself.
        tensors: Any = held.tensors
        former_A, former_B = A.data, B.data
        if held[1:] == words:  # of the same rank and scale: the storages alone change places
            A.data, B.data = tensors["adapter.lora_A"], tensors["adapter.lora_B"]
            tensors["adapter.lora_A"], tensors["adapter.lora_B"] = former_A, former_B
            return held
        self._take(held, in_place=True)
        tensors["adapter.lora_A"], tensors["adapter.lora_B"] = former_A, former_B
        return Held(tensors, *words)

    def _take(self, held: Held, in_place: bool) -> None:
        """`hold` from one adapter to another: a swap of a large model comes through here hundreds of times."""
        tensors, strength, r, lora_alpha, use_rslora, lora_dropout = held
        if in_place:
            A, B = self._factors()
            A.data, B.data = tensors["adapter.lora_A"], tensors["adapter.lora_B"]
        else:
            parameters: Any = self._modules["adapter"]._parameters  # type: ignore[union-attr]
            for name, tensor in tensors.items():
                own = name.removeprefix("adapter.")
                if type(tensor) is nn.Parameter and tensor.device == parameters[own].device:
                    parameters[own] = tensor
                else:
                    self._put(name, tensor, in_place, learns=parameters[own].requires_grad)
        words = (self._strength, self.r, self.lora_alpha, self.use_rslora)
        self.__dict__["lora_dropout"] = lora_dropout  # not by attributes: `nn.Module` looks at each that is set
        if words != (strength, r, lora_alpha, use_rslora):
            vars(self).update(r=r, lora_alpha=lora_alpha, use_rslora=use_rslora, _strength=strength)
            self._rescale()

    def live(self, name: str) -> Tensor:
        """See `AdapterModule.live`."""
        return self._factors()[name == "adapter.lora_B"]

    def is_plain(self) -> bool:
        """See `AdapterModule.is_plain`."""
        parameters: Any = self._modules["adapter"]._parameters  # type: ignore[union-attr]
        return type(parameters.get("lora_A")) is nn.Parameter

    def _put(self, name: str, tensor: Tensor, in_place: bool, learns: bool) -> None:
        super()._put(name, tensor, in_place, learns and not (self.freezes_A and name == "adapter.lora_A"))

    def _factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B, without the search for an attribute of a module."""
        parameters: Any = self._modules["adapter"]._parameters  # type: ignore[union-attr]
        try:
            return parameters["lora_A"], parameters["lora_B"]
        except KeyError:
            raise UnsupportedError(
                "the adapters are wrapped (FSDP 1): adapters are loaded, swapped and written under a name before the "
                "model is wrapped"
            ) from None

    def _nothing(self) -> dict[str, Tensor]:
        A, B = self.lora_A, self.lora_B
        return {"adapter.lora_A": A.new_empty(0, self.in_features), "adapter.lora_B": B.new_empty(self.out_features, 0)}

    @property
    def update_rank(self) -> int:
        """The rank of `update_factors`."""
        return self.r

    @property
    def update_alpha(self) -> float:
        """The ``lora_alpha`` that gives `update_factors`, at their rank, the scale `scaling`."""
        return self.lora_alpha

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update of the user's layer, ``strength * scaling * B A``, as files and spectra have it."""
        return self.lora_A.detach(), self.lora_B.detach()

    def low_rank(self) -> LowRank:
        """See `AdaptedLayer.low_rank`."""
        return LowRank(*self.update_factors(), self.scaling * self.strength)

    def untrained(self) -> bool:
        """Whether B is exactly zero."""
        return not bool(self.lora_B.detach().any())

    @torch.no_grad()
    def delta_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``strength * scaling * B A`` in the base layer's own layout; computed in fp32 at least."""
        A, B = self.update_factors()
        wide = torch.promote_types(A.dtype, torch.float32)
        delta = (B.to(wide) @ A.to(wide)).mul_(self.scaling * self.strength)
        return (delta.t() if self.fan_in_fan_out else delta).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x``: ``(..., in)``; the output ``(..., out)`` has the dtype that the base layer would give it."""
        in_use = self.enabled and not self.vacant
        return self._compute(x, in_use and (torch.compiler.is_compiling() or self.strength != 0.0))

    def base_output(self, x: Tensor) -> Tensor:
        """See `AdaptedLayer.base_output`."""
        return self._compute(x, active=False)

    def _compute(self, x: Tensor, active: bool) -> Tensor:
        # Once for every layer of every step, between products that leave no cache warm: each line here counts.
        compiling = torch.compiler.is_compiling()
        base, adapter = self.base_layer, self.adapter
        dropout = self.lora_dropout if self.training else 0.0
        scale = adapter.scale if compiling else adapter.factor
        if not isinstance(adapter, LoRAAdapter):  # wrapped: its factors are whole only while it runs
            y = base(x)
            return adapter(y, x, scale, dropout) if active else y
        wanted = output_dtype(x)
        if isinstance(base, PackedLinear):
            dtype, weight = compute_dtype(x, base.compute_dtype), base.matrix
        elif is_transparent(base) and (base.weight.dtype == x.dtype or is_autocast(x)):
            dtype, weight = wanted, self.dense_matrix
        else:  # its forward must run: it computes in its own way or carries hooks, or torch refuses the dtypes
            y = base(x)
            if not active:
                return y
            return add_lora(y, x.to(y.dtype), self.lora_A, self.lora_B, scale, dropout)
        A, B = (adapter.lora_A, adapter.lora_B) if active else (None, None)
        use = 0 if compiling else self.record.use
        return lora_linear(x.to(dtype), weight, base.bias, A, B, scale, dropout, use).to(wanted)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:.4g}"
