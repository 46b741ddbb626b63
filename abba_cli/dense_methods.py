"""Two methods to compare with that PEFT does not have, as PEFT tuners: full fine-tuning of layers, and a chain of K pairs.

Both make dW in full in each forward pass, by plain autograd: y = x (W0 + dW)^T. They take more memory and time than ABBA's
kernels, and are simple enough to be believed.

Shapes: W0 and dW are (m, n); of a chain's K pairs B is (K, m, r) and A is (K, r, n).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from abba_cli.adapter.config import check_alpha, check_rank
from abba_cli.adapter.factors import Factors, init_A2, khatri_rao, svd_init
from abba_cli.adapter.layer import weight_shape
from abba_cli.adapter.peft_types import add_peft_type

NEAR_ONE = 0.1
"""Spread of the factors of a chain's middle pairs around 1 / sqrt(r), at the start."""


@dataclass
class DenseConfig(PeftConfig):
    """What both have; the fields mean what they mean for PEFT's own methods."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))


@dataclass
class FullConfig(DenseConfig):
    """Full fine-tuning of the targeted layers: dW itself is trained, from zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("FULL")


@dataclass
class ChainConfig(DenseConfig):
    """A chain of K pairs of rank r: dW = s (B_1 A_1) * ... * (B_K A_K), with s = alpha^2 / r^(K scale_exponent).

    Two pairs of one rank are ABBA (https://arxiv.org/abs/2505.14238, which tries four).
    """

    pairs: int = 4
    r: int = 8
    alpha: float = 16.0
    scale_exponent: float = 0.5
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Pair 1 starts from the truncated SVD of W0, the last one with B = 0 and A random, those between them near a "
            "product of ones, so that the first steps are ABBA's. False: the first pair starts at random, without a look at W0."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("CHAIN")
        check_rank("r", self.r)
        check_alpha("alpha", self.alpha)
        if not isinstance(self.pairs, int) or self.pairs < 2:
            raise TypeError(f"`pairs` is {self.pairs!r}, but it has to be a whole number of at least 2.")

    @property
    def scaling(self) -> float:
        """The scale s."""
        return float(self.alpha**2 / self.r ** (self.pairs * self.scale_exponent))


