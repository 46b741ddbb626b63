"""Reading the weight of a quantised base layer.

On a CPU with AVX512-BF16, `Linear4bit` (bitsandbytes 0.50.2, nn/modules.py) reorders its weight at the first forward in
evaluation mode. From then on `dequantize_4bit` returns garbage, and a forward in training mode silently gives its input
no gradient. An evaluation between two epochs is enough. `unpacked_weight` reads it then. Ends when bitsandbytes unpacks the
weight by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn


class Packed4bit(NamedTuple):
    """A 4-bit weight as bitsandbytes keeps it.

    Attributes:
        values: uint8, two values a byte, the first in the high bits, along the flattened (m, n).
        absmax: float32, the scale of each block.
        code: float32 [16], what each value stands for.
        blocksize: Values in a block.
        shape: (m, n).
    """

    values: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    blocksize: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of a quantised base layer, made anew each time it is called for.

    Attributes:
        base_layer: The layer.
        read: Returns its dequantised weight (m, n), which may be written over.
    """

    base_layer: nn.Module
    read: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        """Returns the dequantised weight."""
        return self.read()

    def packed(self) -> Packed4bit | None:
        """Returns the 4-bit values of a layer on a CUDA device, for a kernel that dequantises as it goes; else None."""
        restore_scales(self.base_layer)
        weight: Any = self.base_layer.weight
        state = getattr(weight, "quant_state", None)
        if state is None or weight.device.type != "cuda" or state.shape[1] % 2:
            return None
        absmax = state.absmax
        if state.nested:
            from bitsandbytes.functional import dequantize_blockwise

            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        return Packed4bit(weight.data, absmax.float(), state.code, state.blocksize, tuple(state.shape))


def restore_scales(base_layer: Any) -> None:
    """Gives a 4-bit weight its scales back, which stay with the layer while FSDP gathers the values as a plain tensor."""
    if getattr(base_layer, "quant_state", None) is not None and not hasattr(base_layer.weight, "quant_state"):
        from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module

        fix_4bit_weight_quant_state_from_module(base_layer)


def is_packed(base_layer: nn.Module) -> bool:
    """Whether bitsandbytes has repacked this layer's weight."""
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def unpacked_weight(base_layer: nn.Module) -> torch.Tensor:
    """Returns the dequantised weight (m, n) of a packed layer, which stays as it is.

    Packing has rounded the scales of the blocks to bfloat16, so this is the weight of the evaluation, which differs
    from the one before it by up to 2^-9 relatively.
    """
    from bitsandbytes import functional

    weight: Any = base_layer.weight
    state = copy.copy(weight.quant_state)
    scales = state.absmax.T.reshape(-1).float()
    state.original_nested = False  # do not quantise the scales again
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = scales
    dequantised: torch.Tensor = functional.dequantize_4bit(data, state)
    return dequantised
