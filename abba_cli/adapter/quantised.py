"""Reading the weight of a 4-bit base layer that bitsandbytes has repacked for inference on the CPU.

On a CPU with AVX512-BF16, `Linear4bit` (bitsandbytes 0.50.2, nn/modules.py) reorders its weight at the first forward in
evaluation mode. From then on `dequantize_4bit` returns garbage, and a forward in training mode silently gives its input
no gradient. An evaluation between two epochs is enough. Ends when bitsandbytes unpacks the weight by itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


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
