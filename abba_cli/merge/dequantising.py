"""What a 4-bit or 8-bit base looked like to training: weights quantised and back, as bitsandbytes does it while loading."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module


def quantised_layers(model: PreTrainedModel) -> dict[str, bool]:
    """The linear layers that transformers quantises with bitsandbytes: all but the output layer and what shares its weight.

    Args:
        model: The model or its skeleton.

    Returns:
        Name -> whether the weight is stored transposed (Conv1D), which is undone for quantising.
    """
    kept: list[str] = get_keys_to_not_convert(model)
    return {
        name: isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and should_convert_module(name, kept)
    }


def round_trip(weight: torch.Tensor, quantization: str, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
    """Quantise a weight and dequantise it.

    Args:
        weight: W0 as stored, (m, n) or, if `transposed`, (n, m).
        quantization: nf4 (with double quantisation, as in `loading.load_model`) or int8.
        dtype: Of the base in training, which it had before it was quantised.
        transposed: Whether the layer is a Conv1D.

    Returns:
        The weight that training saw, in `dtype` and in the layout of `weight`.
    """
    from bitsandbytes import functional

    given = (weight.T if transposed else weight).to(dtype).contiguous()
    if quantization == "nf4":
        packed, state = functional.quantize_4bit(given, blocksize=64, compress_statistics=True, quant_type="nf4")
        seen: torch.Tensor = functional.dequantize_4bit(packed, state)
    else:
        rows, scales, _ = functional.int8_vectorwise_quant(given.to(torch.float16))
        seen = (rows.float() * (scales.view(-1, 1) / 127)).to(dtype)
    return seen.T if transposed else seen
