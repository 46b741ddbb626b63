"""The adapted linear layer: nn.Linear, transformers' Conv1D, or a quantised linear that PEFT knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import AbbaConfig
from .cost import Kernel
from .decoding import DecodingWeight, is_decoding_step
from .dense import Scaled
from .kernels import adapted_linear, delta_linear
from .layer import AbbaLayer
from .quantised import QuantisedWeight, is_packed


class AbbaLinear(AbbaLayer):
    """ABBA on a linear layer: `nn.Linear`, transformers' Conv1D, or a quantised linear that PEFT knows."""

    _kept: DecodingWeight | None = None  # see decoding.py
    _settled: DecodingWeight | None = None  # the same, while `generating` says that nothing will change

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        settled = self._settled
        if settled is not None and not args and not kwargs:
            return settled.matmul(x)
        kept = self._kept
        if kept is not None:
            if args or kwargs or not kept.serves(x):
                kept.verified = False
                if kept.weight is None:
                    self._kept = None  # there may be room the next time
            elif not kept.holds(self):
                self._kept = None
            elif kept.weight is not None:
                return kept.matmul(x)
        return super().forward(x, *args, **kwargs)

    def _adapted_forward(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        inner: Any = self.base_layer
        dropping = [n for n in names if self.training and isinstance(self.abba_dropout[n], nn.Dropout)]
        adapters: list[Scaled] = [(self.factors(name), self.scaling[name]) for name in names]
        kernel: Kernel = self.kernel[names[0]]
        if not dropping and not args and not kwargs and self._is_plain(inner, x):
            if self._kept is None and not self.training and is_decoding_step(x):
                kept = DecodingWeight.of(self, names)
                self._kept = kept
                if kept is not None and kept.weight is not None:
                    return kept.matmul(x)
            return adapted_linear(x, inner.weight, inner.bias, adapters, self.transposed, kernel, not self.training)
        if not dropping and not args and not kwargs and inner.training and self._is_dequantised(inner):
            dtype = getattr(inner, "compute_dtype", None) or x.dtype
            weight = QuantisedWeight(inner, self.get_base_weight)
            return adapted_linear(x.to(dtype), weight, inner.bias, adapters, False, kernel, exact=False).to(x.dtype)
        y = self._base_forward(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        together = [a for name, a in zip(names, adapters, strict=True) if name not in dropping]
        if together:
            y = y + delta_linear(x, together, y.dtype, kernel).to(y.dtype)
        for name in dropping:  # each adapter drops other elements, so each needs a product of its own
            dropped = self.abba_dropout[name](x)
            y = y + delta_linear(dropped, [(self.factors(name), self.scaling[name])], y.dtype, kernel).to(y.dtype)
        return y  # type: ignore[no-any-return]

    def settle(self) -> None:
        """Keeps the weight for all calls to come, of whatever length, until `unsettle`; does nothing where it cannot."""
        kept = self._kept
        if kept is not None and not kept.holds(self):
            kept = None
        names = [] if self.disable_adapters or self.merged else self._active_here()
        if kept is None and names and not self.training and self._is_plain(self.base_layer, None):
            for name in names:
                self.initialize_pending(name)
            kept = DecodingWeight.of(self, names)
        self._kept = kept
        self._settled = kept if kept is not None and kept.weight is not None else None

    def unsettle(self) -> None:
        """Ends `settle`. The weight stays, to be looked at again before it is used."""
        self._settled = None
        if self._kept is not None:
            self._kept.verified = False

    def _let_go(self) -> None:
        self._kept = self._settled = None

    def _base_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inner: Any = self.base_layer
        if x.requires_grad and is_packed(inner):  # bitsandbytes would return a result without gradient
            dtype = inner.compute_dtype or x.dtype
            weight = QuantisedWeight(inner, self.get_base_weight)
            return adapted_linear(x.to(dtype), weight, inner.bias, [], transposed=False).to(x.dtype)
        return inner(x, *args, **kwargs)

    def _is_dequantised(self, inner: nn.Module) -> bool:
        """Whether the layer is trained on a dequantised weight: a bitsandbytes one, which does so itself in 4 bits.

        In 8 bits bitsandbytes would round the input, too. Its own forward stays in use where nothing is trained.
        """
        backend = self.quantization_backend
        return (
            backend is not None
            and backend.backend_name in ("bnb 4bit", "bnb 8bit")
            and not torch.compiler.is_compiling()
            and "forward" not in vars(inner)
            and not _has_hooks(inner)
        )

    def _is_plain(self, inner: nn.Module, x: torch.Tensor | None) -> bool:
        """Whether the base layer is exactly x W0^T + bias with a frozen W0, so that its weight may be used directly.

        It is not if it is quantised, another tuner's layer, a subclass with a forward of its own, or hooked
        (accelerate's offloading and DeepSpeed's ZeRO-3 bring the weight in by a hook).
        """
        weight = getattr(inner, "weight", None)
        return (
            type(inner).forward in (nn.Linear.forward, Conv1D.forward)
            and "forward" not in vars(inner)
            and self.quantization_backend is None
            and not _has_hooks(inner)
            and isinstance(weight, torch.Tensor)
            and not weight.requires_grad
            and (x is None or x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        )

    # Whatever changes the weight is seen by `DecodingWeight.holds`; these let go of its memory at once.

    def train(self, mode: bool = True) -> AbbaLinear:
        if mode:
            self._let_go()
        super().train(mode)
        return self

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        self._let_go()
        super().set_adapter(adapter_names, inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        self._let_go()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        self._let_go()
        super().delete_adapter(adapter_name)

    def update_layer(self, adapter_name: str, config: AbbaConfig, r1: int, r2: int, alpha: float) -> None:
        self._let_go()
        super().update_layer(adapter_name, config, r1, r2, alpha)

    def _add_to_base_weight(self, names: Sequence[str], sign: int, safe: bool) -> None:
        self._let_go()
        super()._add_to_base_weight(names, sign, safe)

    def _apply(self, fn: Any, recurse: bool = True) -> AbbaLinear:  # what .to() and its like go through
        self._let_go()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