class DenseLayer(nn.Module, BaseTunerLayer):
    """A linear layer (`nn.Linear`, transformers' Conv1D) whose update is made in full, from the parameters of each adapter.

    Attributes:
        r: Rank of the update's pairs by adapter name; of a full update the most that dW can have.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        inner = self.get_base_layer()
        if not isinstance(inner, (nn.Linear, Conv1D)) or not getattr(inner, "weight", torch.empty(0)).is_floating_point():
            raise ValueError(f"Target module {inner} is not supported: it is no torch.nn.Linear or Conv1D with plain weights.")
        self.out_features, self.in_features = weight_shape(inner)
        self.transposed = isinstance(inner, Conv1D)
        self.r: dict[str, int] = {}
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._disable_adapters = False
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter; its parameters are float32, on the base's device."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        for name, value in self.start(adapter_name, config, weight.T if self.transposed else weight).items():
            getattr(self, name)[adapter_name] = nn.Parameter(value.to(weight.device, torch.float32))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def start(self, adapter_name: str, config: Any, weight: Tensor) -> dict[str, Tensor]:
        """Make the parameters of a new adapter on W0 (m, n), by the names in `adapter_layer_names`."""
        raise NotImplementedError

    def delta(self, adapter_name: str) -> Tensor:
        """Compute dW (m, n), differentiable, in the parameters' dtype."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Compute dW in the layout of the base weight."""
        delta = self.delta(adapter_name)
        return delta.T if self.transposed else delta

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._known(self.active_adapters)
        if not names:
            return self.base_layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        inner: Any = self.get_base_layer()
        weight = inner.weight.T if self.transposed else inner.weight
        for name in names:
            weight = weight + self.delta(name).to(inner.weight.dtype)
        return functional.linear(x, weight, inner.bias)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates of the named adapters (default: the active ones) to the base weight."""
        for name in self._known(check_adapters_to_merge(self, adapter_names)):
            self._add(name, 1.0, safe_merge)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract what was merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self._add(self.merged_adapters.pop(), -1.0, False)

    @torch.no_grad()
    def _add(self, name: str, sign: float, safe: bool) -> None:
        weight: Tensor = self.get_base_layer().weight  # type: ignore[assignment]
        delta = self.get_delta_weight(name)
        merged = (weight.to(delta.dtype) + sign * delta).to(weight.dtype)
        if safe and not merged.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        weight.data = merged

    def _known(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.r]


class FullLayer(DenseLayer):
    """dW is a parameter, which starts at zero."""

    adapter_layer_names = ("full_delta",)
    other_param_names = ("r",)

    def start(self, adapter_name: str, config: FullConfig, weight: Tensor) -> dict[str, Tensor]:
        self.r[adapter_name] = min(weight.shape)
        return {"full_delta": torch.zeros(weight.shape)}

    def delta(self, adapter_name: str) -> Tensor:
        return getattr(self, "full_delta")[adapter_name]  # type: ignore[no-any-return]  # noqa: B009


class ChainLayer(DenseLayer):
    """dW = s (B_1 A_1) * ... * (B_K A_K)."""

    adapter_layer_names = ("chain_pair_B", "chain_pair_A")
    other_param_names = ("r", "scaling")

    def start(self, adapter_name: str, config: ChainConfig, weight: Tensor) -> dict[str, Tensor]:
        self.r[adapter_name] = r = config.r
        self.scaling = {**getattr(self, "scaling", {}), adapter_name: config.scaling}
        (m, n), middle = weight.shape, config.pairs - 2
        first_B, first_A = torch.randn(m, r), init_A2(r, n)
        if config.init_weights and not weight.is_meta:
            first_B, first_A = (one.cpu() for one in svd_init(weight, r))
        ones_B, ones_A = (r**-0.5 * (1 + NEAR_ONE * torch.randn(middle, *shape)) for shape in ((m, r), (r, n)))
        return {
            "chain_pair_B": torch.cat([first_B[None], ones_B, torch.zeros(1, m, r)]),
            "chain_pair_A": torch.cat([first_A[None], ones_A, init_A2(r, n)[None]]),
        }

    def delta(self, adapter_name: str) -> Tensor:
        B, A = (getattr(self, name)[adapter_name] for name in self.adapter_layer_names)
        product = self.scaling[adapter_name] * (B[0] @ A[0])
        for left, right in zip(B[1:], A[1:], strict=True):
            product = product * (left @ right)
        return product  # type: ignore[no-any-return]


def two_pairs(B: Tensor, A: Tensor) -> Factors:
    """Return the four factors of the ABBA that equals a chain: the rows of half its pairs' factors multiplied (Theorem 1).

    Args:
        B: (K, m, r).
        A: (K, r, n).

    Returns:
        Factors of ranks r^ceil(K/2) and r^floor(K/2).
    """
    half = (len(B) + 1) // 2
    return Factors(*_joined(B[:half], A[:half]), *_joined(B[half:], A[half:]))


def _joined(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    left, right = B[0], A[0]
    for more_B, more_A in zip(B[1:], A[1:], strict=True):
        left, right = khatri_rao(Factors(left, right, more_B, more_A))
    return left, right


class DenseModel(BaseTuner):
    """A model with dense updates, made by `peft.get_peft_model`."""

    tuner_layer_cls = DenseLayer
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  (PEFT's attribute; targets are always named)
    layer_class: type[DenseLayer]

    def _create_and_replace(  # type: ignore[override]
        self,
        config: DenseConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, DenseLayer):
            target.update_layer(adapter_name, config)
            return
        layer = self.layer_class(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


class FullModel(DenseModel):
    """A model whose targeted layers are trained in full."""

    prefix = "full_delta"
    tuner_layer_cls = FullLayer
    layer_class = FullLayer


class ChainModel(DenseModel):
    """A model with chains of pairs."""

    prefix = "chain_pair_"
    tuner_layer_cls = ChainLayer
    layer_class = ChainLayer


def _register() -> None:
    for name, config, model in (("full", FullConfig, FullModel), ("chain", ChainConfig, ChainModel)):
        add_peft_type(name.upper())
        if PeftType(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
            register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)


_register()
