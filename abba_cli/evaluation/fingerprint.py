"""Which weights gave an answer: a digest of what is in memory, wherever it was loaded from."""

import hashlib
from typing import Any

import torch

from abba_cli.methods import is_factor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_WRAPPERS = ("base_model.model.", "base_layer.", "original_module.")


def fingerprint(model: Any, adapter_off: bool = False) -> str:
    """Digest of a model's weights, 16 hexadecimal digits.

    Every tensor counts with its name, type, shape and the sums of its rows' bits, which reads the weights once.

    Args:
        model: The model, with or without a PEFT adapter around it.
        adapter_off: Leave the adapter out: the same digest as the base alone.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(model, adapter_off).items()):
        rows = tensor.detach().reshape(tensor.shape[0] if tensor.ndim > 1 else 1, -1).contiguous()
        bits = rows.view(torch.uint8 if rows.dtype == torch.bool else _INTEGERS[rows.element_size()])
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bits.sum(dim=1, dtype=torch.int64).cpu().numpy().tobytes())
    if not adapter_off:
        for name, module in model.named_modules():
            if isinstance(scales := getattr(module, "scaling", None), dict):
                digest.update(f"{name} {sorted(scales.items())}".encode())
    return digest.hexdigest()[:16]


def _tensors(model: Any, adapter_off: bool) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if adapter_off and (is_factor(name, model) or ".modules_to_save." in name):
            continue
        plain = name
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        found[plain] = tensor
    return found
