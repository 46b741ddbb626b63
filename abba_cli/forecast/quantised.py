"""Linear layers in the bytes that bitsandbytes quantises them to, on fake tensors.

Its own layers take no fake weights; these have the same tensors, and make the same temporaries in forward and backward.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.utils.quantization_utils import Bnb4bitBackend, Bnb8bitBackend
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from abba_cli.adapter.layer import AbbaLayer, weight_shape

# bitsandbytes' own: a scale for 64 values, itself quantised in blocks of 256.
_BLOCK, _NESTED_BLOCK = 64, 256


def quantise(adapted: PeftModel, kind: str) -> None:
    """Replace the linear layers that transformers would quantise; to be called under a FakeTensorMode.

    Args:
        adapted: A model on fake tensors, changed in place.
        kind: nf4 (with double quantisation) or int8.
    """
    base = adapted.get_base_model()
    for name, layer in quantisable(adapted):
        parent = base.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _LAYERS[kind](layer))
        if isinstance(parent, AbbaLayer):  # PEFT's own methods look at their layer's type when they are made
            parent.quantization_backend = _BACKENDS[kind]()
            parent.transposed = False


def quantisable(adapted: PeftModel) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Name and layer of every linear layer that transformers quantises: all but the head and what is tied to it."""
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    left_out = [key.removesuffix(".base_layer") for key in get_keys_to_not_convert(base)]
    return [
        (name, module)
        for name, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and not module.weight.requires_grad
        and should_convert_module(name.replace(".base_layer", ""), left_out)
    ]


def quantised_bytes(layer: nn.Module, kind: str) -> int:
    """Bytes of a linear layer's weight once it is quantised, with its scales and tables."""
    m, n = weight_shape(layer)
    if kind == "int8":
        return m * n + 4 * m
    blocks = math.ceil(m * n / _BLOCK)
    return (m * n + 1) // 2 + blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + 4 * (16 + 256 + 1)


class _Nf4(nn.Module):
    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        from bitsandbytes import functional as bitsandbytes

        make_state: Any = bitsandbytes.QuantState

        (m, n), dtype = weight_shape(layer), layer.weight.dtype
        blocks = math.ceil(m * n / _BLOCK)
        self.weight = nn.Parameter(torch.empty((m * n + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias, self.in_features, self.out_features = layer.bias, n, m
        nested = make_state(
            torch.empty(math.ceil(blocks / _NESTED_BLOCK)), code=torch.empty(256), blocksize=_NESTED_BLOCK, dtype=torch.float32
        )
        self.state = make_state(
            torch.empty(blocks, dtype=torch.uint8),
            shape=torch.Size((m, n)),
            code=torch.empty(16),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.empty(()),
            state2=nested,
        )

    def forward(self, x: Tensor) -> Tensor:
        return _product(x.to(self.state.dtype), self.dequantised, self.bias).to(x.dtype)

    def dequantised(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        weight: Tensor = dequantize_4bit(self.weight, self.state)
        return weight


class _Int8(nn.Module):
    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        super().__init__()
        (m, n), self.dtype = weight_shape(layer), layer.weight.dtype
        self.weight = nn.Parameter(torch.empty(m, n, dtype=torch.int8), requires_grad=False)
        self.bias, self.in_features, self.out_features = layer.bias, n, m
        self.scales = torch.empty(m)

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, lambda: self.weight.to(x.dtype).mul_(self.scales[:, None]), self.bias)

    def dequantised(self) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight: Tensor = int8_vectorwise_dequant(self.weight, self.scales)
        return weight


class _Product(torch.autograd.Function):
    """x W^T with a W that is made in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make_weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.make_weight = make_weight
        return functional.linear(x, make_weight(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy @ ctx.make_weight(), None, None


def _product(x: Tensor, make_weight: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
    y: Tensor = _Product.apply(x, make_weight, bias)  # type: ignore[no-untyped-call]
    return y


class _Nf4Backend(Bnb4bitBackend):
    def get_base_weight(self, base_layer: Any) -> Tensor:
        return base_layer.dequantised()  # type: ignore[no-any-return]


class _Int8Backend(Bnb8bitBackend):
    def get_base_weight(self, base_layer: Any) -> Tensor:
        return base_layer.dequantised()  # type: ignore[no-any-return]


_LAYERS: dict[str, Any] = {"nf4": _Nf4, "int8": _Int8}
_BACKENDS: dict[str, Any] = {"nf4": _Nf4Backend, "int8": _Int8Backend}
