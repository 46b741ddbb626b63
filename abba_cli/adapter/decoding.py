"""A layer's weight with its adapters added, kept between the steps of decoding, when nothing is trained.

Shapes as in factors.py: W0 is (m, n), or (n, m) where transformers' Conv1D stores it; x is (batch, 1, n), one new token each.

For one token neither way of kernels.py is cheap: each reads the factors and makes products as large as the base's own
matmul. So the first decoding step makes W0 + sum of s dW as `merge` would, and the steps after it cost what the merged
model's cost. That doubles the memory of the adapted weights for as long as it is kept.

`AbbaModel.generate` makes the weights before the prompt and uses them, unlooked at, until the text is complete. For a caller
with a loop of its own every step looks whether the weight still holds. One change it cannot see: a write through `.data`
between two steps of the same text. The next prompt, or any other call that is no step, has the values compared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dense import effective_weight
from .layer import AbbaLayer

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FREE_SHARE_CUDA = 0.1  # of a CUDA device's memory: a weight that would leave less free is not kept


def is_decoding_step(x: torch.Tensor) -> bool:
    """Whether a call with x is one step of generating text, whose gradient nobody asks for.

    Gradient checkpointing with `use_reentrant=True` runs its first forward without gradients, too, but in training mode,
    where nothing is kept. A caller that does it in evaluation mode, with one position, gets the kept weight in the first
    forward and the factors in the second: the same up to rounding, and the gradients are the second's.
    """
    return (
        x.ndim == 3
        and x.shape[1] == 1
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class DecodingWeight:
    """W0 + sum of s dW of one layer, (m, n) or (n, m), in W0's dtype, with what tells whether it still holds.

    It is no part of the model: not in the state dict, and a copied or pickled layer has None in its place.

    Attributes:
        weight: The weight; None where there was no room for it.
        verified: Whether no other call has come between the last step and this one. Writes through `.data` leave no trace
            on a tensor, so the first step after another call compares the values.
    """

    __slots__ = (
        "_active",
        "_base_sums",
        "_bias",
        "_copies",
        "_device_type",
        "_inner",
        "_scales",
        "_sources",
        "_transposed",
        "verified",
        "weight",
    )

    def __init__(self, layer: AbbaLayer, names: list[str], fits: bool) -> None:
        inner: Any = layer._modules["base_layer"]
        self._inner, self._bias, self._transposed = inner, inner.bias, layer.transposed
        self._device_type = inner.weight.device.type
        active = layer.active_adapter
        self._active = active if isinstance(active, str) else list(active)
        self._scales = [(name, layer.scaling[name]) for name in names]
        # The alias keeps the storage alive, so that no other tensor can come to lie at its address.
        self._sources = [
            (owner, name, factor, factor._version, factor.data_ptr(), factor.detach())
            for name in names
            for owner, factor in zip(("abba_B1", "abba_A1", "abba_B2", "abba_A2"), layer.factors(name), strict=True)
        ]
        W0 = inner.weight
        self._sources.append(("base_layer", "weight", W0, W0._version, W0.data_ptr(), W0.detach()))
        self.verified = True
        self.weight: torch.Tensor | None = None
        if fits:
            self._copies = [source[2].detach().clone() for source in self._sources[:-1]]
            self._base_sums = _row_sums(W0)
            adapters = [(layer.factors(name), s) for name, s in self._scales]
            self.weight = effective_weight(W0.detach(), adapters, layer.transposed)

    @staticmethod
    def of(layer: AbbaLayer, names: list[str]) -> DecodingWeight | None:
        """Makes the weight of a layer whose base is a plain float one, or returns None where its changes could not be seen.

        Args:
            layer: The layer; its adapters have been initialised.
            names: Its active adapters.
        """
        if not layer.keeps_weight:
            return None
        inner: Any = layer._modules["base_layer"]
        own = inner._parameters
        if inner.weight is not own.get("weight") or inner.bias is not own.get("bias"):
            return None  # parametrised
        tensors = [inner.weight, *(factor for name in names for factor in layer.factors(name))]
        # Another type is sharded, wrapped, or given for one call only; a tensor made in inference mode counts no versions.
        if any(type(tensor) is not nn.Parameter or tensor.is_inference() or tensor.is_meta for tensor in tensors):
            return None
        return DecodingWeight(layer, names, _fits(inner.weight))

    def serves(self, x: torch.Tensor) -> bool:
        """`is_decoding_step`, for a call that is not being compiled; asking a tensor for its device's name takes too long."""
        return (
            x.ndim == 3 and x.shape[1] == 1 and not torch.is_grad_enabled() and not torch.is_autocast_enabled(self._device_type)
        )

    def holds(self, layer: AbbaLayer) -> bool:
        """Whether the layer would make the same weight again. Runs for every layer and token, hence the bare look-ups."""
        inner = self._inner
        modules: Any = layer._modules
        if (
            layer.training
            or layer._disable_adapters
            or layer.merged_adapters
            or layer._active_adapter != self._active
            or modules["base_layer"] is not inner
            or inner._parameters.get("bias") is not self._bias
            or inner._forward_hooks
            or inner._forward_pre_hooks
            or "forward" in inner.__dict__
        ):
            return False
        scaling = layer.scaling
        for name, s in self._scales:
            if scaling.get(name) != s:
                return False
        for owner, name, tensor, version, address, _ in self._sources:
            found = modules[owner]._parameters.get(name)
            if found is not tensor or tensor._version != version or tensor.data_ptr() != address:
                return False
        return self.verified or self._verify()

    def _verify(self) -> bool:
        """Compares the values: the factors with their copies, W0 with the sums of its rows' bits."""
        if self.weight is not None:
            *factors, base = (source[2] for source in self._sources)
            same = all(torch.equal(a, b) for a, b in zip(factors, self._copies, strict=True))
            if not same or not torch.equal(_row_sums(base), self._base_sums):
                return False
        self.verified = True
        return True

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer's own matmul, call for call: the result has the bits of the merged layer's."""
        assert self.weight is not None
        if not self._transposed:
            return F.linear(x, self.weight, self._bias)
        y = torch.addmm(self._bias, x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the layer starts without


def _row_sums(weight: torch.Tensor) -> torch.Tensor:
    """Adds up the bits of each row as integers: reads the weight once, needs no copy, and any single change shows."""
    bits = weight.detach()
    wide = bits.is_contiguous() and bits.shape[1] * bits.element_size() % 8 == 0
    return bits.view(torch.int64 if wide else _INTEGERS[bits.element_size()]).sum(dim=1)


def _fits(weight: torch.Tensor) -> bool:
    """Whether a CUDA device keeps a tenth of its memory free, for the keys and values to come; elsewhere always."""
    if weight.device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(weight.device)
    free += torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
    return free - weight.nbytes >= FREE_SHARE_CUDA * total
