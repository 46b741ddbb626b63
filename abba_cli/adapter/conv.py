"""ABBA on `nn.Conv1d`, through a convolution with the update as its weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .layer import AbbaLayer


class AbbaConv1d(AbbaLayer):
    """The weight (m, in/groups, k) is read as a matrix (m, n) with n = in/groups * k. dW is kept for backward."""

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        return super().get_delta_weight(adapter_name).view_as(self._weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT 0.21.2 would decompose the slices of a kernel, and write them as a linear layer's factors

    def _adapted_forward(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        conv: Any = self.get_base_layer()
        padding = conv.padding
        for name in names:
            delta = self.get_delta_weight(name)
            dropped = self.abba_dropout[name](x).to(delta.dtype)
            if conv.padding_mode != "zeros":
                dropped = F.pad(dropped, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
                padding = 0
            update = F.conv1d(dropped, delta, None, conv.stride, padding, conv.dilation, conv.groups)
            y = y + update.to(y.dtype)
        return y  # type: ignore[no-any-return]
