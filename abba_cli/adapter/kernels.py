"""Fast and memory-lean autograd for ABBA: keeps only x and the factors for backward, never dW.

Shape legend (see factors.py for the mathematics)
    m, n, r1, r2, R = r1 * r2, T     out and in features, ranks, rank bound, tokens
    x (..., n)  y (..., m)           input and output
    weight (m, n), or (n, m) when `transposed` (transformers' Conv1D stores it that way)

cost.py chooses the way of computing for each call; passes.py computes, through dense.py and factored.py. Both ways agree with
factors.py up to rounding, and with B2 = 0 the result has the bits of the base layer's. docs/how-it-works.md describes the
rounding of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .compiled import linear
from .cost import Kernel
from .dense import Scaled, Weight
from .passes import Call, backward_pass, forward_pass
from .quantised import QuantisedWeight


def adapted_linear(
    x: torch.Tensor,
    weight: Weight,
    bias: torch.Tensor | None,
    adapters: Sequence[Scaled],
    transposed: bool,
    kernel: Kernel = "auto",
    exact: bool = True,
) -> torch.Tensor:
    """Returns x (W0 + sum of s dW)^T + bias for a frozen W0.

    Args:
        x: (..., n). Cast to the dtype of the matmul: the weight's, or that of a surrounding `torch.autocast`.
        weight: W0, (m, n) or, if `transposed`, (n, m). Gets no gradient. A quantised one is dequantised in forward and
            again in backward, so that it is never kept; the dtype of the matmul is then that of x.
        bias: (m,) or None. Gets a gradient if it requires one.
        adapters: the active adapters as (factors, s); the factors may have any floating dtype.
        transposed: whether the weight is stored as (n, m).
        kernel: the way of computing, see cost.py.
        exact: whether the effective weight of a bfloat16 layer has the bits of a merged one. Otherwise dW is made in bfloat16, in
            a third of the memory traffic, which changes it by less than 1%.

    Returns:
        (..., m), in the dtype of the matmul, which is the dtype the base layer would return.
    """
    dtype = matmul_dtype(x, weight.dtype if isinstance(weight, torch.Tensor) else x.dtype)
    return _linear(x, weight, bias, adapters, transposed, dtype, kernel, exact)


def delta_linear(x: torch.Tensor, adapters: Sequence[Scaled], dtype: torch.dtype, kernel: Kernel = "auto") -> torch.Tensor:
    """Returns x (sum of s dW)^T, (..., m), computed and returned in `dtype`: what is added to a base layer's output."""
    return _linear(x, None, None, adapters, False, matmul_dtype(x, dtype), kernel, True)


def matmul_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype a base layer would compute in: `dtype`, unless autocast is on (which leaves float64 alone)."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, dtype):
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _linear(
    x: torch.Tensor,
    weight: Weight | None,
    bias: torch.Tensor | None,
    adapters: Sequence[Scaled],
    transposed: bool,
    dtype: torch.dtype,
    kernel: Kernel,
    exact: bool,
) -> torch.Tensor:
    factors = [factor for four, _ in adapters for factor in four]
    scales = [float(s) for _, s in adapters]
    if torch.compiler.is_compiling() and not isinstance(weight, QuantisedWeight):
        return linear(x, weight, bias, factors, scales, transposed, dtype, kernel, exact)  # type: ignore[no-any-return]
    # Not `torch.is_grad_enabled()`: reentrant checkpointing runs the first forward without gradients, and both
    # forwards should take the same way.
    training = any(factor.requires_grad for factor in factors)
    call = Call(scales, transposed, dtype, kernel, training, exact)
    return _Linear.apply(x, weight, bias, call, *factors)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    """y = x (W0 + dW)^T + bias. Keeps x, W0 and the factors."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Weight | None, bias: torch.Tensor | None, call: Call, *factors: torch.Tensor
    ) -> torch.Tensor:
        ctx.quantised = weight if isinstance(weight, QuantisedWeight) else None
        ctx.save_for_backward(x, None if ctx.quantised else weight, *factors)
        ctx.call, ctx.bias_dtype = call, None if bias is None else bias.dtype
        return forward_pass(x, weight, bias, factors, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, weight, *factors = ctx.saved_tensors
        needs_x, _, needs_bias, _, *needs = ctx.needs_input_grad
        dx, grads = backward_pass(dy, x, ctx.quantised or weight, factors, ctx.call, needs_x, needs)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
        return dx, None, dbias, None, *grads
