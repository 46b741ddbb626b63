"""What every adapted layer has: the factors of each adapter, their start, merge and unmerge.

Shapes as in factors.py; `transposed` is whether the base weight is stored as (n, m), as transformers' Conv1D does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from peft.utils.quantization_utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import AbbaConfig, check_rank
from .cost import Kernel
from .dense import Scaled, effective_weight
from .factors import Factors, delta_weight, init_A2, init_pair, scale
from .quantised import is_packed, restore_scales, unpacked_weight
from .starts import FROM_WEIGHT, Start, start_from_weight


class AbbaLayer(nn.Module, BaseTunerLayer):
    """What all adapted layers share: a weight of shape (m, n), whatever the layer does with it.

    Attributes:
        abba_A1, abba_B1, abba_A2, abba_B2: the factors, by adapter name, float32 (float64 on a float64 base).
        abba_dropout: dropout of the update's input, by adapter name.
        r1, r2, alpha, exponent, scaling: numbers, by adapter name; scaling is s = alpha^2 / (r1 r2)^exponent.
        kernel: the way of computing, by adapter name.
        keeps_weight: whether a layer may keep W0 + dW while it generates text; not where memory is so short that the base is
            shared out over processes.
        start: how the factors start (starts.py), by adapter name.
        pending_svd: adapters whose factors wait for their SVD, see `initialize_pending`.
    """

    adapter_layer_names = ("abba_A1", "abba_B1", "abba_A2", "abba_B2")
    keeps_weight = True
    other_param_names = ("r1", "r2", "alpha", "exponent", "scaling", "start", "kernel", "abba_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: AbbaConfig, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        inner = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            inner, get_apply_tensor_subclass=kwargs.pop("get_apply_tensor_subclass", None)
        )
        self.transposed = isinstance(inner, Conv1D)
        self.out_features, self.in_features = weight_shape(inner)
        self.abba_A1 = nn.ParameterDict()
        self.abba_B1 = nn.ParameterDict()
        self.abba_A2 = nn.ParameterDict()
        self.abba_B2 = nn.ParameterDict()
        self.abba_dropout = nn.ModuleDict()
        self.r1: dict[str, int] = {}
        self.r2: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.exponent: dict[str, float] = {}
        self.start: dict[str, Start] = {}
        self.kernel: dict[str, Kernel] = {}
        self.pending_svd: set[str] = set()
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, **kwargs)

    def update_layer(self, adapter_name: str, config: AbbaConfig, r1: int, r2: int, alpha: float) -> None:
        """Adds an adapter, or replaces the one of that name.

        With a start from the base weight, B1 and A1 stay zero until `initialize_pending`.

        Raises:
            ValueError: a rank is not positive.
        """
        check_rank("r1", r1)
        check_rank("r2", r2)
        m, n = self.out_features, self.in_features
        self.r1[adapter_name], self.r2[adapter_name], self.alpha[adapter_name] = r1, r2, alpha
        self.exponent[adapter_name] = config.scale_exponent
        self.scaling[adapter_name] = scale(alpha, r1, r2, config.scale_exponent)
        self.kernel[adapter_name] = config.kernel
        self.abba_dropout[adapter_name] = nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()

        B1, A1 = torch.zeros(m, r1), torch.zeros(r1, n)
        B2, A2 = torch.zeros(m, r2), init_A2(r2, n)
        if config.init_weights == "random" or config.init_weights is False:
            B1, A1 = init_pair((m, r1), (r1, n))
        if config.init_weights == "zeros":
            A1 = init_A2(r1, n)
        if config.init_weights is False:
            B2, A2 = init_pair((m, r2), (r2, n))
            # s would multiply an update that is no no-op; shared out over the factors, dW starts as large as LoHa's.
            share = self.scaling[adapter_name] ** -0.25
            B1, A1, B2, A2 = (share * factor for factor in (B1, A1, B2, A2))
        # Not through `_move_adapter_to_device_of_base_layer`, which would round the factors to the base's dtype.
        device, dtype = self._base_device_and_dtype()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        for name, factor in zip(self.adapter_layer_names, (A1, B1, A2, B2), strict=True):
            getattr(self, name)[adapter_name] = nn.Parameter(factor.to(device, dtype))

        self.pending_svd.discard(adapter_name)
        self.start[adapter_name] = "svd" if isinstance(config.init_weights, bool) else config.init_weights
        if config.init_weights is not False and self.start[adapter_name] in FROM_WEIGHT:
            self.pending_svd.add(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def initialize_pending(self, adapter_name: str) -> None:
        """Runs the SVD start of an adapter that still waits for it, unless its weights have been set meanwhile.

        A fresh adapter is initialised when it is attached. One whose config was read from a file is not: most likely
        its weights are loaded next, and then no SVD must run. Should nothing be loaded, the first forward comes here.

        Raises:
            ValueError: the base weight cannot be read (a quantisation that PEFT cannot dequantise).
        """
        if adapter_name not in self.pending_svd:
            return
        A1, B1 = self.abba_A1[adapter_name], self.abba_B1[adapter_name]
        if A1.is_meta or self._weight.is_meta:
            return  # PEFT's low_cpu_mem_usage: the values come later
        self.pending_svd.discard(adapter_name)
        if A1.any() or B1.any():
            return  # set by other means than `load_state_dict`
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(
                f"init_weights={self.start[adapter_name]!r} needs the base weight, but a "
                f"{self.quantization_backend.backend_name} layer "
                "cannot be dequantised. Use init_weights='random'."
            )
        with torch.no_grad(), gather_params_ctx(self._weight):
            weight = self._as_matrix(self.get_base_weight())
            if weight.device.type == "cpu" and torch.cuda.is_available():
                weight = weight.cuda()  # a base that stays on the CPU for now; minutes become seconds
            factors = self.factors(adapter_name)
            for factor, new in zip(factors, start_from_weight(self.start[adapter_name], weight, factors), strict=True):
                factor.copy_(new)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pending_svd -= {name for name in self.pending_svd if f"{prefix}abba_B1.{name}" in state_dict}

    def factors(self, adapter_name: str) -> Factors:
        """Returns the adapter's parameters as (B1, A1, B2, A2)."""
        return Factors(
            self.abba_B1[adapter_name],
            self.abba_A1[adapter_name],
            self.abba_B2[adapter_name],
            self.abba_A2[adapter_name],
        )

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Returns s (B1 A1) * (B2 A2) in the shape of the base weight, differentiable, in the factors' dtype."""
        self.initialize_pending(adapter_name)
        delta = delta_weight(self.factors(adapter_name), self.scaling[adapter_name])
        return delta.T if self.transposed else delta

    def get_base_weight(self) -> torch.Tensor:
        """Returns the base weight, dequantised if need be."""
        inner = self.get_base_layer()
        restore_scales(inner)
        return unpacked_weight(inner) if is_packed(inner) else super().get_base_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates of the named adapters (default: the active ones) to the base weight.

        They are summed in the wider of the two dtypes and rounded once, so that the merged weight is the one that a
        forward with the adapter has been using. Either all of them are merged or, on an error, none.

        Raises:
            ValueError: with `safe_merge`, the merged weight would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.abba_A1]
        if names:
            self._add_to_base_weight(names, sign=1, safe=safe_merge)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Subtracts the merged updates from the base weight, which returns it up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        names = [name for name in self.merged_adapters if name in self.abba_A1]
        self.merged_adapters.clear()
        self._add_to_base_weight(names, sign=-1, safe=False)

    @torch.no_grad()
    def _add_to_base_weight(self, names: Sequence[str], sign: int, safe: bool) -> None:
        for name in names:
            self.initialize_pending(name)
        weight = self.get_base_weight()
        matrix = weight if weight.dim() == 2 else self._as_matrix(weight)
        adapters = [(self.factors(name), sign * self.scaling[name]) for name in names]
        merged = effective_weight(matrix, adapters, self.transposed).view_as(weight)
        if safe and not merged.isfinite().all():
            broken = next((name for name, a in zip(names, adapters, strict=True) if not _finite(a)), names[-1])
            raise ValueError(f"NaNs detected in the merged weights. The adapter {broken} seems to be broken")
        self.set_base_weight(merged)

    def set_scale(self, adapter: str, scale_factor: float) -> None:
        """Sets an adapter's s to a multiple of its own alpha^2 / (r1 r2)^exponent."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale_factor * scale(
                self.alpha[adapter], self.r1[adapter], self.r2[adapter], self.exponent[adapter]
            )

    def scale_layer(self, scale_factor: float) -> None:
        """Multiplies s of the active adapters."""
        for name in self._active_here():
            self.scaling[name] *= scale_factor

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides s of the active adapters by `scale`; None restores the adapter's own."""
        for name in self._active_here():
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.pending_svd.discard(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._active_here()
        if not names:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        for name in names:
            if name in self.pending_svd:
                self.initialize_pending(name)
        return self._adapted_forward(x, names, *args, **kwargs)

    def _adapted_forward(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError

    def cast_factors_to_base(self, adapter_name: str) -> None:
        """Gives an adapter's factors the dtype of the base layer (for 4 bits: the one it computes in)."""
        _, dtype = self._base_device_and_dtype()
        if dtype is None or not dtype.is_floating_point or adapter_name not in self.abba_A1:
            return
        for name in self.adapter_layer_names:
            factors = getattr(self, name)
            requires_grad = factors[adapter_name].requires_grad
            factors[adapter_name] = nn.Parameter(factors[adapter_name].to(dtype), requires_grad=requires_grad)

    @property
    def _weight(self) -> nn.Parameter:
        return self.get_base_layer().weight  # type: ignore[return-value]

    def _base_device_and_dtype(self) -> tuple[torch.device | None, torch.dtype | None]:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())  # type: ignore[no-untyped-call, no-any-return]

    def _active_here(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.abba_A1]

    def _as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """Views the base weight as W0 (m, n)."""
        return weight.T if self.transposed else weight.reshape(self.out_features, self.in_features)

    def __repr__(self) -> str:
        return "abba." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def weight_shape(base_layer: nn.Module) -> tuple[int, int]:
    """Returns (m, n) of the weight that is adapted."""
    if isinstance(base_layer, nn.Conv1d):
        return base_layer.out_channels, base_layer.in_channels // base_layer.groups * base_layer.kernel_size[0]
    if isinstance(base_layer, Conv1D):
        n, m = base_layer.weight.shape
        return m, n
    return base_layer.out_features, base_layer.in_features  # type: ignore[return-value]


def _finite(adapter: Scaled) -> bool:
    return bool(effective_weight(None, [adapter]).isfinite().all())
